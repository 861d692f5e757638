"""What curves of accuracy against time say; functions of numbers alone.

Between two evaluations nothing is known and nothing is made up: a target is reached at the first
evaluation that is at or above it, never at an interpolated time before, and the accuracy at a
time is that of the last evaluation until then.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ocnopt.experiments.outcome import Outcome

__all__ = ["NEVER", "Curve", "accuracy_at", "area", "curve_of", "median_ratio", "time_to_target"]

#: The time to a target that is not reached.
NEVER = math.inf
#: Accuracies are shares of whole samples, times sums: differences smaller than this are rounding.
_TINY = 1e-9


@dataclass(frozen=True)
class Curve:
    """How far a run had come by when; all of the same length.

    Attributes:
        epochs: Of its evaluations, ascending.
        seconds: Of training until each.
        accuracies: In [0, 1].
    """

    epochs: tuple[float, ...]
    seconds: tuple[float, ...]
    accuracies: tuple[float, ...]


def curve_of(outcome: Outcome, per_epoch: int, *, cpu: bool) -> Curve:
    """The curve of a run whose outcome has a clock.

    Args:
        outcome: The run.
        per_epoch: Steps in an epoch.
        cpu: Whether CPU seconds count, not those of the wall clock.
    """
    return Curve(
        epochs=tuple(step / per_epoch for step, *_ in outcome.clock),
        seconds=tuple(own if cpu else wall for _, own, wall in outcome.clock),
        accuracies=tuple(accuracy for _, accuracy in outcome.accuracies),
    )


def time_to_target(when: Sequence[float], accuracies: Sequence[float], target: float) -> float:
    """When an accuracy is first seen.

    Args:
        when: Times, or epochs, of the evaluations, ascending.
        accuracies: What they showed.
        target: The accuracy.

    Returns:
        The time of the first evaluation at or above the target; :data:`NEVER` where there is none.
    """
    pairs = zip(when, accuracies, strict=True)
    return next((time for time, seen in pairs if seen >= target - _TINY), NEVER)


def accuracy_at(when: Sequence[float], accuracies: Sequence[float], time: float) -> float | None:
    """The accuracy of the last evaluation until a time.

    Args:
        when: Times, or epochs, of the evaluations, ascending.
        accuracies: What they showed.
        time: The time.

    Returns:
        The accuracy; None before the first evaluation and after the last one, where the run has
        nothing to show.
    """
    until = [seen for at, seen in zip(when, accuracies, strict=True) if at <= time + _TINY]
    return until[-1] if until and time <= when[-1] + _TINY else None


def area(when: Sequence[float], accuracies: Sequence[float]) -> float:
    """Mean height of a curve, by the trapezoidal rule; 0 where there is no stretch to it.

    Args:
        when: Ascending.
        accuracies: The heights.
    """
    span = when[-1] - when[0] if when else 0.0
    if not span:
        return 0.0
    points = pairwise(zip(when, accuracies, strict=True))
    return sum((b - a) * (low + high) / 2 for (a, low), (b, high) in points) / span


def median_ratio(own: Sequence[float], other: Sequence[float]) -> float | None:
    """The median of some times relative to that of others.

    Args:
        own: Times by seed, :data:`NEVER` among them.
        other: Likewise.

    Returns:
        The ratio; None where a median is never, zero, or of nothing.
    """
    if not own or not other:
        return None
    top, bottom = statistics.median(own), statistics.median(other)
    return top / bottom if math.isfinite(top) and math.isfinite(bottom) and bottom > 0 else None
