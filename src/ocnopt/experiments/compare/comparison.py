"""Sweep the learning rates of several optimizers, then meet anew at the best of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.compare.contender import Contender
from ocnopt.experiments.compare.rates import Workable, best_rate, workable_range
from ocnopt.experiments.compare.stepper import ROUNDS, StepTime, time_steps, try_step
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.sensitivity import MOST
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.problems import NETWORK_SETTINGS
from ocnopt.experiments.setup import load_data, total_steps
from ocnopt.experiments.watcher import Watcher

__all__ = ["FRESH", "Comparison", "Entry", "compare"]

#: Seeds of the final runs start here: none of them has had a part in the choice of a rate, and
#: more of them leave the first ones as they are.
FRESH = 1000
#: A run has diverged, too, whose loss is so many times that of giving every class the same chance:
#: saturated networks go wild without ever coming to a number that is none.
_EXPLODED = 2.0
#: Points of a curve, about.
_POINTS = 50


@dataclass(frozen=True)
class Entry:
    """What one contender came to.

    Attributes:
        contender: Who it is.
        sweep: Outcomes by learning rate, then by seed; their accuracy is that of the validation
            samples.
        best: The learning rate with the best mean validation accuracy; None where all runs failed.
        workable: The learning rates that work; None where none does.
        final: Outcomes of fresh seeds at the best rate, trained on the whole training set and
            tested on the test set; empty where there is no best rate.
        time: Of a step at the best rate; None where there is no such run.
    """

    contender: Contender
    sweep: tuple[tuple[Outcome, ...], ...]
    best: float | None
    workable: Workable | None
    final: tuple[Outcome, ...]
    time: StepTime | None

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return self.contender.label

    @property
    def finished(self) -> list[Outcome]:
        """The final runs that did not diverge."""
        return [run for run in self.final if not run.failed]

    @property
    def swept_failures(self) -> int:
        """How many runs of the sweep diverged."""
        return sum(run.failed for runs in self.sweep for run in runs)


@dataclass(frozen=True)
class Comparison:
    """Optimizers compared on one problem.

    Attributes:
        entries: One per contender, in the order given.
        base: The settings that they share, resolved.
        seeds: Seeds per learning rate, and of the final runs.
        margin: Of the workable range, in percentage points of accuracy.
        limit: A run whose training loss ends above it counts as diverged.
        validation_samples: On how many samples the rates are compared.
        training_samples: On how many samples the final runs train.
        test_samples: On how many samples they are tested.
        steps: Steps of a final run.
    """

    entries: tuple[Entry, ...]
    base: TrainConfig
    seeds: int
    margin: float
    limit: float
    validation_samples: int
    training_samples: int
    test_samples: int
    steps: int

    def to_json(self, *, curves: bool = True) -> dict[str, Any]:
        """Plain values: settings, what was seen, and every run.

        Args:
            curves: Whether the runs' curves are among them.
        """
        from ocnopt.experiments.compare.words import remarks, verdict

        return {
            "verdict": verdict(self),
            "remarks": remarks(self),
            "settings": {
                **{key: value for key, value in self.base.to_json().items() if key in _SHARED},
                "seeds": self.seeds,
                "margin": self.margin,
                "diverged_above_loss": self.limit,
                "training_samples": self.training_samples,
                "validation_samples": self.validation_samples,
                "test_samples": self.test_samples,
                "torch": torch.__version__,
            },
            "contenders": [_entry_json(entry, curves) for entry in self.entries],
        }


_SHARED = frozenset(
    {"dataset", "network", *NETWORK_SETTINGS}
    | {"validation", "batch_size", "epochs", "steps", "device"}
)


def compare(
    contenders: Sequence[Contender],
    base: TrainConfig,
    *,
    seeds: int = 3,
    margin: float = 1.0,
    cache: Cache | None = None,
    processes: int | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Compare optimizers on one problem.

    Every contender is trained at each of its learning rates from the same seeds, on the training
    set without its validation share. The rate with the best mean validation accuracy is taken, and
    fresh seeds are trained with it on the whole training set: theirs are the numbers that count,
    and neither they nor the test set had a part in the choice. Last, with nothing else at work,
    contenders take turns at steps for the time of one.

    Args:
        contenders: One to eight, with different labels and equally many learning rates.
        base: Data, network and length of every run, and the share `validation`; where that is 0,
            a tenth. Its optimizer, learning rate and seed do not count.
        seeds: Seeds per learning rate, and of the final runs.
        margin: How many percentage points of accuracy a workable rate may be below the best.
        cache: Where runs are looked up and kept.
        processes: Worker processes; None for one per core.
        watcher: Told how many parts there are and of each that is over.

    Raises:
        InputError: Something that was given cannot be used.
    """
    _require_fair(contenders, seeds, margin)
    watcher = watcher or Watcher()
    base = replace(base, output=None, resume=False, validation=base.validation or 0.1)
    base = replace(base, optimizer="sgd", lr=None, options={}).resolved()
    whole = replace(base, validation=0.0)
    count = len(contenders[0].lrs)
    watcher.start(len(contenders) * (count + 1) * seeds + ROUNDS)
    starts = [_config(c, whole, c.lrs[0], FRESH) for c in contenders]
    data = load_data(whole)
    assert base.batch_size is not None
    steps = total_steps(whole, max(len(data.train_y) // base.batch_size, 1))
    for contender, config in zip(contenders, starts, strict=True):
        try_step(config, data, contender.label)
    held = len(load_data(base).test_y)
    limit = _EXPLODED * math.log(max(data.classes, 2))

    def run(configs: list[TrainConfig], phase: str) -> list[Outcome]:
        part = _Part(watcher, phase)
        done = run_grid(configs, cache=cache, processes=processes, watcher=part)
        return [_judged(outcome, limit) for outcome in done]

    sweeps = [[_config(c, base, lr, s) for lr in c.lrs for s in range(seeds)] for c in contenders]
    swept = iter(run([config for sweep in sweeps for config in sweep], "sweep"))
    tables = [
        tuple(tuple(next(swept) for _ in range(seeds)) for _ in range(count)) for _ in contenders
    ]
    places = [best_rate(table) for table in tables]
    best = [None if p is None else c.lrs[p] for p, c in zip(places, contenders, strict=True)]
    curve = replace(whole, curve=True, log_every=max(1, math.ceil(steps / _POINTS)))
    finals = {
        c.label: [_config(c, curve, lr, FRESH + s) for s in range(seeds)]
        for c, lr in zip(contenders, best, strict=True)
        if lr is not None
    }
    ended = iter(run([config for configs in finals.values() for config in configs], "best rate"))
    outcomes = {label: tuple(next(ended) for _ in configs) for label, configs in finals.items()}
    times = time_steps(
        {label: configs[0].resolved() for label, configs in finals.items()},
        data,
        lambda: watcher.advance("time per step"),
    )
    entries = tuple(
        Entry(
            contender=c,
            sweep=table,
            best=lr,
            workable=workable_range(c.lrs, table, margin),
            final=outcomes.get(c.label, ()),
            time=times.get(c.label),
        )
        for c, table, lr in zip(contenders, tables, best, strict=True)
    )
    return Comparison(
        entries, base, seeds, margin, limit, held, len(data.train_y), len(data.test_y), steps
    )


def _require_fair(contenders: Sequence[Contender], seeds: int, margin: float) -> None:
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, not {seeds}")
    if not 0 <= margin <= 100:
        raise InputError(f"margin must be between 0 and 100 percentage points, not {margin:g}")
    if not 1 <= len(contenders) <= MOST:
        raise InputError(
            f"a comparison takes 1 to {MOST} optimizers, not {len(contenders)}; give each with"
            " --optimizer"
        )
    labels = [c.label for c in contenders]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"optimizer {twice!r} is given twice; give it once, with one sweep")
    counts = {c.label: len(c.lrs) for c in contenders}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise InputError(
            f"every optimizer must have as many learning rates as the others, to be fair: {listed}"
        )


def _config(contender: Contender, base: TrainConfig, lr: float, seed: int) -> TrainConfig:
    return replace(
        base,
        optimizer=contender.optimizer,
        options=dict(contender.options),
        lr=lr,
        seed=seed,
    )


def _judged(outcome: Outcome, limit: float) -> Outcome:
    exploded = outcome.train_loss is not None and outcome.train_loss > limit
    return replace(outcome, train_loss=None) if exploded else outcome


class _Part(Watcher):
    """Passes one grid's progress on to the watcher of the whole."""

    def __init__(self, whole: Watcher, phase: str) -> None:
        self._whole, self._phase = whole, phase

    def advance(self, text: str = "") -> None:
        self._whole.advance(f"{self._phase}: {text.partition(' ')[2]}")


def _entry_json(entry: Entry, curves: bool) -> dict[str, Any]:
    from ocnopt.experiments.compare.words import mean_and_spread

    def plain(run: Outcome) -> dict[str, Any]:
        kept = run.to_json()
        # Measured while other runs were at work: nothing to be compared.
        kept.pop("seconds_per_step")
        if not curves:
            del kept["losses"], kept["accuracies"]
        return kept

    def swept(run: Outcome) -> dict[str, Any]:
        kept = {key: plain(run)[key] for key in ("seed", "train_loss", "diverged_step", "steps")}
        return {**kept, "validation_accuracy": run.test_accuracy}

    c, w, t = entry.contender, entry.workable, entry.time
    accuracy = mean_and_spread([run.test_accuracy for run in entry.finished])
    loss = mean_and_spread([run.train_loss for run in entry.finished if run.train_loss is not None])
    return {
        "label": c.label,
        "optimizer": c.optimizer,
        "options": {k: v if _is_plain(v) else repr(v) for k, v in c.options.items()},
        "best_lr": entry.best,
        "test_accuracy": accuracy,
        "train_loss": loss,
        "diverged": {
            "sweep": entry.swept_failures,
            "of_sweep": sum(map(len, entry.sweep)),
            "final": len(entry.final) - len(entry.finished),
            "of_final": len(entry.final),
        },
        "workable": None
        if w is None
        else {
            "low": w.low,
            "high": w.high,
            "factor": w.factor,
            "at_least_below": w.open_low,
            "at_least_above": w.open_high,
        },
        "milliseconds_per_step": None if t is None else t.milliseconds,
        "time_ratio_to_first": None if t is None else t.ratio,
        "timed_blocks": [] if t is None else list(t.blocks),
        "sweep": [
            {"lr": lr, "runs": [swept(run) for run in runs]}
            for lr, runs in zip(c.lrs, entry.sweep, strict=True)
        ],
        "final": [plain(run) for run in entry.final],
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)
