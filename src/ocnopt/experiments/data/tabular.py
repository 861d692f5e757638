"""Tables of samples whose density is to be learned, prepared as for masked autoregressive flows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocnopt.experiments.data.damage import damaged
from ocnopt.experiments.data.density_sets import DENSITIES
from ocnopt.experiments.data.locate import find_files
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import DensityName

Table = NDArray[np.float64]

COLUMNS = 19  # of `gas`: time, two concentrations, 16 sensors
SENSORS = slice(3, COLUMNS)
SHARE = 0.25  # of the rows of `gas`
ALIKE = 0.98  # correlation above which one of two sensors is left out
_SEED = 0  # of the choice and the order of the rows of `gas`


@dataclass(frozen=True)
class Density:
    """Samples of a density.

    Attributes:
        train: (N, d), float32.
        validation: The same, for the choice of settings.
        test: The same, for the figure that is reported.
    """

    train: Tensor
    validation: Tensor
    test: Tensor


def load_density(name: DensityName, root: Path | None = None) -> Density:
    """Load a table by name; nothing is ever downloaded here.

    The last tenth of the rows is the test part, the last tenth of the rest the validation part.
    The preparation is that of Papamakarios, Pavlakou and Murray (NIPS 2017):

    - `miniboone`, (N, 43): their file, in their order, standardized by mean and deviation of all
      rows but the test part's.
    - `gas`, (N, 8): a random quarter of the rows of UCI's file, in random order; without time and
      concentrations; of two sensors that correlate by more than .98 the first is left out;
      standardized by mean and deviation of *all* rows, as there. Which quarter it is differs from
      theirs, which they give out as a pickle.

    Args:
        name: One of `DENSITIES`.
        root: Folder that holds `miniboone/` and `gas/`; None as in `data_folder`.

    Returns:
        The three parts, on the CPU.

    Raises:
        InputError: If there is no such set, or its file is missing (it says how to get it) or
            damaged.
    """
    if name not in DENSITIES:
        raise InputError(f"there is no density {name!r}; choose from {', '.join(DENSITIES)}")
    (path,) = find_files(DENSITIES[name], root)
    rows = _checked(path, _read_npy(path) if name == "miniboone" else _quarter(_read_text(path)))
    if name == "gas":
        rows = rows[:, unlike(rows)]
    features = DENSITIES[name].shape[0]
    if rows.shape[1] != features:
        raise damaged(path, f"comes to {rows.shape[1]} features, not {features}")
    return _parts(rows, of_all=name == "gas")


def unlike(rows: Table) -> list[int]:
    """Choose columns of which no two correlate by more than .98.

    As long as there are two that do, the first column that is like another is left out.

    Args:
        rows: (N, d), columns that vary.

    Returns:
        The columns that are left, in order.
    """
    alike = np.atleast_2d(np.corrcoef(rows, rowvar=False) > ALIKE)
    left = list(range(rows.shape[1]))
    while (crowded := alike[np.ix_(left, left)].sum(axis=1) > 1).any():
        del left[int(crowded.argmax())]
    return left


def _parts(rows: Table, of_all: bool) -> Density:
    """Split by order, then standardize by the statistics of all rows or of all but the test's."""
    test = len(rows) // 10
    rest = len(rows) - test
    train = rest - rest // 10
    known = rows if of_all else rows[:rest]
    scaled = (rows - known.mean(axis=0)) / known.std(axis=0, ddof=1 if of_all else 0)
    parts = np.split(scaled.astype(np.float32), [train, rest])
    return Density(*(torch.from_numpy(part) for part in parts))


def _quarter(rows: Table) -> Table:
    order = np.random.default_rng(_SEED).permutation(len(rows))
    return rows[order[: round(SHARE * len(rows))]]


def _read_npy(path: Path) -> Table:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a header that is odd: it is read or it is not
            table = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged header leads NumPy into errors of any kind
        reason = str(error).partition("\n")[0]
        raise damaged(path, f"cannot be read as a NumPy file ({reason})") from None
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind != "f":
        raise damaged(path, "holds no table of numbers")
    return table.astype(np.float64)


def _read_text(path: Path) -> Table:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without rows, which is refused below
            table = np.loadtxt(path, skiprows=1, ndmin=2)
    except (OSError, ValueError) as error:
        reason = str(error).partition(";")[0]  # what follows is advice on NumPy
        raise damaged(path, f"cannot be read as a table of numbers ({reason})") from None
    if table.size and table.shape[1] != COLUMNS:
        raise damaged(path, f"has {table.shape[1]} columns, not {COLUMNS}")
    return table[:, SENSORS]


def _checked(path: Path, rows: Table) -> Table:
    if len(rows) < 11:
        raise damaged(path, f"has too few rows to be split in three ({len(rows)})")
    if not np.isfinite(rows).all():
        raise damaged(path, "has values that are not finite")
    constant = np.flatnonzero(np.ptp(rows, axis=0) == 0)
    if constant.size:
        raise damaged(path, f"has a feature {constant[0]} that does not vary")
    return rows
