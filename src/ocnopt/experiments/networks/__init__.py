"""Network recipes: a frozen dataclass says what, a plain function builds it."""

from ocnopt.experiments.networks.inception import Inception, InceptionBlock, inception
from ocnopt.experiments.networks.ode import OdeCNN, ode_cnn
from ocnopt.experiments.networks.plain import CNN, FCN, cnn, fcn
from ocnopt.experiments.networks.residual import (
    ResidualBlock,
    ResidualCNN,
    ResidualFCN,
    residual_cnn,
    residual_fcn,
)
from ocnopt.experiments.networks.series import GruODE, GruODENetwork, gru_ode

__all__ = [
    "CNN",
    "FCN",
    "GruODE",
    "GruODENetwork",
    "Inception",
    "InceptionBlock",
    "OdeCNN",
    "ResidualBlock",
    "ResidualCNN",
    "ResidualFCN",
    "cnn",
    "fcn",
    "gru_ode",
    "inception",
    "ode_cnn",
    "residual_cnn",
    "residual_fcn",
]
