"""A table of accuracies as a picture: a panel per row, a point per run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from ocnopt.experiments.files import write_atomically

__all__ = ["save_accuracies"]

_COLUMNS = 4
_OWN, _OTHER, _PAPER = "#d55e00", "#0072b2", "#555555"


def save_accuracies(
    path: Path,
    title: str,
    rows: Mapping[str, Sequence[tuple[str, Sequence[float], float | None]]],
) -> None:
    """Draw a panel per row of the table.

    Args:
        path: The PNG file.
        title: Heading.
        rows: By row: method, accuracy in % of every seed, and the paper's figure or None. The last
            method is drawn in another colour.
    """
    columns = min(_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.7 * lines + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, (name, methods) in zip(axes, rows.items(), strict=False):
        for i, (method, values, paper) in enumerate(methods):
            height = len(methods) - 1 - i
            colour = _OWN if method == methods[-1][0] else _OTHER
            ax.plot(values, [height] * len(values), "o", color=colour, ms=3, alpha=0.35, mew=0)
            ax.plot(fmean(values), height, "|", color=colour, ms=13, mew=2)
            if paper is not None:
                ax.plot(paper, height, "o", mfc="none", mec=_PAPER, ms=7)
        names = [method for method, _, _ in methods][::-1]
        ax.set_yticks(range(len(methods)), names)
        ax.set_ylim(-0.6, len(methods) - 0.4)
        ax.set_title(name, fontsize=10)
        ax.tick_params(labelsize=8)
        ax.grid(True, alpha=0.2)
    for ax in axes[len(rows) :]:
        ax.remove()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
