"""What runs compute on: times can be compared on the same kind of machine alone."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

import torch

__all__ = ["machine"]


@functools.cache
def machine(device: str = "cpu") -> str:
    """Name the processor, or the GPU, that a torch device stands for.

    Args:
        device: Such as `cpu` or `cuda:0`.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # not a Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
