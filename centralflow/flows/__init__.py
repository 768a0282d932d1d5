"""What is integrated: the flows, one file each."""

from .base import AbstractFlow as AbstractFlow
from .base import FlowState as FlowState
from .central import CentralFlow as CentralFlow
from .edge import EdgeFlow as EdgeFlow
from .rod import RodFlow as RodFlow
from .stable import StableFlow as StableFlow
