"""The networks of the paper, each with its last-layer features, last layer and its start."""

from paperlib.networks.network import Network
from paperlib.networks.residual import ResNet
from paperlib.networks.two_layer import TwoLayer
from paperlib.networks.vision_transformer import VisionTransformer

__all__ = ["Network", "ResNet", "TwoLayer", "VisionTransformer"]
