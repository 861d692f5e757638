"""The table of a comparison, for the terminal and for the page."""

from __future__ import annotations

from ocnopt.experiments.compare.comparison import Comparison, Entry
from ocnopt.experiments.compare.words import mean_and_spread, range_texts

__all__ = ["COLUMNS", "spread_text", "table_rows"]

COLUMNS = (
    "optimizer",
    "best lr",
    "test accuracy %",
    "training loss",
    "diverged in sweep, final",
    "workable lr",
    "factor",
    "ms/step (x first)",
)


def table_rows(comparison: Comparison) -> list[list[str]]:
    """A row per contender, a cell per column."""
    return [_row(entry) for entry in comparison.entries]


def _row(entry: Entry) -> list[str]:
    ended = entry.finished
    total = sum(map(len, entry.sweep))
    time = "-"
    if entry.time is not None:
        time = f"{entry.time.milliseconds:.3g}"
        if entry.time.ratio is not None:
            time += f" ({entry.time.ratio:.2f})"
    return [
        entry.label,
        "-" if entry.best is None else f"{entry.best:.3g}",
        spread_text([100 * run.test_accuracy for run in ended], ".1f"),
        spread_text([run.train_loss for run in ended if run.train_loss is not None], ".3f"),
        f"{entry.swept_failures}/{total}, {len(entry.final) - len(ended)}/{len(entry.final)}",
        *range_texts(entry.workable),
        time,
    ]


def spread_text(values: list[float], form: str) -> str:
    """Such as `95.6 ± 0.8`; the mean alone where there is one value, a dash where there is none.

    Args:
        values: What to sum up.
        form: Format of both numbers.
    """
    found = mean_and_spread(values)
    if found is None:
        return "-"
    if found[0] >= 1000:  # a loss that exploded
        form = ".3g"
    if len(values) == 1:
        return f"{found[0]:{form}}"
    return f"{found[0]:{form}} ± {found[1]:{form}}"
