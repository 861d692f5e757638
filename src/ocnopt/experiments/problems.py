"""What may be trained, and the settings each problem starts from; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DatasetName = Literal["digits", "wine", "clusters", "mnist", "fashion-mnist", "cifar-10", "svhn"]
NetworkName = Literal["fcn", "cnn"]
OptimizerName = Literal["ddpnopt", "kfac", "ekfac", "sgd", "rmsprop", "adam", "vanilla-ddp", "emsa"]
Activation = Literal["tanh", "relu", "sigmoid"]
Head = Literal["identity", "sigmoid"]


@dataclass(frozen=True)
class Problem:
    """Settings that a data set starts from where none are given.

    Attributes:
        batch_size: Samples per step.
        widths: Hidden widths of the fully connected network.
        activation: Its non-linearity.
    """

    batch_size: int
    widths: tuple[int, ...]
    activation: Activation


PROBLEMS: Mapping[DatasetName, Problem] = {
    "digits": Problem(batch_size=8, widths=(32, 32, 32, 16), activation="tanh"),
    "wine": Problem(batch_size=8, widths=(16, 16, 16, 16), activation="tanh"),
    "clusters": Problem(batch_size=8, widths=(16, 16, 16, 16), activation="tanh"),
    "mnist": Problem(batch_size=32, widths=(32, 32, 32, 32), activation="relu"),
    "fashion-mnist": Problem(batch_size=32, widths=(32, 32, 32, 32), activation="relu"),
    "cifar-10": Problem(batch_size=128, widths=(32, 32, 32, 32), activation="relu"),
    "svhn": Problem(batch_size=128, widths=(32, 32, 32, 32), activation="relu"),
}

# Middle-of-the-range learning rates: a run without --lr should train, not be the best there is.
LEARNING_RATES: Mapping[OptimizerName, float] = {
    "ddpnopt": 0.1,
    "kfac": 0.03,
    "ekfac": 0.03,
    "sgd": 0.1,
    "rmsprop": 0.001,
    "adam": 0.001,
    "vanilla-ddp": 1.0,
    "emsa": 1.0,
}
