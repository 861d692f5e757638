"""Loss curves and the size of every layer's update (the form of Fig. 6 and 10 to 12)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ocnopt.experiments.files import write_atomically

__all__ = ["Runs", "save_vanishing"]

_COLOURS = {  # told apart by colour-blind readers too
    "SGD-VGR": "#0072b2",
    "SGD": "#999999",
    "EKFAC": "#d55e00",
    "Adam": "#e69f00",
    "RMSprop": "#56b4e9",
    "DDPNOpt": "#009e73",
    "DDPNOpt*": "#009e73",
    "DDPNOpt2nd": "#cc79a7",
    "rank one": "#0072b2",
    "no feedback": "#d55e00",
    "no bound": "#009e73",
    "M = I": "#cc79a7",
}
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Runs:
    """The runs of one method.

    Attributes:
        method: The method's name, which decides the colour.
        losses: Of every run, the mean loss of every ``every`` steps; shorter where it failed.
        norms: Of every run, the mean norm of every layer's update, first to last.
    """

    method: str
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


def _styles(methods: Mapping[str, Runs]) -> Iterator[tuple[str, Runs, dict[str, Any]]]:
    """Label, runs and line: a colour for each method, a dash for each of its settings."""
    seen: Counter[str] = Counter()
    for label, runs in methods.items():
        dashes = _DASHES[seen[runs.method] % len(_DASHES)]
        seen[runs.method] += 1
        colour = _COLOURS.get(runs.method, "#000000")
        yield label, runs, {"color": colour, "ls": dashes, "lw": 1.0, "alpha": 0.8}


def _draw_losses(ax: Axes, methods: Mapping[str, Runs], every: int) -> None:
    for _, runs, line in _styles(methods):
        for losses in runs.losses:
            steps = [every * (k + 0.5) for k in range(len(losses))]
            ax.plot(steps, losses, **line)


def _draw_norms(ax: Axes, methods: Mapping[str, Runs]) -> None:
    for label, runs, line in _styles(methods):
        layers = range(1, len(runs.norms[0]) + 1)
        for i, norms in enumerate(runs.norms):
            ax.plot(layers, norms, marker="o", ms=3, label=label if i == 0 else None, **line)
