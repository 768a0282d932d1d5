"""How a flow is stepped: Diffrax solvers, knowing nothing of losses or optimizers."""

from .moreau import AbstractComplementarityTerm as AbstractComplementarityTerm
from .moreau import Moreau as Moreau
