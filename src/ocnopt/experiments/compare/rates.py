"""Which learning rate is best, and which ones work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ocnopt.experiments.outcome import Outcome

__all__ = ["Workable", "best_rate", "workable_range"]

#: Accuracies are shares of whole samples: differences smaller than this are rounding.
_TINY = 1e-9


@dataclass(frozen=True)
class Workable:
    """The learning rates around the best at which accuracy stays within a margin of the best.

    Attributes:
        low: The least.
        high: The greatest.
        open_low: Whether `low` is the sweep's least, so that smaller ones may work as well.
        open_high: Whether `high` is the sweep's greatest.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def factor(self) -> float:
        """How many times the least the greatest is."""
        return self.high / self.low

    @property
    def open(self) -> bool:
        """Whether it touches an end of the sweep: the true range is at least this one."""
        return self.open_low or self.open_high


def best_rate(sweep: Sequence[Sequence[Outcome]]) -> int | None:
    """Choose the learning rate with the highest mean accuracy.

    A run that failed counts as accuracy zero. Among equals the lower training loss decides.

    Args:
        sweep: Outcomes by learning rate, then by seed; none is empty.

    Returns:
        Its place; None where every run failed.
    """
    if all(run.failed for runs in sweep for run in runs):
        return None

    def merit(place: int) -> tuple[float, float]:
        runs = sweep[place]
        accuracy = fmean(0.0 if run.failed else run.test_accuracy for run in runs)
        return round(accuracy, 9), -fmean(run.capped_loss for run in runs)

    return max(range(len(sweep)), key=merit)


def workable_range(
    rates: Sequence[float], sweep: Sequence[Sequence[Outcome]], margin: float
) -> Workable | None:
    """Find the widest run of neighbouring learning rates around the best that work.

    One works where no run failed and the mean accuracy is at most `margin` below that of the best.

    Args:
        rates: The learning rates, ascending.
        sweep: Outcomes by learning rate, then by seed.
        margin: In percentage points.

    Returns:
        The range; None where not even the best rate works, as some of its runs failed.
    """
    best = best_rate(sweep)
    if best is None or any(run.failed for run in sweep[best]):
        return None
    least = _mean_accuracy(sweep[best]) - margin / 100 - _TINY
    works = [
        not any(run.failed for run in runs) and _mean_accuracy(runs) >= least for runs in sweep
    ]
    low = high = best
    while low > 0 and works[low - 1]:
        low -= 1
    while high < len(rates) - 1 and works[high + 1]:
        high += 1
    return Workable(rates[low], rates[high], low == 0, high == len(rates) - 1)


def _mean_accuracy(runs: Sequence[Outcome]) -> float:
    return fmean(run.test_accuracy for run in runs)
