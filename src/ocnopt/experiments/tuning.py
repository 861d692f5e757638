"""Choose a method's settings on held-out data, then measure the choice with fresh seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.watcher import Part, Watcher

__all__ = ["VALIDATION", "Tuned", "tune_and_measure"]

#: Share of the training set that candidates are compared on.
VALIDATION = 0.1
#: First seed of tuning; those of the measurement begin at 0.
TUNING_SEED = 1000


@dataclass(frozen=True)
class Tuned:
    """A method after tuning.

    Attributes:
        method: Its name.
        trials: Every candidate with its outcomes on the held-out data.
        chosen: The candidate with the best mean accuracy there (of equals the lower loss).
        outcomes: The choice on the whole training set and the test set, one per seed.
    """

    method: str
    trials: tuple[tuple[TrainConfig, tuple[Outcome, ...]], ...]
    chosen: TrainConfig
    outcomes: tuple[Outcome, ...]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy in %, one per seed."""
        return [100 * o.test_accuracy for o in self.outcomes]

    @property
    def losses(self) -> list[float]:
        """Training loss, one per seed; what diverged counts as the cap."""
        return [o.capped_loss for o in self.outcomes]

    @property
    def failed(self) -> int:
        """How many runs of the measurement diverged."""
        return sum(o.failed for o in self.outcomes)

    @property
    def on_edge(self) -> bool:
        """Whether the chosen learning rate is the least or the largest that was tried."""
        rates = sorted({config.lr for config, _ in self.trials if config.lr is not None})
        return len(rates) > 1 and self.chosen.lr in (rates[0], rates[-1])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method,
            "chosen": _setting(self.chosen),
            "accuracy": [o.test_accuracy for o in self.outcomes],
            "loss": [o.train_loss for o in self.outcomes],
            "diverged_step": [o.diverged_step for o in self.outcomes],
            "seconds_per_step": fmean(o.seconds_per_step for o in self.outcomes),
            "trials": [
                {
                    **_setting(config),
                    "validation_accuracy": [o.test_accuracy for o in outcomes],
                    "loss": [o.train_loss for o in outcomes],
                }
                for config, outcomes in self.trials
            ],
        }


def _setting(config: TrainConfig) -> dict[str, Any]:
    return {"lr": config.lr, "options": dict(config.options)}


def tune_and_measure(
    candidates: Mapping[str, Sequence[TrainConfig]],
    *,
    tuning_seeds: int,
    seeds: int,
    cache: Cache | None = None,
    processes: int | None = None,
    watcher: Watcher | None = None,
) -> list[Tuned]:
    """Give every method the same tuning, then measure what was chosen.

    Args:
        candidates: By method, the settings that are tried; as many for each.
        tuning_seeds: Seeds per candidate.
        seeds: Seeds of the measurement, other ones.
        cache: As in :func:`~ocnopt.experiments.grid.run_grid`.
        processes: Likewise.
        watcher: Told how it goes.

    Returns:
        One result per method, in their order.

    Raises:
        InputError: A setting or the data cannot be used.
        ValueError: A method has another number of candidates than the others.
    """
    if len({len(tried) for tried in candidates.values()}) > 1:
        raise ValueError("every method gets the same number of candidates")
    watcher = watcher or Watcher()
    flat = [config for tried in candidates.values() for config in tried]
    watcher.start(len(flat) * tuning_seeds + len(candidates) * seeds)

    def run(configs: Sequence[TrainConfig], first: int, count: int) -> list[tuple[Outcome, ...]]:
        every = [replace(c, seed=first + s) for c in configs for s in range(count)]
        found = run_grid(every, cache=cache, processes=processes, watcher=Part(watcher))
        return [tuple(found[i : i + count]) for i in range(0, len(found), count)]

    held = run([replace(c, validation=VALIDATION) for c in flat], TUNING_SEED, tuning_seeds)
    trials: list[tuple[tuple[TrainConfig, tuple[Outcome, ...]], ...]] = []
    position = 0
    for tried in candidates.values():
        part = held[position : position + len(tried)]
        trials.append(tuple(zip(tried, part, strict=True)))
        position += len(tried)
    chosen = [min(tried, key=lambda trial: _rank(trial[1]))[0] for tried in trials]
    measured = run(chosen, 0, seeds)
    return [Tuned(*parts) for parts in zip(candidates, trials, chosen, measured, strict=True)]


def _rank(outcomes: tuple[Outcome, ...]) -> tuple[float, float]:
    return -fmean(o.test_accuracy for o in outcomes), fmean(o.capped_loss for o in outcomes)
