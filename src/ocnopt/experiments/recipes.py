"""The papers' training problems, as settings to start from; imports nothing heavy.

Liu et al., ICLR 2021, section 5.1 and A.6.1: FCNs of 5 linear layers with hidden widths of 10 to
32, tanh on WINE and DIGITS (with a sigmoid on WINE's outputs), ReLU elsewhere, batches of 8 to 32;
CNNs of 4 convolutions (3x3, 32 channels) and 2 linear layers, batches of 128. What the paper leaves
open (widths per data set, where the CNN pools, how long it trains) is a choice of ours.

Liu, Chen and Theodorou, ICML 2021: image classification by residual and inception networks. Their
sizes are ours: such that a run of SGD's takes less than a minute of one core. cifar-10-resnet18 is
for a GPU.
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
_INCEPTION: Mapping[str, Any] = {"network": "inception", "norm": "none"}

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
}
