"""Accuracy against time and against epochs, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.sensitivity import MOST, STYLES
from ocnopt.experiments.files import write_atomically

__all__ = ["Lane", "save_race"]

_TARGET = "#555555"


@dataclass(frozen=True)
class Lane:
    """One method's runs. Those that diverged are shorter than the others.

    Attributes:
        name: What it is called.
        epochs: Epochs of the evaluations, by seed; the same for all.
        seconds: Seconds of training until each, by seed.
        accuracy: In %, by seed.
    """

    name: str
    epochs: Sequence[Sequence[float]]
    seconds: Sequence[Sequence[float]]
    accuracy: Sequence[Sequence[float]]


def save_race(
    path: Path, title: str, lanes: Sequence[Lane], targets: Mapping[str, float], clock: str
) -> None:
    """Draw accuracy against seconds on the left and against epochs on the right.

    A line is the mean over the seeds that have got so far, at the mean of their times; the band
    about it is their least and greatest value, and a cross ends a run that diverged. The accuracy
    begins below the least target, and below what any method comes to.

    Args:
        path: The PNG file.
        title: Heading.
        lanes: The methods, up to eight.
        targets: Accuracies in % by name; each is a line across.
        clock: What the seconds are.

    Raises:
        InputError: Too many methods, or runs whose parts are not of the same length.
    """
    if len(lanes) > MOST:
        raise InputError(f"a figure shows up to {MOST} methods, not {len(lanes)}")
    for lane in lanes:
        _require_lane(lane)
    figure = Figure(figsize=(10, 4.9), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, lane in enumerate(lanes):
        _draw(left, lane, lane.seconds, number)
        _draw(right, lane, lane.epochs, number)
    for ax, label in ((left, f"{clock} of training"), (right, "epochs")):
        for accuracy in targets.values():
            ax.axhline(accuracy, color=_TARGET, lw=0.8, ls=(0, (2, 2)), zorder=1)
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
        ax.grid(True, alpha=0.25)
    left.set_ylabel("test accuracy (%)")
    left.set_ylim(*_range(lanes, list(targets.values())))
    _name_targets(right, targets)
    if lanes:
        left.legend(loc="lower right", handlelength=3.5)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _draw(ax: Axes, lane: Lane, times: Sequence[Sequence[float]], number: int) -> None:
    colour, dashes, marker = STYLES[number]
    longest = max(map(len, lane.accuracy), default=0)
    at, means, low, high = [], [], [], []
    for i in range(longest):
        seen = [run[i] for run in lane.accuracy if i < len(run)]
        at.append(fmean(run[i] for run in times if i < len(run)))
        means.append(fmean(seen))
        low.append(min(seen))
        high.append(max(seen))
    ax.fill_between(at, low, high, color=colour, alpha=0.16, lw=0)
    every = max(1, longest // 10)
    ax.plot(
        at,
        means,
        color=colour,
        ls=dashes,
        lw=1.7,
        marker=marker,
        ms=4,
        markevery=(number % every, every),
        label=lane.name,
        zorder=2,
    )
    for run, when in zip(lane.accuracy, times, strict=True):
        if run and len(run) < longest:
            ax.plot(when[-1], run[-1], color=colour, marker="x", ms=8, mew=1.8, zorder=3)


def _range(lanes: Sequence[Lane], targets: Sequence[float]) -> tuple[float, float]:
    """Targets and ends in view; what lies far below, as the beginnings do, is cut off."""
    seen = [value for lane in lanes for run in lane.accuracy for value in run]
    top = max([*seen, *targets], default=100.0)
    ends = [fmean(run[-1] for run in lane.accuracy if run) for lane in lanes if any(lane.accuracy)]
    bottom = min(seen, default=0.0)
    if targets:
        bottom = max(bottom, min([*ends, 2 * min(targets) - max(targets)]))
        bottom = min(bottom, min(targets) - 0.5 * (max(targets) - min(targets)) - 1)
    pad = 0.04 * max(top - bottom, 1.0)
    return max(bottom - pad, -pad), top + pad


def _name_targets(ax: Axes, targets: Mapping[str, float]) -> None:
    """Names beside the lines, moved up where they would cover each other."""
    low, high = ax.get_ylim()
    above = -math.inf
    for name, accuracy in sorted(targets.items(), key=lambda item: item[1]):
        above = max(accuracy, above + 0.045 * (high - low))
        ax.annotate(
            name,
            (1.0, above),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=_TARGET,
            va="center",
            annotation_clip=False,
        )


def _require_lane(lane: Lane) -> None:
    parts = (lane.epochs, lane.seconds, lane.accuracy)
    if len({tuple(map(len, part)) for part in parts}) > 1:
        raise InputError(f"{lane.name}: epochs, seconds and accuracies are not of the same runs")
