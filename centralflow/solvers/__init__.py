"""How a flow is stepped: Diffrax solvers, knowing nothing of losses or optimizers."""

from .course import Piece as Piece
from .foresight import ForesightController as ForesightController
from .moreau import Moreau as Moreau
from .pausing import Pause as Pause
from .pausing import PausingController as PausingController
from .pausing import PausingState as PausingState
from .projected import ProjectedRKC as ProjectedRKC
from .term import AbstractComplementarityTerm as AbstractComplementarityTerm
from .term import AbstractStiffComplementarityTerm as AbstractStiffComplementarityTerm
from .term import Step as Step
