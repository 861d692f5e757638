"""Fig. 4 and 9 and Tables 6 to 10 of Liu et al., ICLR 2021: DIGITS with and without feedback.

One grid serves all of them: for every preconditioner, learning rate and regularization of V_xx the
optimizer that lends M and the DDPNOpt that extends it, from the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce.report import Settings, Watcher
from ocnopt.experiments.verdict import spread

__all__ = ["PAIRS", "Cell", "Pair", "run_cells"]

SEEDS, QUICK_SEEDS = 10, 2
STEPS, QUICK_STEPS = 1500, 150


@dataclass(frozen=True)
class Pair:
    """An optimizer and the DDPNOpt that extends it.

    Attributes:
        name: The optimizer, as the paper calls it.
        optimizer: The same on the command line.
        preconditioner: M.
        lrs: Learning rates of the grid.
        regs: Regularizations of V_xx.
        best: The learning rate that the paper tuned it to.
        loss: The paper's training loss per learning rate: the optimizer's, then DDPNOpt's at every
            regularization. Empty where the paper prints none.
        accuracy: Its accuracy in %, likewise.
        example: Learning rate and regularization of Fig. 4b; None where it has none.
    """

    name: str
    optimizer: str
    preconditioner: str
    lrs: tuple[float, ...]
    regs: tuple[float, ...]
    best: float | None = None
    loss: tuple[tuple[float, ...], ...] = ()
    accuracy: tuple[tuple[float, ...], ...] = ()
    example: tuple[float, float] | None = None


PAIRS: tuple[Pair, ...] = (
    Pair(
        "SGD",
        "sgd",
        "identity",
        (0.4, 0.6, 0.7, 0.8),
        (5e-5, 1e-4, 5e-4, 1e-3),
        0.1,
        (
            (0.1974, 0.1662, 0.1444, 0.1322, 0.1067),
            (0.5809, 0.4989, 0.4867, 0.3263, 0.2764),
            (1.0493, 0.9034, 0.8240, 0.6592, 0.5381),
            (1.7801, 1.6898, 1.4597, 1.1784, 1.3166),
        ),
        (
            (91.46, 91.98, 92.71, 92.90, 93.12),
            (81.73, 83.64, 84.09, 88.39, 89.39),
            (70.48, 73.42, 75.44, 80.62, 82.87),
            (55.76, 57.70, 62.82, 70.23, 65.01),
        ),
        (0.6, 1e-3),
    ),
    Pair(
        "RMSprop",
        "rmsprop",
        "rmsprop",
        (0.01, 0.02, 0.03, 0.045),
        (1e-9, 1e-8, 5e-6, 1e-5),
        0.001,
        (
            (0.1949, 0.1638, 0.1714, 0.1746, 0.1588),
            (0.4691, 0.4559, 0.4489, 0.4390, 0.4773),
            (0.8156, 0.7675, 0.7736, 0.7790, 0.7893),
            (1.3103, 1.2740, 1.2956, 1.2568, 1.2758),
        ),
        (
            (91.48, 92.14, 91.80, 91.73, 92.52),
            (84.15, 84.82, 85.02, 85.23, 83.00),
            (73.07, 75.24, 75.73, 74.29, 74.16),
            (59.80, 59.16, 60.98, 61.75, 59.87),
        ),
        (0.01, 1e-5),
    ),
    Pair(
        "EKFAC",
        "ekfac",
        "ekfac",
        (0.05, 0.09, 0.1, 0.3),
        (1e-7, 5e-7, 5e-6, 1e-5),
        0.03,
        (
            (0.0757, 0.0636, 0.0659, 0.0691, 0.0717),
            (0.2274, 0.2087, 0.2164, 0.2091, 0.2223),
            (0.3260, 0.2771, 0.3003, 0.2543, 0.2510),
            (0.5959, 0.5462, 0.5282, 0.5299, 0.5858),
        ),
        (
            (93.70, 93.84, 93.88, 94.31, 94.06),
            (90.84, 91.13, 91.45, 91.23, 91.24),
            (88.88, 89.69, 89.89, 90.18, 90.94),
            (81.82, 83.79, 84.09, 84.15, 82.55),
        ),
    ),
    Pair(
        "Adam",
        "adam",
        "adam",
        (0.015, 0.025, 0.03, 0.045),
        (1e-9, 1e-8, 1e-7, 1e-6),
    ),
)


@dataclass(frozen=True)
class Cell:
    """A configuration of the grid, over its seeds.

    Attributes:
        pair: Name of the pair.
        lr: Learning rate.
        reg: Regularization of V_xx; None for the rank-one default of DDPNOpt, and for the
            optimizer that lends M.
        feedback: Whether it is DDPNOpt.
        outcomes: One per seed.
    """

    pair: str
    lr: float
    reg: float | None
    feedback: bool
    outcomes: tuple[Outcome, ...]

    @property
    def loss(self) -> float:
        """Mean training loss, a run that diverged counting as the cap."""
        return fmean(o.capped_loss for o in self.outcomes)

    @property
    def accuracy(self) -> float:
        """Mean test accuracy in %."""
        return 100 * fmean(o.test_accuracy for o in self.outcomes)

    @property
    def failed(self) -> int:
        """How many runs diverged."""
        return sum(o.failed for o in self.outcomes)

    def text(self) -> str:
        """Loss with its spread, accuracy, and what diverged."""
        deviation = spread([o.capped_loss for o in self.outcomes])
        note = f" ({self.failed} diverged)" if self.failed else ""
        return f"{self.loss:.4f} ± {deviation:.3f} / {self.accuracy:.2f}{note}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, without curves."""
        return {
            "pair": self.pair,
            "lr": self.lr,
            "reg": self.reg,
            "feedback": self.feedback,
            "loss": [o.train_loss for o in self.outcomes],
            "accuracy": [o.test_accuracy for o in self.outcomes],
            "diverged_step": [o.diverged_step for o in self.outcomes],
        }


