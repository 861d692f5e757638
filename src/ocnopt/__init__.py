"""Optimal-control optimizers for PyTorch: layers are time steps, weights the control."""

from __future__ import annotations

from ocnopt import control, curvature, errors, layers, optim
from ocnopt.control.terminal import Criterion
from ocnopt.errors import (
    GraphError,
    NonFiniteError,
    OcnoptError,
    OptionError,
    RecordingError,
)
from ocnopt.optim import EKFAC, KFAC, DDPNOpt

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "Criterion",
    "DDPNOpt",
    "GraphError",
    "NonFiniteError",
    "OcnoptError",
    "OptionError",
    "RecordingError",
    "__version__",
    "citation",
    "control",
    "curvature",
    "errors",
    "layers",
    "optim",
]


def citation() -> str:
    """BibTeX of the paper that :class:`DDPNOpt` comes from."""
    return (
        "@inproceedings{liu2021ddpnopt,\n"
        "  title     = {{DDPNOpt}: Differential Dynamic Programming Neural Optimizer},\n"
        "  author    = {Liu, Guan-Horng and Chen, Tianrong and Theodorou, Evangelos A.},\n"
        "  booktitle = {International Conference on Learning Representations},\n"
        "  year      = {2021}\n"
        "}"
    )
