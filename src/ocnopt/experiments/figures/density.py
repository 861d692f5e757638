"""Densities in the plane that were learned, beside samples of the true ones, and how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.sensitivity import MOST, STYLES
from ocnopt.experiments.files import write_atomically

__all__ = ["Course", "Panel", "save_densities"]

_TARGET = "#555555"
#: Least excess loss that is shown.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Course:
    """One method's runs on one density. Those that diverged are shorter than the others.

    Attributes:
        name: What it is called.
        steps: Steps of the evaluations, by seed.
        seconds: Seconds of training until each, by seed.
        excess: Nats above the true density's loss, by seed.
        log_density: Of one run, on a square grid, row by row from below; None where it diverged.
    """

    name: str
    steps: Sequence[Sequence[float]]
    seconds: Sequence[Sequence[float]]
    excess: Sequence[Sequence[float]]
    log_density: Sequence[float] | None


@dataclass(frozen=True)
class Panel:
    """One density.

    Attributes:
        name: Its name.
        points: Samples (n, 2).
        courses: What was learned.
        targets: Excess losses by name; each is a line across.
    """

    name: str
    points: NDArray[np.float32]
    courses: Sequence[Course]
    targets: Mapping[str, float]


def save_densities(
    path: Path, title: str, panels: Sequence[Panel], side: float, clock: str
) -> None:
    """Draw samples and learned densities above, losses against time and steps below.

    A line is the mean over seeds, at the mean of their times; the band about it is their least and
    greatest value. A cross ends a run that diverged. All densities of a row share their colours.

    Args:
        path: The PNG file.
        title: Heading.
        panels: The densities, all with the same methods.
        side: Half the length of the squares' sides.
        clock: What the seconds are.

    Raises:
        InputError: Too many methods, or a grid that is not square.
    """
    many = max(len(panel.courses) for panel in panels)
    if many > MOST:
        raise InputError(f"a figure shows up to {MOST} methods, not {many}")
    rows = len(panels)
    height = 10 / (1 + many)
    figure = Figure(figsize=(10, 0.5 + rows * (height + 3.0)), layout="constrained")
    figure.suptitle(title)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=(height, 3.0))
    _draw_images(parts[0, 0], panels, many, side)
    _draw_courses(parts[1, 0], panels, clock)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _draw_images(figure: SubFigure, panels: Sequence[Panel], many: int, side: float) -> None:
    axes = figure.subplots(len(panels), 1 + many, squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        for ax in row:
            ax.set(xticks=[], yticks=[], xlim=(-side, side), ylim=(-side, side), aspect="equal")
        row[0].scatter(*panel.points.T, s=0.4, color="#222222", lw=0)
        row[0].set_title(f"{panel.name}: samples", fontsize=10)
        meshes = [_square(course) for course in panel.courses]
        top = max((float(mesh.max()) for mesh in meshes if mesh is not None), default=1.0)
        for ax, course, mesh in zip(row[1:], panel.courses, meshes, strict=False):
            ax.set_title(course.name, fontsize=10)
            if mesh is None:
                ax.text(0, 0, "diverged", ha="center", va="center")
                continue
            ax.imshow(
                mesh,
                origin="lower",
                extent=(-side, side, -side, side),
                cmap="magma",
                vmin=0.0,
                vmax=top,
                interpolation="bilinear",
            )


def _square(course: Course) -> NDArray[np.float64] | None:
    """The density itself, row by row."""
    if course.log_density is None:
        return None
    values: NDArray[np.float64] = np.exp(np.array(course.log_density, dtype=np.float64))
    length = round(len(values) ** 0.5)
    if length**2 != len(values):
        raise InputError(f"{course.name}: {len(values)} points are no square grid")
    return values.reshape(length, length)


def _draw_courses(figure: SubFigure, panels: Sequence[Panel], clock: str) -> None:
    axes = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    for i, ((left, right), panel) in enumerate(zip(axes, panels, strict=True)):
        for number, course in enumerate(panel.courses):
            _draw(left, course, course.seconds, number)
            _draw(right, course, course.steps, number)
        for ax, label in ((left, f"{clock} of training"), (right, "steps")):
            for excess in panel.targets.values():
                ax.axhline(excess, color=_TARGET, lw=0.8, ls=(0, (2, 2)), zorder=1)
            ax.set(yscale="log", title=panel.name)
            ax.set_xlim(left=0)
            ax.grid(True, alpha=0.25)
            if i == len(panels) - 1:
                ax.set_xlabel(label)
        left.set_ylabel("excess loss (nats)")
        _name_targets(right, panel.targets)
    axes[0][0].legend(loc="upper right", handlelength=3.5)


def _name_targets(ax: Axes, targets: Mapping[str, float]) -> None:
    """Names beside the lines, moved up where they would cover each other."""
    above = -math.inf
    for name, excess in sorted(targets.items(), key=lambda item: item[1]):
        _, height = ax.transAxes.inverted().transform(ax.transData.transform((0.0, excess)))
        above = max(float(height), above + 0.06)
        ax.annotate(
            name,
            (1.0, above),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=_TARGET,
            va="center",
            annotation_clip=False,
        )


def _draw(ax: Axes, course: Course, times: Sequence[Sequence[float]], number: int) -> None:
    colour, dashes, marker = STYLES[number]
    longest = max(map(len, course.excess), default=0)
    at, means, low, high = [], [], [], []
    for i in range(longest):
        seen = [max(run[i], _FLOOR) for run in course.excess if i < len(run)]
        at.append(fmean(run[i] for run in times if i < len(run)))
        means.append(fmean(seen))
        low.append(min(seen))
        high.append(max(seen))
    ax.fill_between(at, low, high, color=colour, alpha=0.16, lw=0)
    ax.plot(
        at,
        means,
        color=colour,
        ls=dashes,
        lw=1.6,
        marker=marker,
        ms=3.5,
        markevery=(number, max(3, longest // 8)),
        label=course.name,
        zorder=2,
    )
    for run, when in zip(course.excess, times, strict=True):
        if run and len(run) < longest:
            ax.plot(when[-1], run[-1], color=colour, marker="x", ms=8, mew=1.8, zorder=3)
