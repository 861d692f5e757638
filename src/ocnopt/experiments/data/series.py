"""Time series to be classified, as the experiments of SNOpt and of neural CDEs prepare them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocnopt.experiments.data.damage import damaged
from ocnopt.experiments.data.describe import DataSet
from ocnopt.experiments.data.locate import find_files
from ocnopt.experiments.data.series_sets import SERIES
from ocnopt.experiments.data.spline import with_time_and_intensity
from ocnopt.experiments.data.ts import TimeSeries, read_ts
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import DatasetName

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Series:
    """Three parts of a set of time series.

    Attributes:
        train: Inputs (N, T, 2 d + 1), float32, and classes (N,), int64. T is the length of the
            longest series of all parts; the rows past a series' end are NaN.
        validation: The same, for the choice of settings.
        test: The same, for the figure that is reported.
        classes: Number of classes.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def load_series(name: DatasetName, root: Path | None = None) -> Series:
    """Load a set of time series by name; nothing is ever downloaded here.

    Both files are merged and split anew, 70/15/15, stratified by class, always in the same way.
    Every channel is standardized by the mean and the deviation of what was observed of it in the
    training part. The channels of the inputs are [time, d cumulative intensities, d data channels]
    (`with_time_and_intensity`).

    Args:
        name: One of `SERIES`.
        root: Folder that holds `uea/`; None as in `data_folder`.

    Returns:
        The three parts, on the CPU.

    Raises:
        InputError: If there is no such set, files are missing (it says how to get them), damaged
            or too small to be split, or scikit-learn or SciPy is needed and not installed.
    """
    if name not in SERIES:
        raise InputError(f"{name!r} is no set of time series; choose from {', '.join(SERIES)}")
    paths = find_files(SERIES[name], root)
    merged = _merged(paths)
    train, validation, test = split(merged.labels, paths[0].parent)
    together = np.concatenate([merged.values[i] for i in train], axis=1)
    seen = np.isfinite(together)
    for channel, observed in enumerate(seen):
        if not (observed.any() and np.ptp(together[channel, observed]) > 0):
            raise damaged(paths[0].parent, f"has a dimension {channel} that does not vary")
    mean = np.nanmean(together, axis=1, keepdims=True)
    deviation = np.nanstd(together, axis=1, ddof=1, keepdims=True)
    longest = max(series.shape[1] for series in merged.values)

    def part(indices: Indices) -> tuple[Tensor, Tensor]:
        rows = [
            with_time_and_intensity((merged.values[i] - mean) / deviation, longest) for i in indices
        ]
        return torch.from_numpy(np.stack(rows)), torch.from_numpy(merged.labels[indices])

    return Series(part(train), part(validation), part(test), len(merged.classes))


def lengths(x: Tensor) -> Tensor:
    """Count the steps of padded series.

    Args:
        x: (..., T, channels), NaN past a series' end, as `load_series` gives it.

    Returns:
        (...), int64, from 1 to T.
    """
    return torch.isfinite(x[..., 0]).sum(-1)


def split(labels: Indices, where: Path) -> tuple[Indices, Indices, Indices]:
    """Split 70/15/15, stratified by class, always in the same way.

    Args:
        labels: Classes, (N,).
        where: What an error speaks of.

    Returns:
        Places of the training, validation and test series.

    Raises:
        InputError: If a class is too small for it, or scikit-learn is not installed.
    """
    try:
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise InputError(
            "time series are split with scikit-learn; pip install 'ocnopt[experiments]'"
        ) from None
    try:
        train, rest = train_test_split(
            np.arange(len(labels)), train_size=0.7, stratify=labels, random_state=0
        )
        validation, test = train_test_split(
            rest, train_size=0.5, stratify=labels[rest], random_state=1
        )
    except ValueError as error:
        raise damaged(where, f"has too few series of a class to be split ({error})") from None
    return train, validation, test


def check_published(folder: Path, data_set: DataSet) -> None:
    """Check that files hold as many series as were published, with those channels and classes.

    It stands in for a checksum where there is none. What the values are, it cannot tell.

    Args:
        folder: Where the files are.
        data_set: What they should be.

    Raises:
        InputError: If they are damaged or hold something else.
    """
    channels = (data_set.shape[-1] - 1) // 2
    for name, samples in zip(data_set.files, data_set.published, strict=True):
        found = read_ts(folder / name)
        is_, should = (
            f"{n} series of {d} dimensions and {k} classes"
            for n, d, k in (
                (len(found.labels), found.channels, len(found.classes)),
                (samples, channels, data_set.classes),
            )
        )
        if is_ != should:
            raise damaged(folder / name, f"holds {is_}, not {should}")


def _merged(paths: list[Path]) -> TimeSeries:
    first, second = (read_ts(path) for path in paths)
    if (second.channels, second.classes) != (first.channels, first.classes):
        raise damaged(paths[1], f"has other dimensions or classes than {paths[0].name}")
    labels = np.concatenate([first.labels, second.labels])
    return TimeSeries(first.values + second.values, labels, first.classes)
