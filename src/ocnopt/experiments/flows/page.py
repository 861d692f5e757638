"""The tables and the page of flows on densities in the plane, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ocnopt.experiments.flows.contest import SECONDS, STEPS, Contest, Entry, score
from ocnopt.experiments.flows.run import FlowRun
from ocnopt.experiments.flows.training import SIZES
from ocnopt.experiments.race.analysis import median_ratio
from ocnopt.experiments.race.words import number
from ocnopt.experiments.reproduce.report import Settings, markdown_table
from ocnopt.experiments.significance import difference
from ocnopt.experiments.verdict import spread

__all__ = ["HEADLINE", "markdown_page", "sentence", "short_table"]

#: The margin that the short table and the sentence name.
HEADLINE = 0.03
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
        f"CPU seconds to {_target(HEADLINE, base)}",
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
                    _losses(entry.finals, len(entry.results)),
                    _losses([nll - truth for nll in entry.finals], len(entry.results)),
                    _relative(entry.per_step, ratio),
                    _relative(entry.evaluations, None),
                    "-" if target is None else _reached(contest, entry, target, SECONDS),
                ]
            )
    return columns, rows


def _target(margin: float, base: str) -> str:
    return f"{base}'s final loss" + (f" + {margin:g}" if margin else "")


def _losses(values: Sequence[float], runs: int) -> str:
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.3f}"
    text += f" ± {spread(values):.3f}" if len(values) > 1 else ""
    return text + (f" ({len(values)} of {runs})" if len(values) < runs else "")


def _relative(values: Sequence[float], ratio: float | None) -> str:
    if not values:
        return "-"
    text = number(statistics.median(values))
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def _reached(contest: Contest, entry: Entry, target: float, kind: str) -> str:
    """Median, ratio, and on how many seeds the target was never reached."""
    times = entry.to(target, kind)
    never = sum(not math.isfinite(time) for time in times)
    if not times:
        return "-"
    text = _relative(times, contest.ratio(entry, target, kind))
    if not never:
        return text
    missed = f"never on {never} of {len(times)}"
    return f"{text}, {missed}" if math.isfinite(statistics.median(times)) else missed


def sentence(contests: Sequence[Contest]) -> str:
    """What was seen, density by density.

    Args:
        contests: One per density.
    """
    return " ".join(_seen(contest) for contest in contests)


def _seen(contest: Contest) -> str:
    base, target = contest.baseline, contest.targets.get(HEADLINE)
    if target is None:
        return f"On {contest.density} {base.label} diverged, so that there are no targets."
    others = contest.entries[1:]
    times = "; ".join(_time(contest, entry, target) for entry in others)
    finals = "; ".join(
        f"{e.label} {_losses(e.finals, len(e.results))}, {_beside(e, base)}" for e in others
    )
    return (
        f"On {contest.density}, to {_target(HEADLINE, base.label)} nats: {times}. Final test loss:"
        f" {finals} ({base.label}: {_losses(base.finals, len(base.results))})."
    )


def _time(contest: Contest, entry: Entry, target: float) -> str:
    base = contest.baseline.label
    times = entry.to(target, SECONDS)
    ratio, steps = (contest.ratio(entry, target, kind) for kind in (SECONDS, STEPS))
    never = sum(not math.isfinite(time) for time in times)
    if never == len(times):
        return f"{entry.label} never got there"
    if ratio is None or steps is None:
        return f"{entry.label} got there on {len(times) - never} of {len(times)} seeds"
    text = f"{entry.label} took {ratio:.2f} times {base}'s CPU seconds, {steps:.2f} times its steps"
    return text + (f" (never on {never} of {len(times)} seeds)" if never else "")


def _beside(entry: Entry, base: Entry) -> str:
    if len(entry.finals) != len(base.finals) or len(base.finals) < 2:
        return "on too few seeds to tell"
    return {
        1: f"above {base.label} beyond the spread",
        0: f"no different from {base.label} beyond the spread",
        -1: f"below {base.label} beyond the spread",
    }[difference(entry.finals, base.finals)]


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
        *_remarks(contests),
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


def _remarks(contests: Sequence[Contest]) -> list[str]:
    found = []
    for contest in contests:
        for entry in contest.entries:
            who = f"- {contest.density}, {entry.label}:"
            if entry.lr is None:
                found.append(f"{who} every candidate diverged.")
            if entry.on_edge:
                found.append(
                    f"{who} its learning rate, {entry.lr:g}, is at the end of those that were"
                    " tried; others may be better."
                )
            steps = [str(r["diverged_step"]) for r in entry.results if r["diverged_step"]]
            if steps:
                found.append(
                    f"{who} {len(steps)} of {len(entry.results)} final runs diverged, at step"
                    f" {', '.join(steps)}; means are those of the others."
                )
    ends = [r["points"][-1] for c in contests for e in c.entries for r in e.sound]
    if ends:
        busiest = max(end["seconds"] / end[SECONDS] for end in ends)
        found.append(
            f"- The wall clock went on for at most {busiest:.2f} times the CPU seconds of a run:"
            " the more, the busier the machine was with other work."
        )
    return [*found, ""] if found else []


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
            [e.label, *(_losses(e.at(mark, kind), len(e.results)) for mark in marks)]
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
