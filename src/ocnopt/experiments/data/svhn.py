"""Read the cropped digits of SVHN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ocnopt.experiments.data.damage import damaged
from ocnopt.experiments.errors import InputError

SIDE = 32
CLASSES = 10


def read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """Read one MATLAB file.

    It holds X, 32 x 32 x 3 x N bytes (row, column, channel, image), and y, N x 1, from 1 to 10;
    10 is the digit 0.

    Args:
        path: The file.

    Returns:
        Pixels (N, 3, 32, 32), uint8, and digits (N,), int64, from 0 to 9.

    Raises:
        InputError: If SciPy is not installed, or the file cannot be read, lacks X or y, or has
            them of another shape, of different lengths or with another label.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("svhn is read with SciPy; pip install 'ocnopt[experiments]'") from None
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # a damaged file leads SciPy into errors of any kind
        raise damaged(path, f"cannot be read as a MATLAB file ({error})") from None
    for name in ("X", "y"):
        if name not in content:
            raise damaged(path, f"holds no variable {name}")
    x, y = content["X"], content["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (SIDE, SIDE, 3) or not x.size:
        raise damaged(path, f"has an X of {x.dtype} {_shape(x)}, not of uint8 32x32x3xN")
    if y.dtype.kind not in "iu" or y.shape not in ((x.shape[3], 1), (1, x.shape[3])):
        raise damaged(path, f"has a y of {y.dtype} {_shape(y)} for an X of {_shape(x)}")
    if int(y.min()) < 1 or int(y.max()) > CLASSES:
        raise damaged(path, f"has a label outside 1 to {CLASSES}")
    pixels = np.ascontiguousarray(x.transpose(3, 2, 0, 1))
    return torch.from_numpy(pixels), torch.from_numpy(y.reshape(-1) % CLASSES).long()


def _shape(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
    return "x".join(map(str, array.shape))
