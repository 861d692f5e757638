"""What a person at a terminal sees of a comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ocnopt.experiments.compare.comparison import Comparison
from ocnopt.experiments.compare.table import COLUMNS, table_rows
from ocnopt.experiments.compare.words import remarks, verdict

__all__ = ["print_comparison"]

_HEADS = {
    "test accuracy %": "test\naccuracy %",
    "training loss": "training\nloss",
    "diverged in sweep, final": "diverged in\nsweep, final",
    "ms/step (x first)": "ms/step\n(x first)",
}
#: In narrow columns: spaces of headings, but for the one within brackets.
_BREAKABLE = re.compile(r"(?<!\(x) ")
_BREAKS = re.compile(r" (?=±|to|\(|\d+/)")


def print_comparison(
    console: Console, comparison: Comparison, folder: Path, files: Sequence[str]
) -> None:
    """Print the table, what was seen, what to beware of, and where the files are.

    Args:
        console: Where to.
        comparison: What it came to.
        folder: Where the files are.
        files: Their names.
    """
    console.print(_table(table_rows(comparison), console.width), highlight=False, markup=False)
    console.print(verdict(comparison), highlight=False, markup=False)
    for remark in remarks(comparison):
        console.print(f"- {remark}", highlight=False, markup=False)
    console.print(
        f"written: {', '.join(files)} in {folder}", highlight=False, markup=False, soft_wrap=True
    )


def _table(rows: Sequence[Sequence[str]], width: int) -> Table:
    """The table; where the terminal is narrow, lines break at words, and never within a number."""
    heads = [_HEADS.get(column, column) for column in COLUMNS]
    gap = 2
    if _width([heads, *rows]) + gap * len(heads) > width:
        rows = [[row[0], *(_BREAKS.sub("\n", cell) for cell in row[1:])] for row in rows]
        heads, gap = [_BREAKABLE.sub("\n", head) for head in heads], 1
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for number, head in enumerate(heads):
        side: Literal["right", "left"] = "right" if number else "left"
        table.add_column(head, justify=side, overflow="fold", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    return table


def _width(rows: Sequence[Sequence[str]]) -> int:
    columns = zip(*rows, strict=True)
    return sum(max(len(line) for text in c for line in text.split("\n")) for c in columns)
