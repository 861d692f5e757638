"""What an optimizer gains over another one, over a grid of settings (Fig. 4a and 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_atomically

__all__ = ["Differences", "save_differences"]

Grid = Sequence[Sequence[float]]

_FAILED = "#e6e6e6"
_CELL = 0.78  # width of a cell in inches


@dataclass(frozen=True)
class Differences:
    """One comparison over a grid: DDPNOpt minus the baseline it shares its settings with.

    Attributes:
        title: What is compared, such as "DDPNOpt vs SGD".
        learning_rates: Of the rows, top to bottom.
        columns: The other setting, left to right: numbers, or names.
        column_label: What that is, such as "value regularization".
        loss: Difference of the training loss, a row per learning rate; not finite where a run
            failed.
        accuracy: Difference of the accuracy in percentage points, likewise.
        notes: A word under each value, likewise; empty where there is nothing to say. None for no
            notes at all. For cells with failed runs: whose they were.
    """

    title: str
    learning_rates: Sequence[float]
    columns: Sequence[float | str]
    column_label: str
    loss: Grid
    accuracy: Grid
    notes: Sequence[Sequence[str]] | None = None


def save_differences(path: Path, panels: Sequence[Differences]) -> None:
    """Draw a row per comparison, training loss on the left and accuracy on the right.

    Blue is an improvement and red a degradation, in either panel: a loss that falls, an accuracy
    that rises. Each panel has limits of its own, the same up and down, so that white is no
    difference. A cell whose value is not finite is grey, with a cross.

    Args:
        path: The PNG file.
        panels: The comparisons; one to four fit a page.

    Raises:
        InputError: No comparison, or a grid that does not fit its rows and columns.
    """
    if not panels:
        raise InputError("there is nothing to draw: no comparison was given")
    for panel in panels:
        _require_grids(panel)
    width = 2 * (1.1 + _CELL * max(len(panel.columns) for panel in panels)) + 0.6
    heights = [0.95 + 0.42 * len(panel.learning_rates) for panel in panels]
    figure = Figure(figsize=(max(width, 6.5), sum(heights) + 0.25), layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False, height_ratios=heights)
    for (left, right), panel in zip(rows, panels, strict=True):
        _draw(left, panel, panel.loss, colormaps["RdBu_r"])
        left.set_title(f"{panel.title}: training loss", fontsize="medium")
        left.set_ylabel("learning rate")
        _draw(right, panel, panel.accuracy, colormaps["RdBu"])
        right.set_title(f"{panel.title}: accuracy (%)", fontsize="medium")
    figure.supxlabel("blue: improvement, red: degradation", fontsize="small", color="#555555")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _require_grids(panel: Differences) -> None:
    rows, columns = len(panel.learning_rates), len(panel.columns)
    if not rows or not columns:
        raise InputError(f"{panel.title}: the grid has {rows} rows and {columns} columns")
    grids: dict[str, Sequence[Sequence[object]]] = {"loss": panel.loss, "accuracy": panel.accuracy}
    if panel.notes is not None:
        grids["notes"] = panel.notes
    for name, grid in grids.items():
        if len(grid) != rows or any(len(line) != columns for line in grid):
            raise InputError(
                f"{panel.title}: {name} must have {rows} rows of {columns} values, one for each "
                "learning rate and column"
            )


def _draw(ax: Axes, panel: Differences, grid: Grid, colours: Colormap) -> None:
    finite = [abs(value) for line in grid for value in line if math.isfinite(value)]
    limit = max(finite, default=0.0) or 1.0
    shown = [[value if math.isfinite(value) else math.nan for value in line] for line in grid]
    colours = colours.with_extremes(bad=_FAILED)
    image = ax.imshow(shown, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            note = panel.notes[row][column] if panel.notes is not None else ""
            _label(ax, row, column, value, note, limit)
    names = [
        value.replace(" ", "\n") if isinstance(value, str) else f"{value:g}"
        for value in panel.columns
    ]
    ax.set_xticks(range(len(panel.columns)), names)
    ax.set_yticks(range(len(panel.learning_rates)), [f"{r:g}" for r in panel.learning_rates])
    ax.set_xlabel(panel.column_label)
    # Grey lines between cells: those near zero are nearly white themselves.
    ax.set_xticks([i - 0.5 for i in range(1, len(panel.columns))], minor=True)
    ax.set_yticks([i - 0.5 for i in range(1, len(panel.learning_rates))], minor=True)
    ax.grid(which="minor", color="#bbbbbb", lw=0.5)
    ax.tick_params(which="both", length=0)
    bar = ax.figure.colorbar(image, ax=ax, ticks=[-limit, 0, limit], fraction=0.05, pad=0.02)
    bar.ax.set_yticklabels([_signed(v, limit) for v in (-limit, 0.0, limit)], fontsize="small")
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _label(ax: Axes, row: int, column: int, value: float, note: str, limit: float) -> None:
    """Print a cell's value, light on dark colours, and the note beneath it."""
    if math.isfinite(value):
        text, colour = _signed(value, limit), "white" if abs(value) > 0.6 * limit else "black"
    else:
        text, colour = "\u00d7", "black"
        ax.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="#bdbdbd", lw=0, hatch="////")
        )
    up = 0.14 if note else 0.0
    size = 9 if math.isfinite(value) else 13
    ax.text(column, row - up, text, ha="center", va="center", color=colour, fontsize=size)
    if note:
        small = min(7.0, _CELL * 72 / (0.6 * len(note)))
        ax.text(column, row + 0.28, note, ha="center", va="center", color=colour, fontsize=small)


def _signed(value: float, limit: float) -> str:
    """Three digits of the largest value and at least one place, as many for all."""
    places = max(1, 2 - math.floor(math.log10(limit)))
    if places > 4 or limit >= 1e4:
        return f"{value:+.1e}" if value else "0"
    text = f"{value:+.{places}f}"
    return text if float(text) else text[1:]  # a zero has no sign
