"""Integration time and evaluations of the field over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ocnopt.experiments.files import write_atomically

__all__ = ["save_horizons"]

_COLOURS = {"fixed": "#999999", "first-order": "#d55e00", "feedback": "#0072b2"}


def save_horizons(
    path: Path, title: str, panels: Mapping[str, Mapping[str, Sequence[Sequence[Any]]]]
) -> None:
    """Draw a row per penalty: the time on the left, evaluations per step on the right.

    Args:
        path: The PNG file.
        title: Heading.
        panels: By heading, then by rule: the points of every run, mappings with ``step``, ``time``
            and ``evaluations``.
    """
    figure = Figure(figsize=(9.6, 3.0 * len(panels) + 0.6), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(panels), 2, squeeze=False, sharex=True)
    for axes, (heading, rules) in zip(rows, panels.items(), strict=True):
        for rule, runs in rules.items():
            for i, points in enumerate(runs):
                steps = [p["step"] for p in points]
                for ax, what in zip(axes, ("time", "evaluations"), strict=True):
                    label = rule if i == 0 else None
                    values = [p[what] for p in points]
                    ax.plot(steps, values, color=_COLOURS[rule], lw=1.3, alpha=0.85, label=label)
        axes[0].set(title=heading, ylabel="integration time t1")
        axes[1].set(title=heading, ylabel="evaluations of the field per step")
        axes[0].legend(fontsize=8)
        for ax in axes:
            ax.grid(alpha=0.25)
    for ax in rows[-1]:
        ax.set_xlabel("iteration")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
