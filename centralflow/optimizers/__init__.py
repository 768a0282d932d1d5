"""The optimizers whose flows are known, one file each."""

from .base import AbstractOptimizer as AbstractOptimizer
from .base import Diagonal as Diagonal
from .base import Vector as Vector
from .gradient_descent import GradientDescent as GradientDescent
from .rmsprop import RMSProp as RMSProp
from .rmsprop import ScalarRMSProp as ScalarRMSProp
