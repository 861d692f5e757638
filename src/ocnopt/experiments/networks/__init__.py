"""Network recipes: a frozen dataclass says what, a plain function builds it."""

from ocnopt.experiments.networks.inception import Inception, InceptionBlock, inception
from ocnopt.experiments.networks.plain import CNN, FCN, cnn, fcn
from ocnopt.experiments.networks.residual import (
    ResidualBlock,
    ResidualCNN,
    ResidualFCN,
    residual_cnn,
    residual_fcn,
)

__all__ = [
    "CNN",
    "FCN",
    "Inception",
    "InceptionBlock",
    "ResidualBlock",
    "ResidualCNN",
    "ResidualFCN",
    "cnn",
    "fcn",
    "inception",
    "residual_cnn",
    "residual_fcn",
]
