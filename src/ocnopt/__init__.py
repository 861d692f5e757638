"""Optimal-control optimizers for PyTorch: layers are time steps, weights the control."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ocnopt import control, curvature, errors, layers, losses, ode, optim
    from ocnopt.control.terminal import Criterion
    from ocnopt.errors import (
        GraphError,
        NonFiniteError,
        OcnoptError,
        OptionError,
        RecordingError,
        SolverError,
    )
    from ocnopt.losses import MMCLoss, VanishingGradientRegularizer
    from ocnopt.optim import EKFAC, EMSA, KFAC, DDPNOpt, DGNOpt, OCNOpt, SNOpt, VanillaDDP

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "EMSA",
    "KFAC",
    "Criterion",
    "DDPNOpt",
    "DGNOpt",
    "GraphError",
    "MMCLoss",
    "NonFiniteError",
    "OCNOpt",
    "OcnoptError",
    "OptionError",
    "RecordingError",
    "SNOpt",
    "SolverError",
    "VanillaDDP",
    "VanishingGradientRegularizer",
    "__version__",
    "citation",
    "control",
    "curvature",
    "errors",
    "layers",
    "losses",
    "ode",
    "optim",
]

# Public names by the module they live in. They are imported when first asked for: the command
# line is part of this package, and its help must not wait for torch.
_SUBPACKAGES = frozenset({"control", "curvature", "errors", "layers", "losses", "ode", "optim"})
_HOMES = {
    "Criterion": "ocnopt.control.terminal",
    "DDPNOpt": "ocnopt.optim",
    "DGNOpt": "ocnopt.optim",
    "EKFAC": "ocnopt.optim",
    "EMSA": "ocnopt.optim",
    "GraphError": "ocnopt.errors",
    "KFAC": "ocnopt.optim",
    "MMCLoss": "ocnopt.losses",
    "NonFiniteError": "ocnopt.errors",
    "OCNOpt": "ocnopt.optim",
    "OcnoptError": "ocnopt.errors",
    "OptionError": "ocnopt.errors",
    "RecordingError": "ocnopt.errors",
    "SNOpt": "ocnopt.optim",
    "SolverError": "ocnopt.errors",
    "VanillaDDP": "ocnopt.optim",
    "VanishingGradientRegularizer": "ocnopt.losses",
}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"ocnopt.{name}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ocnopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_PAPERS = {
    "DDPNOpt": (
        "liu2021ddpnopt",
        "{DDPNOpt}: Differential Dynamic Programming Neural Optimizer",
        "International Conference on Learning Representations",
    ),
    "DGNOpt": (
        "liu2021dynamic",
        "Dynamic Game Theoretic Neural Optimizer",
        "International Conference on Machine Learning",
    ),
    "SNOpt": (
        "liu2021second",
        "Second-order Neural {ODE} Optimizer",
        "Advances in Neural Information Processing Systems",
    ),
    "OCNOpt": (
        "liu2025optimal",
        "Optimal Control Theoretic Neural Optimizer: From Backpropagation to Dynamic Programming",
        "arXiv preprint arXiv:2510.14168",
    ),
}


def citation(optimizer: str = "DDPNOpt") -> str:
    """BibTeX of the paper that an optimizer comes from.

    Args:
        optimizer: "DDPNOpt", "DGNOpt", "SNOpt" or "OCNOpt".

    Raises:
        OptionError: Another name.
    """
    if optimizer not in _PAPERS:
        from ocnopt.errors import OptionError

        raise OptionError(f"optimizer={optimizer!r}; choose one of {', '.join(_PAPERS)}")
    key, title, venue = _PAPERS[optimizer]
    kind, place = ("article", "journal  ") if "arXiv" in venue else ("inproceedings", "booktitle")
    return (
        f"@{kind}{{{key},\n"
        f"  title     = {{{title}}},\n"
        "  author    = {Liu, Guan-Horng and Chen, Tianrong and Theodorou, Evangelos A.},\n"
        f"  {place} = {{{venue}}},\n"
        f"  year      = {{{key[3:7]}}}\n"
        "}"
    )
