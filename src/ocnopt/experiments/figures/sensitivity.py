"""Optimizers over learning rates, and training curves over seeds (the form of Fig. 4b)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_atomically

__all__ = ["MOST", "STYLES", "Course", "Sweep", "Training", "save_sensitivity", "save_training"]

#: Colour, dashes and marker of each method.
# Colours told apart by colour-blind readers (Okabe and Ito, with grey for their yellow, which
# vanishes on white); dashes and markers that tell the lines apart in print without colour.
STYLES: tuple[tuple[str, str | tuple[int, tuple[float, ...]], str], ...] = (
    ("#009e73", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#cc79a7", ":", "D"),
    ("#e69f00", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
    ("#56b4e9", (0, (9, 2)), "P"),
    ("#000000", (0, (3, 1)), "X"),
    ("#999999", (0, (1, 3)), "<"),
)
#: As many methods can be told apart.
MOST = len(STYLES)


@dataclass(frozen=True)
class Sweep:
    """One method over learning rates.

    Attributes:
        name: What it is called.
        learning_rates: Ascending, all above zero.
        accuracy: At each learning rate, of every seed, in %; not finite where a run failed.
        loss: Training loss, likewise; above zero.
        workable: Least and greatest learning rate at which it works; None where it never does.
    """

    name: str
    learning_rates: Sequence[float]
    accuracy: Sequence[Sequence[float]]
    loss: Sequence[Sequence[float]]
    workable: tuple[float, float] | None = None


@dataclass(frozen=True)
class Course:
    """One method's training.

    Attributes:
        name: What it is called.
        iterations: Where loss and accuracy were taken, ascending.
        loss: Training loss of every seed at these iterations; a run that failed is shorter.
        accuracy: In %, likewise.
    """

    name: str
    iterations: Sequence[float]
    loss: Sequence[Sequence[float]]
    accuracy: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Training:
    """One panel of training curves.

    Attributes:
        title: The configuration.
        courses: The methods.
    """

    title: str
    courses: Sequence[Course]


def save_sensitivity(path: Path, title: str, methods: Sequence[Sweep]) -> None:
    """Draw accuracy and training loss against the learning rate.

    A line is the mean over the seeds whose run did not fail, the band about it their least and
    greatest value. Below the accuracy every method has a bar for its workable range and a cross
    at learning rates where runs failed: faint where some did, full where all did.

    Args:
        path: The PNG file.
        title: Heading.
        methods: One to eight methods.

    Raises:
        InputError: Too many methods or none, or values that do not fit the learning rates.
    """
    _require_count(len(methods))
    for sweep in methods:
        _require_sweep(sweep)
    strip = 0.4 + 0.24 * len(methods)
    figure = Figure(figsize=(10, 4.1 + strip), layout="constrained")
    figure.suptitle(title)
    # Halves with layouts of their own: the strip lies close under the accuracy.
    one, other = figure.subfigures(1, 2, squeeze=False)[0]
    top, below = one.subplots(2, 1, height_ratios=(3.3, strip), sharex=True)
    right, corner = other.subplots(2, 1, height_ratios=(3.3, strip))
    for sweep, (colour, dashes, marker) in zip(methods, STYLES, strict=False):
        for ax, values in ((top, sweep.accuracy), (right, sweep.loss)):
            _draw_band(ax, sweep.learning_rates, values, colour)
            means = [_mean(seeds) for seeds in values]
            ax.plot(
                sweep.learning_rates, means, color=colour, ls=dashes, lw=1.6, marker=marker, ms=4
            )
    _draw_strip(below, methods)
    rates = [rate for sweep in methods for rate in sweep.learning_rates]
    for ax in (top, right):
        ax.set_xscale("log")
        ax.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
        ax.grid(True, alpha=0.25)
    top.set_ylabel("accuracy (%)")
    right.set_ylabel("training loss")
    right.set_yscale("log")
    right.set_xlabel("learning rate")
    below.set_xlabel("learning rate")
    corner.set_axis_off()
    corner.legend(
        handles=[
            Line2D([], [], color=c, ls=d, lw=1.6, marker=m, ms=4, label=sweep.name)
            for sweep, (c, d, m) in zip(methods, STYLES, strict=False)
        ],
        loc="center left",
        frameon=False,
        handlelength=4,
        fontsize="small" if len(methods) > 4 else None,
    )
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def save_training(path: Path, title: str, panels: Sequence[Training]) -> None:
    """Draw training loss above and accuracy below, a column per configuration.

    A line is the mean over the seeds that have got so far, the band about it their standard
    deviation; a cross ends the line of a run that failed.

    Args:
        path: The PNG file.
        title: Heading.
        panels: The configurations.

    Raises:
        InputError: No panel, too many methods or none, or a run longer than its iterations.
    """
    if not panels:
        raise InputError("there is nothing to draw: no configuration was given")
    for panel in panels:
        _require_count(len(panel.courses))
        for course in panel.courses:
            _require_course(course)
    figure = Figure(figsize=(4.4 * len(panels) + 0.5, 5.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for (upper, lower), panel in zip(axes.T, panels, strict=True):
        for number, course in enumerate(panel.courses):
            _draw_course(upper, course, course.loss, number)
            _draw_course(lower, course, course.accuracy, number)
        upper.set_title(panel.title, fontsize="medium")
        upper.legend(frameon=False, handlelength=3)
        lower.set_xlabel("iterations")
        for ax in (upper, lower):
            ax.grid(True, alpha=0.25)
    axes[0][0].set_ylabel("training loss")
    axes[1][0].set_ylabel("accuracy (%)")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


# drawing


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN, which leaves a gap, where there are none."""
    return fmean(_finite(values)) if _finite(values) else math.nan


