"""What may be trained, and the settings each problem starts from; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DatasetName = Literal[
    "digits",
    "wine",
    "clusters",
    "mnist",
    "fashion-mnist",
    "cifar-10",
    "svhn",
    "articulary-word-recognition",
    "character-trajectories",
    "character-trajectories-half",
    "spoken-arabic-digits",
]
#: Sets without classes, which no classifier is trained on.
DensityName = Literal["miniboone", "gas"]
SetName = Literal[DatasetName, DensityName]
NetworkName = Literal[
    "fcn", "cnn", "residual-fcn", "residual-cnn", "inception", "ode-cnn", "gru-ode"
]
OptimizerName = Literal[
    "ddpnopt",
    "dgnopt",
    "kfac",
    "ekfac",
    "sgd",
    "rmsprop",
    "adam",
    "vanilla-ddp",
    "emsa",
    "snopt",
    "ocnopt",
]
Activation = Literal["tanh", "relu", "sigmoid"]
Head = Literal["identity", "sigmoid"]
Norm = Literal["none", "batch", "group"]
#: Of differential equations; those of :data:`ocnopt.ode.solve.METHODS`.
Solver = Literal[
    "dopri5",
    "dopri8",
    "bosh3",
    "fehlberg2",
    "adaptive_heun",
    "euler",
    "midpoint",
    "heun2",
    "heun3",
    "rk4",
    "explicit_adams",
    "implicit_adams",
]


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
    # Batches of the code that was released with SNOpt; of the half, half a batch.
    "articulary-word-recognition": Problem(256, widths=(32, 32, 32, 32), activation="relu"),
    "character-trajectories": Problem(512, widths=(32, 32, 32, 32), activation="relu"),
    "character-trajectories-half": Problem(256, widths=(32, 32, 32, 32), activation="relu"),
    "spoken-arabic-digits": Problem(128, widths=(32, 32, 32, 32), activation="relu"),
}

#: Settings of a network, and the networks that have them.
NETWORK_SETTINGS: Mapping[str, tuple[NetworkName, ...]] = {
    "widths": ("fcn", "residual-fcn", "residual-cnn", "inception"),
    "activation": ("fcn", "residual-fcn"),
    "head": ("fcn",),
    "channels": ("cnn", "ode-cnn"),
    "hidden": ("cnn", "gru-ode"),
    "stride": ("gru-ode",),
    "pools": ("cnn",),
    "depth": ("residual-fcn", "residual-cnn"),
    "norm": ("residual-cnn", "inception"),
    "method": ("ode-cnn", "gru-ode"),
    "rtol": ("ode-cnn", "gru-ode"),
    "atol": ("ode-cnn", "gru-ode"),
}
#: Channels of a network whose layers all have the same.
CHANNELS: Mapping[str, int] = {"cnn": 32, "ode-cnn": 64}
#: Features of a network's one hidden layer, or of its state.
HIDDEN: Mapping[str, int] = {"cnn": 128, "gru-ode": 32}
#: Widths of the blocks of a network that has blocks.
BLOCK_WIDTHS: Mapping[str, tuple[int, ...]] = {
    "residual-fcn": (32, 32, 24, 16),
    "residual-cnn": (16, 32, 64),
    "inception": (16, 32),
}
#: Networks of linear layers, whose inputs need not be images.
OF_LINEAR_LAYERS: frozenset[str] = frozenset({"fcn", "residual-fcn"})
#: Networks whose products are too small to be shared among threads.
ON_ONE_THREAD: frozenset[str] = OF_LINEAR_LAYERS | {"gru-ode"}

# Middle-of-the-range learning rates: a run without --lr should train, not be the best there is.
LEARNING_RATES: Mapping[OptimizerName, float] = {
    "ddpnopt": 0.1,
    "dgnopt": 0.03,
    "kfac": 0.03,
    "ekfac": 0.03,
    "sgd": 0.1,
    "rmsprop": 0.001,
    "adam": 0.001,
    "vanilla-ddp": 1.0,
    "emsa": 1.0,
    "snopt": 0.01,
    "ocnopt": 0.02,
}
