"""Read the binary version of CIFAR-10; the Python version is a pickle, which can run code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ocnopt.experiments.data.damage import damaged

SHAPE = (3, 32, 32)
CLASSES = 10
RECORD = 1 + 3 * 32 * 32


def read_batches(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Read batches and put them one after the other.

    A batch is a row of records without a header: a byte of label, then a byte per pixel, the red
    ones first, each channel row by row. How many there are follows from the file's size.

    Args:
        paths: The batches' files, one or more.

    Returns:
        Pixels (N, 3, 32, 32), uint8, and classes (N,), int64.

    Raises:
        InputError: If a file cannot be read, is no whole number of records, or has a label above 9.
    """
    batches = [_records(path) for path in paths]
    pixels = np.concatenate([batch[:, 1:] for batch in batches])
    labels = np.concatenate([batch[:, 0] for batch in batches])
    return torch.from_numpy(pixels).reshape(-1, *SHAPE), torch.from_numpy(labels).long()


def _records(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from None
    if not raw.size or raw.size % RECORD:
        raise damaged(
            path, f"has {raw.size} bytes, which is no whole number of records of {RECORD}"
        )
    records = raw.reshape(raw.size // RECORD, RECORD)
    if int(records[:, 0].max()) >= CLASSES:
        raise damaged(path, f"has a label above {CLASSES - 1}")
    return records
