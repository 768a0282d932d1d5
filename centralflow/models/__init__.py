"""Equinox models, smooth enough for third derivatives, one family to a file. Each is a
function of one example."""

from .cnn import CNN as CNN
from .lstm import LSTM as LSTM
from .mamba import Mamba as Mamba
from .mlp import MLP as MLP
from .resnet import ResNet as ResNet
from .transformer import Transformer as Transformer
from .vit import ViT as ViT
