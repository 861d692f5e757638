"""Run a race: tune everyone alike, then the choices against the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.compare.stepper import try_step
from ocnopt.experiments.figures.race import Lane, save_race
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.machine import machine
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.race.page import markdown_page, short_table
from ocnopt.experiments.race.plan import Race
from ocnopt.experiments.race.result import Entry, Result
from ocnopt.experiments.race.tune import Tuned, tune
from ocnopt.experiments.race.words import sentence
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher
from ocnopt.experiments.setup import load_data
from ocnopt.experiments.watcher import Part

__all__ = ["run_race"]


def run_race(settings: Settings, race: Race, watcher: Watcher) -> Report:
    """Run a race and draw its picture; what is in the cache is not run again.

    Args:
        settings: Where, with how many seeds (in place of the race's, where given) and processes.
        race: Who runs, and the rules.
        watcher: Told of every run.

    Returns:
        The table, the sentence, the page and all that was measured: a row per candidate of the
        tuning, per final run (with its curve) and per contender.

    Raises:
        InputError: A setting or the data cannot be used.
    """
    race = replace(
        race,
        base=replace(race.base, data_root=settings.data_root or race.base.data_root),
        seeds=settings.seeds or race.seeds,
    )
    contenders, final = race.contenders, race.final
    watcher.start(race.trials + len(contenders) * race.seeds)
    data = load_data(final)
    for contender in contenders:
        # The first learning rate with every value of the other option.
        for config in contender.configs(final)[: contender.candidates // len(contender.lrs)]:
            try_step(config, data, contender.label)
    cache, part = Cache(settings.cache), Part(watcher)
    tuned = tune(race, cache=cache, processes=settings.processes, watcher=part)
    outcomes = _final_runs(race, tuned, cache, settings.processes, part)
    assert final.batch_size is not None  # resolved
    per_epoch = max(len(data.train_y) // final.batch_size, 1)
    result = Result.of(race, tuned, outcomes, per_epoch, machine(final.device))
    save_race(
        settings.picture,
        race.title,
        [_lane(entry) for entry in result.entries if entry.outcomes],
        {f"{100 * s:g} % of {race.baseline}'s": 100 * t for s, t in result.targets.items()},
        result.clock,
    )
    columns, table = short_table(result)
    return Report(
        columns,
        table,
        sentence(result),
        markdown_page(settings, result),
        _rows(result),
        _facts(result),
    )


def _final_runs(
    race: Race, tuned: Sequence[Tuned], cache: Cache, processes: int | None, watcher: Watcher
) -> list[tuple[Outcome, ...]]:
    """By contender, then by seed; a contender without a setting has none."""
    chosen = [t.chosen for t in tuned]
    runs = [
        # Seed by seed: whatever makes the machine slower for a while, does so for all.
        (i, replace(race.final, optimizer=c.optimizer, lr=c.lr, options=c.options, seed=seed))
        for seed in range(race.seeds)
        for i, c in ((i, t.config) for i, t in enumerate(chosen) if t is not None)
    ]
    done = run_grid([c for _, c in runs], cache=cache, processes=processes, watcher=watcher)
    found: list[list[Outcome]] = [[] for _ in tuned]
    for (i, _), outcome in zip(runs, done, strict=True):
        found[i].append(outcome)
    return [tuple(outcomes) for outcomes in found]


def _lane(entry: Entry) -> Lane:
    return Lane(
        entry.label,
        [curve.epochs for curve in entry.curves],
        [curve.seconds for curve in entry.curves],
        [[100 * accuracy for accuracy in curve.accuracies] for curve in entry.curves],
    )


def _rows(result: Result) -> list[Mapping[str, Any]]:
    entries = result.entries
    tuning = [row for entry in entries for row in entry.tuned.to_json()]
    final = [_run(entry, outcome) for entry in entries for outcome in entry.outcomes]
    return [*tuning, *final, *(_summary(result, entry) for entry in entries)]


def _run(entry: Entry, outcome: Outcome) -> dict[str, Any]:
    assert entry.tuned.chosen is not None  # or it would not have run
    config = entry.tuned.chosen.config
    return {
        "kind": "final",
        "contender": entry.label,
        "seed": outcome.seed,
        "lr": config.lr,
        **{name: config.options[name] for name in entry.tuned.contender.also},
        "test_accuracy": outcome.test_accuracy,
        "train_loss": outcome.train_loss,
        "diverged_step": outcome.diverged_step,
        "steps": outcome.steps,
        "curve": {
            "step": [step for step, *_ in outcome.clock],
            "cpu_seconds": [cpu for _, cpu, _ in outcome.clock],
            "wall_seconds": [wall for *_, wall in outcome.clock],
            "test_accuracy": [accuracy for _, accuracy in outcome.accuracies],
        },
        "losses": [list(point) for point in outcome.losses],
    }


def _summary(result: Result, entry: Entry) -> dict[str, Any]:
    """What the tables show; a time that is null is never."""
    return {
        "kind": "summary",
        "contender": entry.label,
        "edges": entry.tuned.edges,
        "diverged": entry.failed,
        "at_epochs": {f"{mark:g}": entry.at_epoch(mark) for mark in result.epochs},
        "at_seconds": {f"{mark:g}": entry.at_second(mark) for mark in result.seconds},
        "seconds_to": {f"{s:g}": entry.seconds_to(t) for s, t in result.targets.items()},
        "epochs_to": {f"{s:g}": entry.epochs_to(t) for s, t in result.targets.items()},
        "ratio_to_baseline": {f"{s:g}": result.ratio(entry, t) for s, t in result.targets.items()},
        "seconds_per_step": entry.per_step,
    }


def _facts(result: Result) -> dict[str, Any]:
    race = result.race
    own = ("optimizer", "lr", "options", "seed", "validation", "data_root", "curve")
    shared = {name: v for name, v in race.final.to_json().items() if name not in own}
    return {
        "settings": {
            **shared,
            "steps_per_epoch": result.per_epoch,
            "seeds": race.seeds,
            "tuning_seeds": race.tuning_seeds,
            "tuning_epochs": race.tuning.epochs,
            "validation": race.validation,
            "baseline": race.baseline,
        },
        "targets": {f"{share:g}": target for share, target in result.targets.items()},
        "clock": result.clock,
        "machine": result.machine,
        "torch": torch.__version__,
    }
