"""Natural cubic splines through what was observed of a time series."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ocnopt.experiments.errors import InputError

Array = NDArray[np.float64]


def fill(series: Array) -> Array:
    """Give a value to what is missing, at the integer times 0, 1, ... of a series' steps.

    A channel follows the natural cubic spline through its observed values, which it keeps as they
    are. Before the first and after the last of them it stays at that value, because cubics run
    away. A channel that was never observed is zero, the mean of standardized data.

    Args:
        series: (channels, length), NaN where a value is missing.

    Returns:
        The same without NaN, in a new array.

    Raises:
        InputError: If a value is missing and SciPy is not installed.
    """
    filled: Array = series.copy()
    times = np.arange(series.shape[1], dtype=np.float64)
    for channel in filled:
        seen = np.isfinite(channel)
        knots = times[seen]
        if len(knots) < 2:
            channel[~seen] = channel[seen] if len(knots) else 0.0
        elif len(knots) < len(times):
            spline = _natural_spline(knots, channel[seen])
            channel[~seen] = spline(times[~seen].clip(knots[0], knots[-1]))
    return filled


def with_time_and_intensity(series: Array, longest: int) -> NDArray[np.float32]:
    """Make what a network sees of a series of d channels: 2 d + 1 channels at every step.

    These are the time, the cumulative intensity of every channel (how often it was observed up to
    and including this step), and the channels themselves with their gaps filled. Time and intensity
    are divided by the length of the longest series, so that they stay within [0, 1].

    Args:
        series: (d, length), standardized, NaN where a value is missing.
        longest: Steps of the longest series.

    Returns:
        (longest, 2 d + 1), float32; the rows past the series' end are NaN.
    """
    d, length = series.shape
    rows = np.full((longest, 2 * d + 1), np.nan, dtype=np.float32)
    rows[:length, 0] = np.arange(length) / longest
    rows[:length, 1 : d + 1] = np.isfinite(series).cumsum(axis=1).T / longest
    rows[:length, d + 1 :] = fill(series).T
    return rows


def _natural_spline(knots: Array, values: Array) -> Callable[[Array], Array]:
    try:
        from scipy.interpolate import CubicSpline
    except ImportError:
        raise InputError(
            "missing values are interpolated with SciPy; pip install 'ocnopt[experiments]'"
        ) from None
    spline: Callable[[Array], Array] = CubicSpline(knots, values, bc_type="natural")
    return spline
