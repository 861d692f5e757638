"""Figures of training runs, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ocnopt.experiments.files import write_atomically

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers too
_FAINT = "#b8c4cc"


def save_run(path: Path, title: str, losses: Tensor, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one run: loss, accuracy and, where the optimizer keeps them, its diagnostics.

    Args:
        path: The PNG file.
        title: Heading.
        losses: Training loss of every step, (steps,).
        rows: Logged rows, as in metrics.jsonl.
    """
    totals = [(row["step"], row["diagnostics"]) for row in rows if row.get("diagnostics")]
    panels = 4 if totals else 2
    figure = Figure(figsize=(9, 3.2 * panels / 2 + 0.4), layout="constrained")
    axes = list(figure.subplots(panels // 2, 2, sharex=True).flat)
    figure.suptitle(title)
    _draw_losses(axes[0], losses)
    _draw_accuracies(axes[1], rows)
    if totals:
        _draw_decrease(axes[2], totals)
        _draw_shares(axes[3], totals)
    for ax in axes[-2:]:
        ax.set_xlabel("step")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def save_curves(
    path: Path, title: str, panels: Mapping[str, Mapping[str, Sequence[Tensor]]], window: int
) -> None:
    """Draw training-loss curves of several optimizers side by side.

    Args:
        path: The PNG file.
        title: Heading.
        panels: By panel heading, then by optimizer: the losses of each of its runs, (steps,). Every
            run is a thin line, and a cross ends one that diverged.
        window: Steps that every point of a curve is the running mean of.
    """
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    axes = list(figure.subplots(1, len(panels), sharey=True, squeeze=False).flat)
    figure.suptitle(title)
    for ax, (heading, curves) in zip(axes, panels.items(), strict=True):
        for colour, (name, runs) in zip(_COLOURS, curves.items(), strict=False):
            ax.plot([], [], color=colour, label=name)
            for run in runs:
                _draw_curve(ax, run, colour, window)
        ax.set_title(heading)
        ax.set_xlabel("step")
        ax.set_yscale("log")
        ax.grid(True, which="both", alpha=0.2)
        ax.legend()
    axes[0].set_ylabel(f"training loss (mean of {window} steps)")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def running_mean(values: Tensor, window: int) -> Tensor:
    """Mean of each value and those before it, at most `window` in all; keeps the shape (n,)."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)]).double()
    end = torch.arange(1, len(values) + 1)
    start = (end - window).clamp(min=0)
    return (sums[end] - sums[start]) / (end - start)


def _draw_curve(ax: Axes, losses: Tensor, colour: str, window: int) -> None:
    finite = losses[torch.isfinite(losses)]
    smooth = running_mean(finite, window)
    ax.plot(range(1, len(finite) + 1), smooth, color=colour, alpha=0.7, lw=1)
    if 0 < len(finite) < len(losses):
        ax.plot(len(finite), float(smooth[-1]), color=colour, marker="x")


def _draw_losses(ax: Axes, losses: Tensor) -> None:
    finite = losses[torch.isfinite(losses)]
    if len(finite):
        x = range(1, len(finite) + 1)
        window = max(1, min(100, len(finite) // 20))
        ax.plot(x, finite, color=_FAINT, lw=0.5, label="each step")
        ax.plot(x, running_mean(finite, window), color=_COLOURS[0], label=f"mean of {window}")
        ax.set_yscale("log")
        ax.legend()
    ax.set_title("training loss")
    ax.grid(True, alpha=0.2)


def _draw_accuracies(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    points = [
        (row["step"], row["test_accuracy"]) for row in rows if row["test_accuracy"] is not None
    ]
    ax.plot(
        [step for step, _ in points],
        [100 * accuracy for _, accuracy in points],
        color=_COLOURS[2],
        marker="o",
        ms=3,
    )
    ax.set_title("test accuracy (%)")
    ax.grid(True, alpha=0.2)


def _draw_decrease(ax: Axes, totals: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    drew = False
    for colour, key in zip(_COLOURS, ("predicted_decrease", "actual_decrease"), strict=False):
        drew |= _draw_total(ax, totals, key, key.replace("_", " "), colour, scale=1.0)
    ax.set_title("decrease of the loss in a step")
    ax.grid(True, alpha=0.2)
    if drew:
        ax.legend()


def _draw_shares(ax: Axes, totals: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    drew = False
    for colour, (key, name) in zip(
        _COLOURS,
        (("feedback_share", "feedback, of a step"), ("clipped_share", "samples clipped")),
        strict=False,
    ):
        drew |= _draw_total(ax, totals, key, name, colour, scale=100.0)
    ax.set_title("feedback (%)")
    ax.grid(True, alpha=0.2)
    if drew:
        ax.legend()


def _draw_total(
    ax: Axes,
    totals: Sequence[tuple[int, Mapping[str, Any]]],
    key: str,
    name: str,
    colour: str,
    scale: float,
) -> bool:
    points = [(step, total[key]) for step, total in totals if total.get(key) is not None]
    if points:
        x = [step for step, _ in points]
        ax.plot(x, [scale * value for _, value in points], color=colour, label=name)
    return bool(points)
