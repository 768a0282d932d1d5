"""Predict full-batch training at the edge of stability by its central flow."""

from . import data as data
from . import losses as losses
from . import models as models
from .compare import Comparison as Comparison
from .compare import compare as compare
from .compare import time_average as time_average
from .flows import AbstractFlow as AbstractFlow
from .flows import CentralFlow as CentralFlow
from .flows import EdgeFlow as EdgeFlow
from .flows import RodFlow as RodFlow
from .flows import StableFlow as StableFlow
from .measure import Sharpness as Sharpness
from .measure import midpoints as midpoints
from .measure import sharpness as sharpness
from .objective import FlatObjective as FlatObjective
from .objective import Objective as Objective
from .optimizers import AbstractOptimizer as AbstractOptimizer
from .optimizers import Adam as Adam
from .optimizers import GradientDescent as GradientDescent
from .optimizers import HeavyBall as HeavyBall
from .optimizers import NAdam as NAdam
from .optimizers import Nesterov as Nesterov
from .optimizers import RMSProp as RMSProp
from .optimizers import ScalarRMSProp as ScalarRMSProp
from .predict import predict as predict
from .results import RESULTS as RESULTS
from .sdcp import solve_sdcp as solve_sdcp
from .stationary import StationaryPreconditioner as StationaryPreconditioner
from .stationary import stationary_preconditioner as stationary_preconditioner
from .train import train as train
from .trajectory import NumericalFailure as NumericalFailure
from .trajectory import RunInterrupted as RunInterrupted
from .trajectory import Trajectory as Trajectory


def __getattr__(name: str):
    if name == "plot":  # only those who plot wait for matplotlib
        import importlib

        return importlib.import_module(".plot", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