class Cells:
    """The cells of a grid, found by what they are."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._by: Mapping[tuple[str, float, float | None, bool], Cell] = {
            (c.pair, c.lr, c.reg, c.feedback): c for c in cells
        }
        self.all = list(cells)

    def lender(self, pair: Pair, lr: float) -> Cell:
        """The optimizer alone."""
        return self._by[pair.name, lr, None, False]

    def ddpnopt(self, pair: Pair, lr: float, reg: float | None) -> Cell:
        """DDPNOpt, with the rank-one default where there is no regularization."""
        return self._by[pair.name, lr, reg, True]


def run_cells(
    settings: Settings,
    wanted: Sequence[tuple[Pair, float, Sequence[float | None]]],
    watcher: Watcher,
    curves: bool = False,
) -> Cells:
    """Run, or find in the cache, the optimizer and its extensions.

    Args:
        settings: How.
        wanted: Pairs with a learning rate and the regularizations of DDPNOpt; None among them is
            its rank-one default.
        watcher: Told how it goes.
        curves: Whether losses and accuracies over time are asked for.
    """
    seeds = settings.seeds or (QUICK_SEEDS if settings.quick else SEEDS)
    steps = QUICK_STEPS if settings.quick else STEPS
    base = {**RECIPES["digits-fcn"], "steps": steps, "epochs": None, "curve": curves}
    heads: list[tuple[Pair, float, float | None, bool]] = []
    configs: list[TrainConfig] = []
    for pair, lr, regs in wanted:
        runs: list[tuple[bool, float | None]] = [(False, None), *((True, reg) for reg in regs)]
        for feedback, reg in runs:
            options: dict[str, Any] = {}
            if feedback:
                options["preconditioner"] = pair.preconditioner
            if reg is not None:
                options.update(terminal="full", value_reg=reg)
            heads.append((pair, lr, reg, feedback))
            configs += [
                TrainConfig(
                    **{
                        **base,
                        "optimizer": "ddpnopt" if feedback else pair.optimizer,
                        "lr": lr,
                        "options": options,
                        "seed": seed,
                    }
                )
                for seed in range(seeds)
            ]
    outcomes = run_grid(
        configs, cache=Cache(settings.cache), processes=settings.processes, watcher=watcher
    )
    cells = []
    for i, (pair, lr, reg, feedback) in enumerate(heads):
        part = tuple(outcomes[i * seeds : (i + 1) * seeds])
        cells.append(Cell(pair.name, lr, reg, feedback, part))
    return Cells(cells)
