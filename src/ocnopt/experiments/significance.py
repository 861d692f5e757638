"""Whether two methods differ beyond their spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ocnopt.experiments.verdict import spread

__all__ = ["difference"]


def difference(own: Sequence[float], other: Sequence[float]) -> int:
    """Compare two methods seed by seed.

    Args:
        own: One value per seed.
        other: The other's, of the same seeds.

    Returns:
        1 or -1 where the mean difference lies above or below zero by more than twice its standard
        error, else 0; always 0 for a single seed.
    """
    gaps = [a - b for a, b in zip(own, other, strict=True)]
    mean = fmean(gaps)
    error = spread(gaps) / math.sqrt(len(gaps))
    if len(gaps) < 2 or abs(mean) <= 2 * error:
        return 0
    return 1 if mean > 0 else -1
