"""The runs behind the pages on DGNOpt: what players know, and which alignment they play.

For every preconditioner the optimizer that lends it, which is the open loop, and what extends it,
at the same learning rates and from the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeAlias

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.reproduce.report import Settings, Watcher
from ocnopt.experiments.verdict import spread

__all__ = ["ALIGNMENTS", "FAMILIES", "SEEDS", "Cell", "Family", "Method", "Row", "run_rows"]

SEEDS = 5

_LATE = {"alignment": "late"}
#: Names of alignments, and what DGNOpt calls them.
ALIGNMENTS = {
    "late": "late",
    "early": "early",
    "random": "random",
    "greedy": "epsilon-greedy",
    "EXP3++": "exp3++",
}


@dataclass(frozen=True)
class Method:
    """An optimizer of a family.

    Attributes:
        name: What it is called.
        optimizer: Its name on the command line.
        options: Its options.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A preconditioner: who lends it, and at which learning rates.

    Attributes:
        name: The optimizer that lends it.
        optimizer: The same on the command line.
        preconditioner: M.
        lrs: Learning rates, ascending.
        couples: Whether M has blocks between players, so that group rationality is something else
            than feedback, and an alignment decides more than an order.
    """

    name: str
    optimizer: str
    preconditioner: str
    lrs: tuple[float, ...]
    couples: bool = False

    @property
    def lender(self) -> Method:
        """The open loop."""
        return Method(self.name, self.optimizer)

    @property
    def extensions(self) -> list[Method]:
        """What extends it: DDPNOpt, which knows no stages, and DGNOpt."""
        m = {"preconditioner": self.preconditioner}
        found = [
            Method("DDPNOpt", "ddpnopt", m),
            Method("feedback", "dgnopt", {**m, "information": "feedback", **_LATE}),
        ]
        return [*found, self.aligned("late", "group rational")] if self.couples else found

    def aligned(self, alignment: str, name: str | None = None) -> Method:
        """Group-rational DGNOpt with an alignment."""
        options = {"preconditioner": self.preconditioner, "information": "group-rational"}
        return Method(name or alignment, "dgnopt", {**options, "alignment": ALIGNMENTS[alignment]})


FAMILIES: tuple[Family, ...] = (
    Family("SGD", "sgd", "identity", (0.05, 0.1, 0.2, 0.4, 0.8)),
    Family("RMSprop", "rmsprop", "rmsprop", (0.001, 0.003, 0.01, 0.02, 0.045)),
    Family("Adam", "adam", "adam", (0.001, 0.003, 0.01, 0.02, 0.045)),
    Family("EKFAC", "ekfac", "ekfac", (0.01, 0.03, 0.1, 0.2, 0.4), couples=True),
)


@dataclass(frozen=True)
class Cell:
    """A method at a learning rate, over its seeds.

    Attributes:
        family: Name of the family.
        method: The method.
        lr: Learning rate.
        outcomes: One per seed.
    """

    family: str
    method: Method
    lr: float
    outcomes: tuple[Outcome, ...]

    @property
    def losses(self) -> list[float]:
        """Training loss of every seed, a run that diverged counting as the cap."""
        return [o.capped_loss for o in self.outcomes]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of every seed in %."""
        return [100 * o.test_accuracy for o in self.outcomes]

    @property
    def loss(self) -> float:
        """Mean training loss."""
        return fmean(self.losses)

    @property
    def accuracy(self) -> float:
        """Mean test accuracy in %."""
        return fmean(self.accuracies)

    @property
    def failed(self) -> int:
        """How many runs diverged."""
        return sum(o.failed for o in self.outcomes)

    def text(self) -> str:
        """Loss with its spread, accuracy, and what diverged."""
        note = f" ({self.failed} diverged)" if self.failed else ""
        return f"{self.loss:.4f} ± {spread(self.losses):.3f} / {self.accuracy:.2f}{note}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "family": self.family,
            "method": self.method.name,
            "optimizer": self.method.optimizer,
            "options": dict(self.method.options),
            "lr": self.lr,
            "loss": [o.train_loss for o in self.outcomes],
            "accuracy": [o.test_accuracy for o in self.outcomes],
            "diverged_step": [o.diverged_step for o in self.outcomes],
        }


#: One method of a family, a cell per learning rate.
Row: TypeAlias = list[Cell]


def run_rows(
    settings: Settings,
    base: TrainConfig,
    wanted: Sequence[tuple[Family, Sequence[Method]]],
    watcher: Watcher,
) -> list[list[Row]]:
    """Run every method at every learning rate from every seed, or find it in the cache.

    Args:
        settings: How.
        base: What all runs share.
        wanted: Families with the methods to run.
        watcher: Told how it goes.

    Returns:
        By family, the rows of its methods.
    """
    seeds = settings.seeds or SEEDS
    configs = [
        replace(base, optimizer=m.optimizer, options=m.options, lr=lr, seed=seed)
        for family, methods in wanted
        for m in methods
        for lr in family.lrs
        for seed in range(seeds)
    ]
    outcomes = iter(
        run_grid(
            configs, cache=Cache(settings.cache), processes=settings.processes, watcher=watcher
        )
    )
    return [
        [
            [
                Cell(family.name, m, lr, tuple(next(outcomes) for _ in range(seeds)))
                for lr in family.lrs
            ]
            for m in methods
        ]
        for family, methods in wanted
    ]
