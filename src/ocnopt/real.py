"""Which options are numbers: Python's and numpy's alike, and tensors of one; no truth value."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

__all__ = ["is_real", "is_scalar", "plain"]


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a real number.

    Args:
        value: An option as it was given.
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_scalar(value: object) -> TypeGuard[float | Tensor]:
    """Whether it is a real number, or a tensor of one.

    Args:
        value: An option as it was given.
    """
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    return is_real(value)


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with Python's numbers in place of others, as checkpoints are to be plain values.

    Args:
        options: By name, mappings and tuples of them included; what is no number stays as it is.
    """
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return plain(value)
    if type(value) is tuple:
        return tuple(map(_plain, value))
    if not is_real(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
