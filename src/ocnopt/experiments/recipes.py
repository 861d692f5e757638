"""The papers' training problems, as settings to start from; imports nothing heavy.

Liu et al., ICLR 2021, section 5.1 and A.6.1: FCNs of 5 linear layers with hidden widths of 10 to
32, tanh on WINE and DIGITS (with a sigmoid on WINE's outputs), ReLU elsewhere, batches of 8 to 32;
CNNs of 4 convolutions (3x3, 32 channels) and 2 linear layers, batches of 128. What the paper leaves
open (widths per data set, where the CNN pools, how long it trains) is a choice of ours.

Liu, Chen and Theodorou, ICML 2021: image classification by residual and inception networks. Their
sizes are ours: such that a run of SGD's takes less than a minute of one core. cifar-10-resnet18 is
for a GPU.

Liu, Chen and Theodorou, NeurIPS 2021: classification of images and of time series by Neural ODEs.
cifar-10-ode-full and articulary-word-recognition-ode-full are the paper's networks, for a GPU and
for the patient; the others are narrow or see less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["RECIPES"]

_CNN: Mapping[str, Any] = {
    "network": "cnn",
    "channels": 32,
    "hidden": 128,
    "pools": (1, 3),
    "batch_size": 128,
    "steps": 120,
}

_RESIDUAL: Mapping[str, Any] = {"network": "residual-cnn", "depth": 2, "norm": "none"}
# 15 channels and the time are 16, which processors are fast with: a run takes a few minutes of one
# core.
_ODE: Mapping[str, Any] = {"network": "ode-cnn", "channels": 15, "batch_size": 128, "steps": 300}
_INCEPTION: Mapping[str, Any] = {"network": "inception", "norm": "none"}
# Of every series each sixth observation, and one step of a Runge-Kutta method of order 4 from each
# to the next: a step of training takes about 0.14 seconds of one core, and its gradient agrees
# with dopri5's to about four digits. With dopri5 at every observation, as in the -full recipe, it
# takes about ten seconds.
_GRU_ODE: Mapping[str, Any] = {"network": "gru-ode", "stride": 6, "method": "rk4"}

#: Keyword arguments of :class:`~ocnopt.experiments.config.TrainConfig`, by name.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "wine-fcn": {
        "dataset": "wine",
        "widths": (16, 16, 16, 16),
        "activation": "tanh",
        "head": "sigmoid",
        "batch_size": 8,
        "steps": 500,
    },
    "digits-fcn": {
        "dataset": "digits",
        "widths": (32, 32, 32, 16),
        "activation": "tanh",
        "batch_size": 8,
        "steps": 1500,
    },
    "mnist-fcn": {
        "dataset": "mnist",
        "widths": (16, 16, 16, 16),
        "activation": "relu",
        "batch_size": 32,
        "steps": 1000,
    },
    "fashion-mnist-fcn": {
        "dataset": "fashion-mnist",
        "widths": (16, 16, 16, 16),
        "activation": "relu",
        "batch_size": 32,
        "steps": 1000,
    },
    "mnist-cnn": {"dataset": "mnist", **_CNN},
    "svhn-cnn": {"dataset": "svhn", **_CNN},
    "cifar-10-cnn": {"dataset": "cifar-10", **_CNN},
    "digits-deep": {
        "dataset": "digits",
        "widths": (20,) * 8,
        "activation": "sigmoid",
        "batch_size": 16,
        "steps": 4000,
    },
    "digits-residual": {
        "dataset": "digits",
        "network": "residual-fcn",
        "widths": (32, 32, 24, 16),
        "depth": 2,
        "activation": "tanh",
        "batch_size": 8,
        "steps": 1500,
    },
    **{
        f"{name}-residual": {
            "dataset": name,
            **_RESIDUAL,
            "widths": (8, 16, 32),
            "batch_size": 32,
            "steps": 1500,
        }
        for name in ("mnist", "fashion-mnist")
    },
    "cifar-10-residual": {
        "dataset": "cifar-10",
        **_RESIDUAL,
        "widths": (16, 32, 64),
        "batch_size": 32,
        "steps": 600,
    },
    "cifar-10-resnet18": {
        "dataset": "cifar-10",
        **_RESIDUAL,
        "widths": (64, 64, 128, 128, 256, 256, 512, 512),
        "norm": "batch",
        "batch_size": 128,
        "steps": 11_700,  # 30 epochs
    },
    "digits-inception": {
        "dataset": "digits",
        **_INCEPTION,
        "widths": (16, 32),
        "batch_size": 16,
        "steps": 400,
    },
    **{
        f"{name}-inception": {
            "dataset": name,
            **_INCEPTION,
            "widths": (16, 32, 64),
            "batch_size": 32,
            "steps": 600,
        }
        for name in ("mnist", "fashion-mnist", "cifar-10")
    },
    "mnist-ode": {"dataset": "mnist", **_ODE, "steps": 600},
    "fashion-mnist-ode": {"dataset": "fashion-mnist", **_ODE},
    "cifar-10-ode": {"dataset": "cifar-10", **_ODE, "steps": 780},  # 2 epochs
    # The code that was released with the paper has learning rates 0.001 for Adam (weight decay
    # 0.001), 0.01 for SGD (momentum 0.9) and 0.01 for SNOpt (damping=0.03, update_every=100,
    # sample_step=0.01, precondition_all=true).
    "cifar-10-ode-full": {
        "dataset": "cifar-10",
        "network": "ode-cnn",
        "channels": 64,
        "method": "dopri5",
        "rtol": 1e-3,
        "atol": 1e-3,
        "batch_size": 128,
        "steps": 7800,  # 20 epochs
    },
    "articulary-word-recognition-ode": {
        "dataset": "articulary-word-recognition",
        **_GRU_ODE,
        "hidden": 64,
        "batch_size": 128,
        "steps": 120,  # 40 epochs
    },
    "character-trajectories-half-ode": {
        "dataset": "character-trajectories-half",
        **_GRU_ODE,
        "hidden": 32,
        "batch_size": 128,
        "steps": 306,  # 34 epochs
    },
    # The code that was released with the paper has learning rates 0.001 for Adam, 0.003 for SGD and
    # 0.003 for SNOpt (damping=0.1, update_every=100, sample_step=1.0) in the Neural ODE, and Adam
    # outside of it (rest_lr=0.003, or 0.001 beside Adam and SGD).
    "articulary-word-recognition-ode-full": {
        "dataset": "articulary-word-recognition",
        "network": "gru-ode",
        "hidden": 64,
        "stride": 1,
        "method": "dopri5",
        "rtol": 1e-3,
        "atol": 1e-3,
        "batch_size": 256,
        "steps": 600,  # 600 epochs
    },
}