def _draw_band(
    ax: Axes, rates: Sequence[float], values: Sequence[Sequence[float]], colour: str
) -> None:
    low = [min(_finite(seeds), default=math.nan) for seeds in values]
    high = [max(_finite(seeds), default=math.nan) for seeds in values]
    ax.fill_between(list(rates), low, high, color=colour, alpha=0.15, lw=0)


def _draw_strip(ax: Axes, methods: Sequence[Sweep]) -> None:
    """Workable ranges and failures, a row per method."""
    for row, (sweep, style) in enumerate(zip(methods, STYLES, strict=False)):
        if sweep.workable is not None:
            low, high = sweep.workable
            ax.plot([low, high], [row, row], color=style[0], lw=6, solid_capstyle="butt", alpha=0.8)
            # A range of a single learning rate would be a bar of no length.
            ax.plot([low, high], [row, row], color=style[0], ls="", marker="|", ms=9, mew=2)
        for rate, losses, accuracies in zip(
            sweep.learning_rates, sweep.loss, sweep.accuracy, strict=True
        ):
            pairs = list(zip(losses, accuracies, strict=True))
            failed = sum(not (math.isfinite(a) and math.isfinite(b)) for a, b in pairs)
            if failed:
                share = 1.0 if failed == len(pairs) else 0.45
                ax.plot(rate, row, color="#b00000", alpha=share, marker="x", ms=6, mew=1.6)
    ax.set_yticks([])  # the legend beside it names the rows, in the same order
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.grid(True, axis="x", alpha=0.25)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.set_title("workable learning rates (bar), failed runs (cross)", fontsize="small")


def _draw_course(ax: Axes, course: Course, runs: Sequence[Sequence[float]], number: int) -> None:
    colour, dashes, _ = STYLES[number]
    means, low, high = [], [], []
    for i in range(len(course.iterations)):
        seen = _finite([run[i] for run in runs if i < len(run)])
        mean = fmean(seen) if seen else math.nan
        spread = pstdev(seen) if seen else math.nan
        means.append(mean)
        low.append(mean - spread)
        high.append(mean + spread)
    ax.fill_between(list(course.iterations), low, high, color=colour, alpha=0.18, lw=0)
    ax.plot(course.iterations, means, color=colour, ls=dashes, lw=1.5, label=course.name)
    for run in runs:
        end = next((i for i, value in enumerate(run) if not math.isfinite(value)), len(run))
        if 0 < end < len(course.iterations):
            at = course.iterations[end - 1]
            ax.plot(at, run[end - 1], color=colour, marker="x", ms=7, mew=1.6)


# what can be drawn


def _require_count(number: int) -> None:
    if not 1 <= number <= MOST:
        raise InputError(f"a figure shows 1 to {MOST} methods, not {number}")


def _require_sweep(sweep: Sweep) -> None:
    rates = list(sweep.learning_rates)
    if not rates or min(rates) <= 0 or sorted(rates) != rates:
        raise InputError(f"{sweep.name}: learning rates must be above zero and ascending")
    for what, values in (("accuracy", sweep.accuracy), ("loss", sweep.loss)):
        if len(values) != len(rates):
            raise InputError(
                f"{sweep.name}: {what} has {len(values)} entries for {len(rates)} learning rates"
            )
    if [len(seeds) for seeds in sweep.accuracy] != [len(seeds) for seeds in sweep.loss]:
        raise InputError(f"{sweep.name}: accuracy and loss are of different numbers of seeds")


def _require_course(course: Course) -> None:
    longest = max((len(run) for run in (*course.loss, *course.accuracy)), default=0)
    if not longest or longest > len(course.iterations):
        raise InputError(
            f"{course.name}: runs of at most {longest} values, at {len(course.iterations)} "
            "iterations; there must be some, and no more values than iterations"
        )
