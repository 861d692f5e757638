"""A few entries of a gradient, by which it is seen what the loop did to it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["SAMPLE", "sample_of", "values_of"]

#: Entries of a gradient that are looked at.
SAMPLE = 256


def sample_of(param: Tensor) -> Tensor:
    """A copy of at most :data:`SAMPLE` entries of a parameter's gradient, always the same ones."""
    assert param.grad is not None
    values = values_of(param.grad)
    if values.numel() <= SAMPLE:
        return values.flatten().clone()
    return values.take(_places(values.numel(), values.device))


def values_of(grad: Tensor) -> Tensor:
    """All of a gradient that may not be zero."""
    grad = grad.detach()
    return grad.coalesce().values() if grad.is_sparse else grad


@lru_cache(maxsize=1024)
def _places(size: int, device: torch.device) -> Tensor:
    """Places by chance: a stride may meet one column alone, and miss a mask of all others."""
    chance = torch.Generator("cpu").manual_seed(0)
    return torch.randint(size, (SAMPLE,), generator=chance, device="cpu").to(device)
