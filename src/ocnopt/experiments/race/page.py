"""The tables and the page of a race, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ocnopt.experiments.compare.table import spread_text
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.race.plan import Paper
from ocnopt.experiments.race.result import Entry, Result
from ocnopt.experiments.race.tune import Trial, Tuned
from ocnopt.experiments.race.words import number, percent, remarks, sentence, share_text
from ocnopt.experiments.reproduce.report import Settings, markdown_table
from ocnopt.experiments.tuning import TUNING_SEED

__all__ = ["markdown_page", "short_table"]

Table = tuple[list[str], list[list[str]]]


def short_table(result: Result) -> Table:
    """Columns and rows of the table that sums it up."""
    base, share = result.baseline.label, result.race.headline
    columns = ["", "chosen", "test accuracy (%)", "training loss", f"{result.clock} per step"]
    columns += [f"{result.clock} to {share_text(share, base)}"]
    return columns, [_short_row(result, entry) for entry in result.entries]


def _short_row(result: Result, entry: Entry) -> list[str]:
    chosen = entry.tuned.chosen
    target = result.targets.get(result.race.headline)
    return [
        entry.label,
        "-" if chosen is None else entry.tuned.contender.setting(chosen.config),
        percent(entry.accuracies) + _of(len(entry.sound), entry),
        spread_text(entry.losses, ".3f"),
        _relative(entry.per_step, result.ratio_of_steps(entry)),
        "-" if target is None else _reached(result, entry, target),
    ]


def _of(count: int, entry: Entry) -> str:
    """How many of the runs a mean is over, where it is not all."""
    runs = len(entry.outcomes)
    return f" ({count} of {runs})" if count < runs else ""


def _relative(values: Sequence[float], ratio: float | None) -> str:
    if not values:
        return "-"
    text = number(statistics.median(values))
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def _reached(result: Result, entry: Entry, target: float) -> str:
    return _counted(entry.seconds_to(target), result.ratio(entry, target))


def _counted(times: Sequence[float], ratio: float | None) -> str:
    """Median, ratio, and on how many seeds the target was never reached."""
    never = sum(not math.isfinite(time) for time in times)
    if not never:
        return _relative(times, ratio)
    missed = f"never on {never} of {len(times)}"
    reached = math.isfinite(statistics.median(times))
    return f"{_relative(times, ratio)}, {missed}" if reached else missed


def markdown_page(settings: Settings, result: Result) -> str:
    """Lay a race out as a page.

    Args:
        settings: How it was run; names its picture.
        result: What it came to.
    """
    race = result.race
    lines = [f"# {race.title}", "", _setting(settings, result), ""]
    if race.claim:
        lines += [f"**The paper says:** {race.claim}", ""]
    lines += [f"**Here:** {sentence(result)}", "", markdown_table(*short_table(result)), ""]
    base = result.baseline.label
    lines += [
        f"Means ± standard deviations over seeds; medians of times, and in brackets their ratio to"
        f" {base}'s.",
        "",
        *(f"- {text}" for text in (*race.notes, *remarks(result))),
        "",
        f"![Accuracy against {result.clock} and epochs]({settings.name}.png)",
        "",
    ]
    lines += _targets(result)
    lines += _at_equal(result)
    if race.paper is not None:
        lines += _paper(result, race.paper)
    return "\n".join([*lines, *_tuning(result), *_rules(result)])


def _setting(settings: Settings, result: Result) -> str:
    final = result.race.final
    return (
        f"Written by `{settings.command}`. Data: {final.dataset}; network: {final.network}; batches"
        f" of {final.batch_size}; {_length(final)}, an epoch being {result.per_epoch:,} steps."
    )


def _length(config: TrainConfig) -> str:
    """How long a run is, such as `5 epochs`."""
    epochs = [] if config.epochs is None else [_epochs(config.epochs)]
    steps = [] if config.steps is None else [f"{config.steps:,} steps"]
    return ", at most ".join([*epochs, *steps])


def _epochs(count: float) -> str:
    return f"{number(count)} epoch{'' if count == 1 else 's'}"


def _targets(result: Result) -> list[str]:
    base = result.baseline.label
    if not result.targets:
        return []
    columns = ["", *(f"{100 * s:g} %: {100 * t:.1f} %" for s, t in result.targets.items())]

    def table(cell: Callable[[Entry, float], str]) -> str:
        rows = [
            [e.label, *(cell(e, t) if e.outcomes else "-" for t in result.targets.values())]
            for e in result.entries
        ]
        return markdown_table(columns, rows)

    return [
        "## Time to common targets",
        "",
        f"The targets are shares of {base}'s final mean test accuracy. {_start(result.clock)} until"
        f" the first evaluation at or above the target, median over seeds (a seed that never gets"
        f" there counts as infinitely late), and in brackets relative to {base}'s:",
        "",
        table(lambda entry, target: _reached(result, entry, target)),
        "",
        "The same in epochs:",
        "",
        table(
            lambda entry, target: _counted(
                entry.epochs_to(target), result.ratio_of_epochs(entry, target)
            )
        ),
        "",
    ]


def _start(clock: str) -> str:
    return clock[0].upper() + clock[1:]


def _at_equal(result: Result) -> list[str]:
    def table(
        head: str, marks: Sequence[float], seen: Callable[[Entry, float], list[float]]
    ) -> str:
        rows = [
            [e.label, *(percent(v := seen(e, mark)) + _of(len(v), e) for mark in marks)]
            for e in result.entries
        ]
        return markdown_table(["", *(head.format(number(mark)) for mark in marks)], rows)

    if not result.epochs or not result.seconds:
        return []
    return [
        "## Accuracy at equal epochs",
        "",
        "Test accuracy in %, mean ± standard deviation over the seeds that had not diverged:",
        "",
        table("epoch {}", result.epochs, Entry.at_epoch),
        "",
        "## Accuracy at equal time",
        "",
        f"After a quarter, half and all of the {result.clock} of the shortest run, at the last"
        " evaluation until then:",
        "",
        table("{} s", result.seconds, Entry.at_second),
        "",
    ]


def _paper(result: Result, paper: Paper) -> list[str]:
    """Ours, and the paper's figure in brackets."""
    base = result.baseline.label
    rows = []

    def add(name: str, own: Callable[[Entry], str], printed: Mapping[str, str]) -> None:
        cells = [(own(e), printed.get(e.label)) for e in result.entries]
        rows.append([name, *(a if b is None else f"{a} ({b})" for a, b in cells)])

    add(
        "final test accuracy (%)",
        lambda entry: percent(entry.accuracies),
        {label: f"{value:.1f}" for label, value in paper.accuracy.items()},
    )
    for level, printed in paper.seconds.items():
        to = partial(_to_level, result, level / 100)
        ratios = {k: v / printed[base] for k, v in printed.items()} if base in printed else {}
        add(f"seconds to {level:g} %", to, {k: number(v) for k, v in printed.items()})
        add(
            f"relative to {base}",
            partial(to, relative=True),
            {k: f"{v:.2f}" for k, v in ratios.items()},
        )
    return [
        "## Beside the paper's figures",
        "",
        f"Ours, and the paper's in brackets: {paper.source} Seconds are those of two machines"
        f" (ours: {result.clock}); their ratios can be compared.",
        "",
        markdown_table(["", *(e.label for e in result.entries)], rows),
        "",
    ]


