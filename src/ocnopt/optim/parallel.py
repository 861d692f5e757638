"""Data parallelism: sums and means over the processes that share a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_over", "processes", "sum_over"]


def processes() -> int:
    """Processes that share a step: the default group's size, or one where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def sum_over(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sum every tensor over the processes, in one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view_as(t) for part, t in zip(parts, tensors, strict=True))


def mean_over(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Average every tensor over the processes, in one exchange."""
    size = processes()
    return tuple(t / size for t in sum_over(tensors))
