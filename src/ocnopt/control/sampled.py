"""A few entries of a gradient, by which it is seen what the loop did to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["SAMPLE", "sample_of", "thrown_away", "values_of"]

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


def thrown_away(params: Iterable[Tensor], samples: Mapping[Tensor, Tensor]) -> bool:
    """Whether all gradients have lost what autograd put there: the loop set them to None or zero.

    Args:
        params: Whose gradients are looked at.
        samples: What :func:`sample_of` gave right after autograd had accumulated a gradient.
    """
    left = {p: p.grad for p in params if p.grad is not None}
    # A few entries tell most often; gradients that were zero all along tell nothing.
    if left and _any([sample_of(p) for p in left]):
        return False
    if left and not _any([samples[p] for p in left if p in samples]):
        return False
    return not _any([values_of(grad) for grad in left.values()])


def _any(tensors: list[Tensor]) -> bool:
    """Whether any entry is not zero, asked once: a device would be waited for every time."""
    return bool(tensors) and bool(torch.stack([x.any() for x in tensors]).any())


@lru_cache(maxsize=1024)
def _places(size: int, device: torch.device) -> Tensor:
    """Places by chance: a stride may meet one column alone, and miss a mask of all others."""
    chance = torch.Generator("cpu").manual_seed(0)
    return torch.randint(size, (SAMPLE,), generator=chance, device="cpu").to(device)
