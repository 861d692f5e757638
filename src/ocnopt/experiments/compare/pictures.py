"""The two pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ocnopt.experiments.compare.comparison import Comparison, Entry
from ocnopt.experiments.figures.sensitivity import (
    Course,
    Sweep,
    Training,
    save_sensitivity,
    save_training,
)
from ocnopt.experiments.outcome import Outcome

__all__ = ["draw"]

#: Points of a course, at most: more than a run's own would be invented.
_POINTS = 50
#: The loss axis is logarithmic; nothing is below this.
_LEAST_LOSS = 1e-8


def draw(comparison: Comparison, folder: Path) -> list[str]:
    """Draw sensitivity.png and, where some run ended, curves.png.

    Args:
        comparison: What to draw.
        folder: Where to; exists.

    Returns:
        The names of the files.
    """
    problem = f"{comparison.base.dataset}, {comparison.base.network}"
    save_sensitivity(
        folder / "sensitivity.png",
        f"{problem}: validation accuracy and training loss over the learning rate,"
        f" {comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}",
        [_sweep(entry) for entry in comparison.entries],
    )
    names = ["sensitivity.png"]
    courses = [_course(entry, comparison.steps) for entry in comparison.entries]
    drawn = [course for course in courses if course is not None]
    if drawn:
        save_training(
            folder / "curves.png",
            "At the best learning rate of each",
            [Training(f"{problem}: training loss, test accuracy", drawn)],
        )
        names.append("curves.png")
    return names


def _sweep(entry: Entry) -> Sweep:
    w = entry.workable

    def loss(run: Outcome) -> float:
        return math.nan if run.failed else max(run.capped_loss, _LEAST_LOSS)

    def accuracy(run: Outcome) -> float:
        return math.nan if run.failed else 100 * run.test_accuracy

    return Sweep(
        name=entry.label,
        learning_rates=entry.contender.lrs,
        accuracy=[[accuracy(run) for run in runs] for runs in entry.sweep],
        loss=[[loss(run) for run in runs] for runs in entry.sweep],
        workable=None if w is None else (w.low, w.high),
    )


def _course(entry: Entry, steps: int) -> Course | None:
    runs = [run for run in entry.final if run.losses and run.accuracies]
    if not runs:
        return None
    every = max(1, math.ceil(steps / _POINTS))
    grid = [*range(every, steps, every), steps]
    return Course(
        name=f"{entry.label}, lr {entry.best:.3g}",
        iterations=grid,
        loss=[_at(grid, run.losses, run) for run in runs],
        accuracy=[[100 * value for value in _at(grid, run.accuracies, run)] for run in runs],
    )


def _at(grid: Sequence[int], points: Sequence[tuple[int, float]], run: Outcome) -> list[float]:
    """A curve's values at common steps, as runs that failed have other ones; up to their end."""
    ends = len(grid) if not run.failed else sum(step <= points[-1][0] for step in grid)
    steps, values = zip(*points, strict=True)
    return [float(value) for value in np.interp(grid[:ends], steps, values)]
