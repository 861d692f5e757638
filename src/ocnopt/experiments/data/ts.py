"""Read the .ts format of the UEA archive of time series."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ocnopt.experiments.data.damage import damaged
from ocnopt.experiments.errors import InputError

Lines = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class TimeSeries:
    """Series and their classes.

    Attributes:
        values: One (channels, length) array per series, float64, NaN where a value is missing.
            Lengths may differ, channels may not.
        labels: Class of every series, (N,), int64: its place in `classes`.
        classes: Names of the classes, in the order in which the file states them.
    """

    values: list[NDArray[np.float64]]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Channels of every series."""
        return len(self.values[0])


@dataclass
class _Header:
    classes: tuple[str, ...] = ()
    channels: int | None = None
    equal_length: bool = False


def read_ts(path: Path) -> TimeSeries:
    """Read one file.

    Comments begin with `#`, the header's lines with `@`, in any order and spelling of capitals up
    to `@data`; then comes a series per line, its channels set apart by `:`, their values by `,`,
    with its class at the end. `?` and NaN stand for a value that is missing. Steps at a series' end
    at which nothing at all was observed are padding and left out.

    Args:
        path: The file.

    Returns:
        What it holds; at least one series.

    Raises:
        InputError: If the file cannot be read, or a line of it does not fit the format or the
            header; the message has the line's number. Series with time stamps are refused, too.
    """
    try:
        # Descriptions are in any encoding; what matters is plain ASCII.
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = ((number, line.strip()) for number, line in enumerate(file, start=1))
            header = _read_header(path, lines)
            return _read_data(path, lines, header)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from None


def _read_header(path: Path, lines: Lines) -> _Header:
    header = _Header()
    for number, line in lines:
        if not line or line.startswith("#"):
            continue
        if not line.startswith("@"):
            raise damaged(path, f"has in line {number} neither a comment nor a part of the header")
        key, *values = line[1:].split() or [""]
        key = key.lower()
        first = values[0].lower() if values else ""
        if key == "data":
            if not header.classes:
                raise damaged(path, f"names no classes before line {number} (@classLabel)")
            return header
        if key == "timestamps" and first != "false":
            raise InputError(
                f"{path} has series with time stamps (line {number}: {line}), which cannot be read;"
                " write them at equal steps, without"
            )
        if key in ("dimension", "dimensions"):
            if not first.isdecimal() or int(first) < 1:
                raise damaged(path, f"has no number of dimensions in line {number}")
            header.channels = int(first)
        elif key == "univariate" and first == "true":
            header.channels = 1
        elif key == "equallength":
            header.equal_length = first == "true"
        elif key == "classlabel" and first == "true":
            header.classes = tuple(values[1:])
    raise damaged(path, "ends before its data (@data)")


def _read_data(path: Path, lines: Lines, header: _Header) -> TimeSeries:
    place = {name: label for label, name in enumerate(header.classes)}
    values: list[NDArray[np.float64]] = []
    labels: list[int] = []
    steps = None  # of the first series
    for number, line in lines:
        if not line or line.startswith("#"):
            continue
        *parts, name = (part.strip() for part in line.split(":"))
        if name not in place:
            shown = name if len(name) < 20 else f"{name[:20]}..."
            raise damaged(path, f"ends line {number} with {shown!r}, none of the header's classes")
        if header.channels is None:
            header.channels = len(parts)
        if len(parts) != header.channels or not parts:
            raise damaged(
                path, f"has {len(parts)} dimensions in line {number}, not {header.channels}"
            )
        series = _series(path, number, parts)
        if header.equal_length and steps not in (None, series.shape[1]):
            raise damaged(
                path,
                f"has {series.shape[1]} steps in line {number}, not {steps} as before, though its"
                " header says @equalLength",
            )
        steps = series.shape[1]
        observed = np.flatnonzero(np.isfinite(series).any(axis=0))
        if not observed.size:
            raise damaged(path, f"has no observation in line {number}")
        values.append(series[:, : observed[-1] + 1])
        labels.append(place[name])
    if not values:
        raise damaged(path, "holds no series")
    return TimeSeries(values, np.array(labels, dtype=np.int64), header.classes)


def _series(path: Path, number: int, parts: list[str]) -> NDArray[np.float64]:
    """Turn the channels of a line into numbers, (channels, length)."""
    try:
        rows = [np.array(part.replace("?", "nan").split(","), dtype=np.float64) for part in parts]
    except ValueError as error:
        raise damaged(path, f"has in line {number} what is no number ({error})") from None
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise damaged(path, f"has dimensions of {sorted(lengths)} steps in line {number}")
    series = np.stack(rows)
    if np.isinf(series).any():
        raise damaged(path, f"has an infinite value in line {number}")
    return series
