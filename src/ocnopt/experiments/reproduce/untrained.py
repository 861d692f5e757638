"""Beside a race, the same network with its Neural ODE left untrained.

What this run comes to, the optimizer of the Neural ODE has no part in: only what the contenders
have before it is theirs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.race import Race
from ocnopt.experiments.race.analysis import curve_of, time_to_target
from ocnopt.experiments.race.words import number, percent, share_text
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.experiments.significance import difference

__all__ = ["UNTRAINED", "beside_untrained"]

#: A learning rate whose steps are below the last digit of any weight.
UNTRAINED = 1e-30


def beside_untrained(report: Report, race: Race, settings: Settings, watcher: Watcher) -> Report:
    """Run it, as many seeds as the race has, and add it to the race's report.

    Args:
        report: Of the race. Its contenders are tried with several values of `rest_lr`.
        race: Its rules.
        settings: Where runs are kept, and how many there are at once.
        watcher: Told of every run.

    Returns:
        The report with one more section, and a sentence and a row per run more; as it was where the
        baseline diverged, as there are no targets then.

    Raises:
        InputError: A setting cannot be used.
    """
    chosen = [
        row["rest_lr"]
        for row in report.rows
        if row["kind"] == "tuning" and row["chosen"] and row["contender"] == race.baseline
    ]
    if not chosen or not report.facts["targets"]:
        return report
    config = replace(race.final, optimizer="sgd", lr=UNTRAINED, options={"rest_lr": chosen[0]})
    outcomes = run_grid(
        [replace(config, seed=seed) for seed in range(race.seeds)],
        cache=Cache(settings.cache),
        processes=settings.processes,
        watcher=watcher,
    )
    return _added(report, race, chosen[0], outcomes)


def _added(report: Report, race: Race, rest_lr: float, outcomes: Sequence[Outcome]) -> Report:
    base, share = race.baseline, f"{race.headline:g}"
    target = report.facts["targets"][share]
    cpu = race.base.device == "cpu"
    curves = [curve_of(o, report.facts["settings"]["steps_per_epoch"], cpu=cpu) for o in outcomes]
    finals = {
        c.label: [row for row in report.rows if _is(row, "final", c.label)] for c in race.contenders
    }
    lines = [
        [
            label,
            percent([row["test_accuracy"] for row in final if row["diverged_step"] is None]),
            *(_median(row[what][share]) for what in ("seconds_to", "epochs_to")),
        ]
        for label, final in finals.items()
        for row in report.rows
        if _is(row, "summary", label)
    ]
    own = percent([o.test_accuracy for o in outcomes if not o.failed])
    lines.append(
        [
            "untrained",
            own,
            _median([time_to_target(c.seconds, c.accuracies, target) for c in curves]),
            _median([time_to_target(c.epochs, c.accuracies, target) for c in curves]),
        ]
    )
    sentence = (
        f"{report.sentence} With the Neural ODE left untrained, and all else trained as beside"
        f" {base}, final test accuracy is {own} %, {_beside(base, outcomes, finals[base])}."
    )
    section = [
        "## What training the Neural ODE is worth",
        "",
        f"*Untrained* is the network whose Neural ODE keeps its initial weights (SGD at"
        f" {UNTRAINED:g}), as all else is trained at {base}'s choice of rest_lr, {rest_lr:g}. What"
        " the others have before it, training the Neural ODE has brought. Times are medians over"
        f" seeds, to {share_text(race.headline, base)}.",
        "",
        markdown_table(["", "final test accuracy (%)", report.facts["clock"], "epochs"], lines),
        "",
    ]
    rows = [
        {
            "kind": "untrained",
            "seed": outcome.seed,
            "rest_lr": rest_lr,
            "test_accuracy": outcome.test_accuracy,
            "train_loss": outcome.train_loss,
            "diverged_step": outcome.diverged_step,
            "curve": {
                "step": [step for step, *_ in outcome.clock],
                "seconds": list(curve.seconds),
                "test_accuracy": list(curve.accuracies),
            },
        }
        for outcome, curve in zip(outcomes, curves, strict=True)
    ]
    page = report.page.replace(report.sentence, sentence, 1).rstrip()
    return replace(
        report,
        sentence=sentence,
        page="\n".join([page, "", *section]),
        rows=[*report.rows, *rows],
    )


def _is(row: Any, kind: str, label: str) -> bool:
    return bool(row["kind"] == kind and row["contender"] == label)


def _beside(base: str, outcomes: Sequence[Outcome], final: Sequence[Any]) -> str:
    pairs = [
        (own.test_accuracy, row["test_accuracy"])
        for own, row in zip(outcomes, final, strict=True)
        if not own.failed and row["diverged_step"] is None
    ]
    if len(pairs) < 2:
        return "on too few seeds to tell"
    own, other = zip(*pairs, strict=True)
    return {
        1: f"above {base} beyond the spread",
        0: f"no different from {base} beyond the spread",
        -1: f"below {base} beyond the spread",
    }[difference(own, other)]


def _median(times: Sequence[float]) -> str:
    never = sum(not math.isfinite(time) for time in times)
    middle = statistics.median(times)
    reached = [number(middle)] if math.isfinite(middle) else []
    return ", ".join([*reached, *([f"never on {never} of {len(times)}"] if never else [])])
