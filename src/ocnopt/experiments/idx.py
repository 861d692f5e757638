"""Read the IDX format of MNIST and its relatives, gzip-compressed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ocnopt.experiments.errors import InputError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dims: int) -> Tensor:
    """Read one `.gz` file of unsigned bytes.

    The format: two zero bytes, the type code (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit number, then the data in row-major order.

    Args:
        path: The file.
        dims: Dimensions that it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        InputError: If the file is missing, is not gzip or not IDX, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"no file {path}; give the folder above it with --data-root") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None
    start = 4 + 4 * dims
    if len(raw) < start or raw[:4] != bytes((0, 0, _UNSIGNED_BYTE, dims)):
        raise InputError(f"{path} is no IDX file of bytes with {dims} dimensions; fetch it again")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if len(raw) - start != math.prod(shape):
        raise InputError(
            f"{path} states {math.prod(shape)} bytes of data and holds {len(raw) - start};"
            " fetch it again"
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)
