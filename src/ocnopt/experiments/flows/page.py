"""The tables and the page of flows on densities in the plane, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ocnopt.experiments.flows.contest import SECONDS, STEPS, Contest, Entry, score
from ocnopt.experiments.flows.run import FlowRun
from ocnopt.experiments.flows.training import SIZES
from ocnopt.experiments.flows.words import (
    HEADLINE,
    losses,
    relative,
    remarks,
    sentence,
    target_text,
)
from ocnopt.experiments.race.analysis import median_ratio
from ocnopt.experiments.race.words import number
from ocnopt.experiments.reproduce.report import Settings, markdown_table

__all__ = ["markdown_page", "short_table"]

CLAIM = (
    "on nine data sets, three densities among them (Circle, gas, miniboone), SNOpt converges much"
    " faster against the wall clock than the first-order methods. Its figures for the densities are"
    " not at hand."
)


def short_table(
    contests: Sequence[Contest], truths: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table that fits a terminal.

    Args:
        contests: One per density.
        truths: The true density's loss, by density.
    """
    columns, rows = _table(contests, truths)
    return [columns[i] for i in _SHORT], [[row[i] for i in _SHORT] for row in rows]


#: Columns that fit a terminal.
_SHORT = (0, 1, 2, 4, 7)


def _table(
    contests: Sequence[Contest], truths: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    base = contests[0].baseline.label
    columns = [
        *("density", "method", "lr", "test loss (nats)", "excess"),
        *("CPU seconds per step", "evaluations per step"),
        f"CPU seconds to {target_text(HEADLINE, base)}",
    ]
    rows = []
    for contest in contests:
        for entry in contest.entries:
            target = contest.targets.get(HEADLINE)
            truth = truths[contest.density]
            ratio = median_ratio(entry.per_step, contest.baseline.per_step)
            rows.append(
                [
                    contest.density,
                    entry.label,
                    "-" if entry.lr is None else f"{entry.lr:g}",
                    losses(entry.finals, len(entry.results)),
                    losses([nll - truth for nll in entry.finals], len(entry.results)),
                    relative(entry.per_step, ratio),
                    relative(entry.evaluations, None),
                    "-" if target is None else _reached(contest, entry, target, SECONDS),
                ]
            )
    return columns, rows


def _reached(contest: Contest, entry: Entry, target: float, kind: str) -> str:
    """Median, ratio, and on how many seeds the target was never reached."""
    times = entry.to(target, kind)
    never = sum(not math.isfinite(time) for time in times)
    if not times:
        return "-"
    text = relative(times, contest.ratio(entry, target, kind))
    if not never:
        return text
    missed = f"never on {never} of {len(times)}"
    return f"{text}, {missed}" if math.isfinite(statistics.median(times)) else missed


def markdown_page(
    settings: Settings,
    contests: Sequence[Contest],
    truths: Mapping[str, float],
    base: FlowRun,
    seeds: int,
) -> str:
    """Lay the results out as a page.

    Args:
        settings: How it was run; names its picture.
        contests: One per density.
        truths: The true density's loss, by density.
        base: What all runs share.
        seeds: Final runs of each method.
    """
    lines = [
        "# Continuous flows in the plane",
        "",
        _setting(settings, base, seeds),
        "",
        f"**The paper says:** {CLAIM}",
        "",
        f"**Here:** {sentence(contests)}",
        "",
        markdown_table(*_table(contests, truths)),
        "",
        "Means ± standard deviations over seeds; medians of seconds and evaluations, and in"
        f" brackets their ratio to {contests[0].baseline.label}'s. *Excess*: above the loss of the"
        " true density on the same points, "
        + ", ".join(f"{truth:.3f} ({name})" for name, truth in truths.items())
        + ".",
        "",
        *remarks(contests),
        f"![Samples, learned densities, losses against seconds and steps]({settings.name}.png)",
        "",
        "Learned densities are those of seed 0; the line is the mean over seeds, the band their"
        " least and greatest value.",
        "",
    ]
    for contest in contests:
        lines += [f"## {contest.density}", "", *_tables(contest)]
    return "\n".join([*lines, *_unseen(contests), *_rules(contests)])


def _setting(settings: Settings, base: FlowRun, seeds: int) -> str:
    net = base.network
    train, validation, test = SIZES
    return (
        f"Written by `{settings.command}`. Field: {net.layers} `ConcatSquashLinear` layers of width"
        f" {net.hidden}, {net.activation}; one `ContinuousFlow` over [0, 1] with exact divergence,"
        f" dopri5 at rtol = atol = {net.rtol:g}, gradients by the adjoint. {train:,} points for"
        f" training, {validation:,} for validation, {test:,} for the test; batches of"
        f" {base.batch_size}, {base.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}."
    )


def _tables(contest: Contest) -> list[str]:
    base = contest.baseline.label
    lines: list[str] = []
    if contest.targets:
        columns = ["", *(f"+ {m:g}: {t:.3f}" for m, t in contest.targets.items())]
        for kind, name in ((SECONDS, "CPU seconds"), (STEPS, "Steps")):
            rows = [
                [e.label, *(_reached(contest, e, t, kind) for t in contest.targets.values())]
                for e in contest.entries
            ]
            lines += [
                f"{name} until the first evaluation at or below {base}'s final mean test loss plus"
                f" a margin, median over seeds, and in brackets relative to {base}'s:",
                "",
                markdown_table(columns, rows),
                "",
            ]
    for kind, name, marks in (
        (STEPS, "after as many steps", contest.steps),
        (SECONDS, "after as many CPU seconds", contest.seconds),
    ):
        rows = [
            [e.label, *(losses(e.at(mark, kind), len(e.results)) for mark in marks)]
            for e in contest.entries
        ]
        unit = "" if kind == STEPS else " s"
        lines += [
            f"Test loss {name}:",
            "",
            markdown_table(["", *(f"{number(mark)}{unit}" for mark in marks)], rows),
            "",
        ]
    rows = [
        [e.label, *(f"{run.lr:g}: {_trial(result)}" for run, result in e.trials)]
        for e in contest.entries
    ]
    count = len(contest.entries[0].trials)
    return [
        *lines,
        "Tuning: validation loss at the end, by learning rate:",
        "",
        markdown_table(["", *([" "] * count)], rows),
        "",
    ]


def _trial(result: Mapping[str, object]) -> str:
    end = score(result)
    return f"{end:.3f}" if math.isfinite(end) else f"diverged at step {result['diverged_step']}"


def _unseen(contests: Sequence[Contest]) -> list[str]:
    """The part of the gradient that Kronecker factors do not see, in the networks at the end."""
    names: list[str] = []
    rows = []
    for contest in contests:
        for entry in contest.entries:
            found = next((r["unseen"] for r in entry.results[:1]), None) or []
            layers = [layer for layer in found if layer["layer"].endswith("linear")]
            if layers:
                names = [f"layer {i + 1}" for i in range(len(layers))]
                cells = [f"{layer['share']:.2f} ({layer['cosine']:.2f})" for layer in layers]
                rows.append([contest.density, entry.label, *cells])
    if not rows:
        return []
    return [
        "## What the factors do not see",
        "",
        "A sample's gradient by a layer's weight is ∫ z ⊗ g dt, of which SNOpt's factors are made,"
        " and a rest: the divergence holds the weight directly, as a factor of dF/dx. The norm of"
        " the rest relative to the whole gradient's (root mean squares over test points), and in"
        " brackets the cosine between ∫ z ⊗ g dt and the whole, for the weights that act on the"
        " state, at the end of seed 0's run:",
        "",
        markdown_table(["density", "method", *names], rows),
        "",
        "Gradients are whole, for all methods. The rest is missing where SNOpt takes its eigenbasis"
        " and the eigenvalues that it starts from; the correction of the eigenvalues is by whole"
        " gradients.",
        "",
    ]


def _rules(contests: Sequence[Contest]) -> list[str]:
    methods = [entry.method for entry in contests[0].entries]
    fixed = [
        f"{m.label} with {', '.join(f'{k} {v:g}' for k, v in m.options.items())}"
        for m in methods
        if m.options
    ]
    return [
        "## Rules",
        "",
        f"- Every method is tried at {len(methods[0].lrs)} learning rates with one seed and as many"
        " steps as in the final runs; the least loss on the validation points at the end chooses.",
        f"- Fixed: {'; '.join(fixed)}." if fixed else "- Nothing else is fixed.",
        "- A run that the solver cannot finish, or whose loss is not finite, has diverged: it is"
        " never chosen, and a target that it had not reached is never reached.",
        "- Losses are mean negative log-densities, computed with exact divergences at tolerances of"
        " 1e-5, with the clock stopped. Seconds are CPU seconds of the one thread that trains,"
        " SNOpt's looks at the adjoint among them.",
        "",
    ]
