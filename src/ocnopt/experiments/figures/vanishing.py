"""Loss curves and the size of every layer's update (the form of Fig. 6 and 10 to 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ocnopt.experiments.files import write_atomically

__all__ = ["Runs", "save_vanishing"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")


@dataclass(frozen=True)
class Runs:
    """The runs of one method.

    Attributes:
        losses: Of every run, the mean loss of every ``every`` steps; shorter where it failed.
        norms: Of every run, the mean norm of every layer's update, first to last.
    """

    losses: Sequence[Sequence[float]]
    norms: Sequence[Sequence[float]]


def save_vanishing(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Runs]],
    plateaus: Mapping[str, float],
    every: int,
) -> None:
    """Draw a row per panel: training loss on the left, update norm per layer on the right.

    Args:
        path: The PNG file.
        title: Heading.
        panels: By heading, then by method.
        plateaus: By panel, the loss of the best constant output.
        every: Steps that a point of a curve is the mean of.
    """
    figure = Figure(figsize=(9.6, 3.1 * len(panels) + 0.5), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), (heading, methods) in zip(rows, panels.items(), strict=True):
        _draw_losses(left, methods, every)
        plateau = plateaus[heading]
        left.axhline(plateau, color="#999999", lw=0.8, ls=":", zorder=0)
        left.set(title=heading, ylabel="training loss", ylim=(0, 1.35 * plateau))
        _draw_norms(right, methods)
        right.set(title="update norm per layer", yscale="log")
        right.legend(fontsize=7, loc="best")
    rows[-1][0].set_xlabel("iteration")
    rows[-1][1].set_xlabel("layer")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _draw_losses(ax: Axes, methods: Mapping[str, Runs], every: int) -> None:
    for colour, (name, runs) in zip(_COLOURS, methods.items(), strict=False):
        for i, losses in enumerate(runs.losses):
            steps = [every * (k + 0.5) for k in range(len(losses))]
            label = name if i == 0 else None
            ax.plot(steps, losses, color=colour, lw=1.0, alpha=0.8, label=label)


def _draw_norms(ax: Axes, methods: Mapping[str, Runs]) -> None:
    for colour, (name, runs) in zip(_COLOURS, methods.items(), strict=False):
        layers = range(1, len(runs.norms[0]) + 1)
        for i, norms in enumerate(runs.norms):
            label = name if i == 0 else None
            ax.plot(layers, norms, color=colour, lw=1.0, marker="o", ms=3, alpha=0.8, label=label)
