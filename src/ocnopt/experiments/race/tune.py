"""Choose every contender's setting on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.race.analysis import area
from ocnopt.experiments.race.contender import Contender
from ocnopt.experiments.race.plan import Race
from ocnopt.experiments.tuning import TUNING_SEED
from ocnopt.experiments.watcher import Watcher

__all__ = ["Trial", "Tuned", "choose", "tune"]


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        config: The setting.
        outcomes: One per tuning seed; their accuracy is that of the validation samples.
    """

    config: TrainConfig
    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """Mean accuracy at the end; what diverged counts as 0."""
        return fmean(0.0 if o.failed else o.test_accuracy for o in self.outcomes)

    @property
    def area(self) -> float:
        """Mean height of the curve of accuracy over steps; what diverged counts as 0."""
        return fmean(0.0 if o.failed else _height(o) for o in self.outcomes)

    @property
    def failed(self) -> int:
        """How many of its runs diverged."""
        return sum(o.failed for o in self.outcomes)


def _height(outcome: Outcome) -> float:
    steps, accuracies = zip(*outcome.accuracies, strict=True)
    return area(steps, accuracies)


@dataclass(frozen=True)
class Tuned:
    """A contender after tuning.

    Attributes:
        contender: Who it is.
        trials: Every setting that was tried; none where there was but one.
        chosen: The one that runs; None where every run of all diverged.
    """

    contender: Contender
    trials: tuple[Trial, ...]
    chosen: Trial | None

    @property
    def edges(self) -> dict[str, str]:
        """What of the choice lies at an end of what was tried."""
        return {} if self.chosen is None else self.contender.edges(self.chosen.config)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values: a mapping per trial."""
        return [
            {
                "kind": "tuning",
                "contender": self.contender.label,
                "lr": trial.config.lr,
                **{name: trial.config.options[name] for name in self.contender.also},
                "validation_accuracy": [o.test_accuracy for o in trial.outcomes],
                "area": trial.area,
                "diverged_step": [o.diverged_step for o in trial.outcomes],
                "chosen": trial is self.chosen,
            }
            for trial in self.trials
        ]


def tune(
    race: Race, *, cache: Cache | None, processes: int | None, watcher: Watcher
) -> list[Tuned]:
    """Try every candidate of every contender, with the same seeds and for as many epochs.

    Args:
        race: Who runs, and how.
        cache: As in :func:`~ocnopt.experiments.grid.run_grid`.
        processes: Likewise.
        watcher: Told of every run.

    Returns:
        One result per contender, in their order.

    Raises:
        InputError: A setting or the data cannot be used.
    """
    tried = [contender.configs(race.tuning) for contender in race.contenders]
    if race.fixed:
        return [
            Tuned(contender, (), Trial(config, ()))
            for contender, (config,) in zip(race.contenders, tried, strict=True)
        ]
    seeds = range(TUNING_SEED, TUNING_SEED + race.tuning_seeds)
    runs = [replace(c, seed=seed) for configs in tried for c in configs for seed in seeds]
    outcomes = iter(run_grid(runs, cache=cache, processes=processes, watcher=watcher))
    found = []
    for contender, configs in zip(race.contenders, tried, strict=True):
        trials = tuple(Trial(c, tuple(next(outcomes) for _ in seeds)) for c in configs)
        found.append(Tuned(contender, trials, choose(trials)))
    return found


def choose(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best accuracy; of equals the one with the greatest area, then the first.

    Args:
        trials: One or more.

    Returns:
        The trial; None where every run of all diverged.
    """
    if all(trial.failed == len(trial.outcomes) for trial in trials):
        return None
    return max(trials, key=lambda trial: (round(trial.accuracy, 9), round(trial.area, 9)))
