"""Read the IDX format of MNIST and its relatives, gzip-compressed or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ocnopt.experiments.data.damage import damaged
from ocnopt.experiments.errors import InputError

_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dims: int) -> Tensor:
    """Read one file of unsigned bytes.

    The format: two zero bytes, the type code (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit number, then the data in row-major order. Whether a file is
    compressed is told from its bytes: browsers unpack what they save and leave its name.

    Args:
        path: The file.
        dims: Dimensions that it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        InputError: If the file is missing, is damaged gzip or no IDX, or is cut short.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == _GZIP:
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise InputError(f"no file {path}; give the folder above it with --data-root") from None
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    start = 4 + 4 * dims
    if len(raw) < start or raw[:4] != bytes((0, 0, _UNSIGNED_BYTE, dims)):
        raise damaged(path, f"is no IDX file of bytes with {dims} dimensions")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if len(raw) - start != math.prod(shape):
        raise damaged(path, f"states {math.prod(shape)} bytes of data and holds {len(raw) - start}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[start:].reshape(shape)


def read_images(images: Path, labels: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Read a file of images and the file of their labels.

    Args:
        images: The images' file.
        labels: The labels' file.
        classes: Number of classes; labels count from 0.

    Returns:
        Pixels (N, 1, height, width), uint8, and classes (N,), int64; N is at least 1.

    Raises:
        InputError: If `read_idx` does, the two do not go together, or a label is no class.
    """
    pixels = read_idx(images, dims=3)
    y = read_idx(labels, dims=1).long()
    if not pixels.numel():
        raise damaged(images, "holds no images")
    if len(pixels) != len(y):
        raise damaged(labels, f"has {len(y)} labels for the {len(pixels)} images of {images.name}")
    if int(y.max()) >= classes:
        raise damaged(labels, f"has a label above {classes - 1}")
    return pixels.unsqueeze(1), y
