"""The optimizers whose flows are known."""

from .adam import Adam as Adam
from .adam import NAdam as NAdam
from .base import AbstractOptimizer as AbstractOptimizer
from .base import Diagonal as Diagonal
from .base import Vector as Vector
from .gradient_descent import GradientDescent as GradientDescent
from .momentum import HeavyBall as HeavyBall
from .momentum import Nesterov as Nesterov
from .rmsprop import RMSProp as RMSProp
from .rmsprop import ScalarRMSProp as ScalarRMSProp
