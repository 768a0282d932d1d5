"""Data sets, one to a function: what they return is the `data` of an `Objective`."""

from .cifar10 import cifar10 as cifar10
from .digits import digits as digits
from .sequences import copying as copying
from .sequences import sorting as sorting
from .synthetic import circles as circles
from .synthetic import moons as moons
from .synthetic import random_classification as random_classification
from .text import frequent_words as frequent_words
from .text import text_classification as text_classification
