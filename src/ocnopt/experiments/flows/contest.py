"""Tune optimizers alike on one density, then run the choices over seeds against the clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from ocnopt.experiments.flows.run import FlowRun
from ocnopt.experiments.flows.training import load, train_flow
from ocnopt.experiments.race.analysis import accuracy_at, median_ratio, time_to_target
from ocnopt.experiments.reproduce.kept import kept_runs
from ocnopt.experiments.reproduce.report import Settings
from ocnopt.experiments.tuning import TUNING_SEED
from ocnopt.experiments.watcher import Watcher

__all__ = ["Contest", "Entry", "Method", "hold"]

Result = Mapping[str, Any]
#: Kinds of time, as evaluations name them.
STEPS, SECONDS = "step", "cpu_seconds"


@dataclass(frozen=True)
class Method:
    """An optimizer and what is tried for it.

    Attributes:
        label: What tables and pictures call it.
        optimizer: As in :class:`~ocnopt.experiments.flows.FlowRun`.
        lrs: Learning rates, ascending.
        options: What is fixed.
    """

    label: str
    optimizer: str
    lrs: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What a method came to.

    Attributes:
        method: It.
        trials: Every candidate with its result on the validation points.
        lr: The learning rate with the least validation loss at the end; None where all diverged.
        results: The final runs by seed; none without a learning rate.
    """

    method: Method
    trials: tuple[tuple[FlowRun, Result], ...]
    lr: float | None
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return self.method.label

    @property
    def on_edge(self) -> bool:
        """Whether a learning rate beyond those that were tried may be better."""
        return len(self.method.lrs) > 1 and self.lr in (self.method.lrs[0], self.method.lrs[-1])

    @property
    def sound(self) -> list[Result]:
        """The runs that did not diverge."""
        return [r for r in self.results if r["diverged_step"] is None]

    @property
    def finals(self) -> list[float]:
        """Their losses at the end."""
        return [r["points"][-1]["nll"] for r in self.sound]

    @property
    def per_step(self) -> list[float]:
        """CPU seconds of a step, by run."""
        ends = [r["points"][-1] for r in self.results if len(r["points"]) > 1]
        return [end[SECONDS] / end[STEPS] for end in ends]

    @property
    def evaluations(self) -> list[float]:
        """Evaluations of the field for a step, by run."""
        ends = [r["points"][-1] for r in self.results if len(r["points"]) > 1]
        return [end["evaluations"] / end[STEPS] for end in ends]

    def to(self, target: float, kind: str) -> list[float]:
        """Steps or seconds until the first evaluation at or below a loss, by seed."""
        return [
            time_to_target(series(r, kind), [-nll for nll in series(r, "nll")], -target)
            for r in self.results
        ]

    def at(self, mark: float, kind: str) -> list[float]:
        """The loss after so many steps or seconds, of the runs that had not ended by then."""
        found = [
            accuracy_at(series(r, kind), [-nll for nll in series(r, "nll")], mark)
            for r in self.results
        ]
        return [-value for value in found if value is not None]


@dataclass(frozen=True)
class Contest:
    """All methods on one density.

    Attributes:
        density: Its name.
        entries: One per method; the first one's final loss is what targets are measured from.
        margins: Nats above it, one target each.
    """

    density: str
    entries: tuple[Entry, ...]
    margins: tuple[float, ...]

    @property
    def baseline(self) -> Entry:
        """Whom the others are compared with."""
        return self.entries[0]

    @property
    def targets(self) -> dict[float, float]:
        """Losses by margin; none where the baseline diverged."""
        finals = self.baseline.finals
        return {margin: fmean(finals) + margin for margin in self.margins} if finals else {}

    @property
    def seconds(self) -> list[float]:
        """A quarter, half and all of the shortest run's seconds."""
        ends = [series(r, SECONDS)[-1] for e in self.entries for r in e.sound]
        return [share * min(ends) for share in (0.25, 0.5, 1.0)] if ends else []

    @property
    def steps(self) -> list[float]:
        """The evaluations at or before a quarter, half and all of the steps."""
        grids = [series(r, STEPS) for e in self.entries for r in e.sound]
        if not grids:
            return []
        grid = grids[0]
        return [max(s for s in grid if s <= share * grid[-1]) for share in (0.25, 0.5, 1.0)]

    def ratio(self, entry: Entry, target: float, kind: str) -> float | None:
        """Median time to a target relative to the baseline's; None where either never does."""
        return median_ratio(entry.to(target, kind), self.baseline.to(target, kind))


def series(result: Result, name: str) -> list[float]:
    """One column of a run's evaluations."""
    return [point[name] for point in result["points"]]


def hold(
    settings: Settings,
    methods: Sequence[Method],
    base: FlowRun,
    margins: tuple[float, ...],
    seeds: int,
    watcher: Watcher,
) -> Contest:
    """Try every learning rate of every method with one seed, then run the best ones over others.

    Args:
        settings: Cache, processes and data.
        methods: As many learning rates for each.
        base: What all runs share; its seed does not count.
        margins: As in :class:`Contest`.
        seeds: Runs of each choice.
        watcher: Told of every run.

    Returns:
        What came of it.

    Raises:
        InputError: A setting or the data cannot be used.
        ValueError: A method has another number of candidates than the others.
    """
    if len({len(m.lrs) for m in methods}) > 1:
        raise ValueError("every method gets the same number of candidates")
    data = load(base.density, settings.data_root)

    def train(pairs: Sequence[tuple[Method, FlowRun]]) -> list[tuple[Method, FlowRun, Result]]:
        done = kept_runs(settings, "ode-flow", [r for _, r in pairs], data, train_flow, watcher)
        return [(method, *kept) for (method, _), kept in zip(pairs, done, strict=True)]

    def by(method: Method, lr: float, seed: int, **more: Any) -> tuple[Method, FlowRun]:
        given = replace(base, optimizer=method.optimizer, lr=lr, options=method.options)
        return method, replace(given, seed=seed, **more)

    tried = train(
        [by(m, lr, TUNING_SEED, held="validation", mesh=0) for m in methods for lr in m.lrs]
    )
    trials = {m.label: tuple((r, found) for own, r, found in tried if own is m) for m in methods}
    chosen = {m.label: _best(trials[m.label]) for m in methods}
    # Seed by seed: whatever makes the machine slower for a while does so for all.
    finals = train(
        [
            by(m, lr, seed, held="test", mesh=0 if seed else base.mesh)
            for seed in range(seeds)
            for m in methods
            if (lr := chosen[m.label]) is not None
        ]
    )
    entries = [
        Entry(m, trials[m.label], chosen[m.label], tuple(r for own, _, r in finals if own is m))
        for m in methods
    ]
    return Contest(base.density, tuple(entries), margins)


def score(result: Result) -> float:
    """Loss at the end; infinite where the run diverged."""
    return math.inf if result["diverged_step"] is not None else result["points"][-1]["nll"]


def _best(trials: Sequence[tuple[FlowRun, Result]]) -> float | None:
    run, result = min(trials, key=lambda pair: score(pair[1]))
    return run.lr if math.isfinite(score(result)) else None
