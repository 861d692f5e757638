"""The page of a comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ocnopt.experiments.compare.comparison import FRESH, Comparison, Entry
from ocnopt.experiments.compare.table import COLUMNS, spread_text, table_rows
from ocnopt.experiments.compare.words import points, remarks, verdict
from ocnopt.experiments.outcome import CAP
from ocnopt.experiments.reproduce.report import markdown_table

__all__ = ["markdown_page"]


def markdown_page(comparison: Comparison, pictures: Sequence[str]) -> str:
    """Lay a comparison out as a page.

    Args:
        comparison: What it showed.
        pictures: Names of the pictures beside the page.
    """
    c = comparison
    lines = [f"# Optimizers on {c.base.dataset}", "", _escaped(verdict(c)), ""]
    rows = [[_escaped(cell) for cell in row] for row in table_rows(c)]
    lines += [_right_aligned(markdown_table(COLUMNS, rows)), ""]
    lines += [f"- {_escaped(remark)}" for remark in remarks(c)]
    lines += ["", *_how(c), ""]
    if "sensitivity.png" in pictures:
        lines += [
            "## Over the learning rate",
            "",
            f"Means over the seeds and their range; losses are drawn as at most {CAP:g}.",
            "",
            "![Accuracy and training loss against the learning rate](sensitivity.png)",
            "",
        ]
    if "curves.png" in pictures:
        lines += [
            "## Training at the best learning rate",
            "",
            "Means and standard deviations of the final runs.",
            "",
            "![Training loss and test accuracy over steps](curves.png)",
            "",
        ]
    lines += ["## Every learning rate", ""]
    lines += [
        "Validation accuracy in % and training loss over the last epoch, of the runs that did not"
        " diverge.",
        "",
    ]
    columns = ("optimizer", "lr", "validation accuracy", "training loss", "diverged")
    cells = [row for entry in c.entries for row in _swept(entry)]
    lines += [_right_aligned(markdown_table(columns, cells)), ""]
    return "\n".join(lines)


def _how(c: Comparison) -> list[str]:
    base = c.base
    network = base.network
    if base.widths is not None:
        network += f" of hidden widths {', '.join(map(str, base.widths))}"
    if base.activation is not None:
        network += f" and {base.activation}"
    if base.depth is not None:
        network += f", {base.depth} layer{'s' if base.depth > 1 else ''} per block"
    if base.norm not in (None, "none"):
        network += f", {base.norm} normalization"
    if base.head not in (None, "identity"):
        network += f", {base.head} on the outputs"
    rates = len(c.entries[0].contender.lrs)
    runs = f"{rates} learning rate{'s' if rates > 1 else ''} and {c.seeds} seeds"
    return [
        "## How this was measured",
        "",
        f"Network {network}; batches of {base.batch_size}; {c.steps:,} steps. Every optimizer was"
        f" trained at {runs}, without {100 * base.validation:g} % of the training set, and the"
        f" learning rate with the highest mean accuracy on these {c.validation_samples} samples is"
        f" its best. *Test accuracy* and *training loss* (over the last epoch) are those of"
        f" {c.seeds} fresh seeds ({FRESH} on) at that rate, trained on all {c.training_samples:,}"
        f" training samples and tested on {c.test_samples:,}; neither had a part in the choice."
        " Mean ± standard deviation over the seeds, of the runs that did not diverge: did not come"
        " to a loss, gradient or update that is no number, nor end with a training loss above"
        f" {c.limit:.3g}, twice that of giving every class the same chance.",
        "",
        "*Workable* are the learning rates next to the best, without a gap, at which no run of the"
        f" sweep diverged and the mean validation accuracy is at most {points(c.margin)}"
        " below that of the optimizer's best: the least and the greatest. *Factor* is how"
        " many times the least the greatest is.",
        "",
        "*ms/step* is the wall-clock time of a step on one thread, the optimizers taking turns"
        " when all runs are over; in brackets relative to the first. Medians.",
    ]


def _swept(entry: Entry) -> list[list[str]]:
    rows = []
    for lr, runs in zip(entry.contender.lrs, entry.sweep, strict=True):
        ended = [run for run in runs if not run.failed]
        accuracies = [100 * run.test_accuracy for run in ended]
        losses = [run.train_loss for run in ended if run.train_loss is not None]
        rows.append(
            [
                _escaped(entry.label),
                f"{lr:.4g}",
                spread_text(accuracies, ".1f"),
                spread_text(losses, ".3f"),
                f"{len(runs) - len(ended)}/{len(runs)}",
            ]
        )
    return rows


def _right_aligned(table: str) -> str:
    """The same table with all columns but the first aligned right: they hold numbers."""
    head, rule, *rows = table.split("\n")
    first, *others = rule.strip("| ").split(" | ")
    rule = f"| {' | '.join([first, *(f'{dashes}:' for dashes in others)])} |"
    return "\n".join([head, rule, *rows])


def _escaped(text: str) -> str:
    """What stands in options must not become emphasis, a link or a new cell."""
    for sign in "\\`*_[]|<":
        text = text.replace(sign, f"\\{sign}")
    return text
