"""How much memory the matrices of the full form may take."""

from __future__ import annotations

import os

import torch

__all__ = ["room"]


def room(device: torch.device) -> float:
    """Bytes that may be taken: half of what a GPU has left, or of the machine's whole memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) / 2
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 4.0 * 2**30