def _to_level(result: Result, accuracy: float, entry: Entry, *, relative: bool = False) -> str:
    if not relative:
        return _counted(entry.seconds_to(accuracy), None)
    ratio = result.ratio(entry, accuracy)
    return "-" if ratio is None else f"{ratio:.2f}"


def _tuning(result: Result) -> list[str]:
    race = result.race
    if race.fixed:
        return ["## Tuning", "", "Every contender has one setting: nothing was tuned.", ""]
    tuning = race.tuning
    seeds = ", ".join(str(TUNING_SEED + i) for i in range(race.tuning_seeds))
    return [
        "## Tuning",
        "",
        f"Every contender has {race.contenders[0].candidates} candidates. Each was trained"
        f" ({_length(tuning)}, seed {seeds}) without {100 * race.validation:g} % of the training"
        " set, and the one with the highest accuracy on this share at the end was chosen (a run"
        " that diverges counts as 0; of equals the one with the greater area under the curve of"
        " accuracy over steps; then the first). *Area* is the mean height of this curve.",
        "",
        markdown_table(
            ["", "candidate", "validation accuracy (%)", "area (%)", "diverged", "chosen"],
            [
                _trial(entry.tuned, trial)
                for entry in result.entries
                for trial in entry.tuned.trials
            ],
        ),
        "",
    ]


def _trial(tuned: Tuned, trial: Trial) -> list[str]:
    steps = [str(o.diverged_step) for o in trial.outcomes if o.failed]
    ended = [100 * o.test_accuracy for o in trial.outcomes if not o.failed]
    diverged = f"{len(steps)} of {len(trial.outcomes)}, at step {', '.join(steps)}" if steps else ""
    return [
        tuned.contender.label,
        tuned.contender.setting(trial.config),
        spread_text(ended, ".2f"),
        f"{100 * trial.area:.2f}",
        diverged,
        "yes" if trial is tuned.chosen else "",
    ]


def _rules(result: Result) -> list[str]:
    race = result.race
    last = race.seeds - 1
    every = _epochs(race.evaluate_every)
    if race.base.device == "cpu":
        clock = (
            "Time is that of training alone, without evaluations, in CPU seconds of the one core"
            " that a run has: what else the machine does, other runs included, does not count as"
            " wall-clock time would, though it may slow the memory down that all share. Contenders"
            " take turns, seed by seed."
        )
    else:
        clock = (
            "Time is that of training alone, without evaluations, in wall-clock seconds, as CPU"
            " seconds say nothing of a GPU. Contenders take turns, seed by seed."
        )
    return [
        "## How this was measured",
        "",
        f"Every contender's chosen setting was trained on the whole training set, "
        f"{_final_seeds(last)}: the same initial weights and batches for all. The test set was"
        f" evaluated before the first step, then every {every}, and at the end; it had no part in"
        " the choice of a setting. Between evaluations nothing is interpolated: a target counts as"
        " reached at the first evaluation at or above it, and times to targets are therefore known"
        f" to within {every}. {clock} Machine: {result.machine}.",
        "",
    ]


def _final_seeds(last: int) -> str:
    return f"seeds 0 to {last}" if last else "seed 0"
