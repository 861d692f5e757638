"""What a run came to, as plain values that a cache and a table can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

__all__ = ["CAP", "Outcome", "make_outcome"]

#: What the loss of a run that diverged counts as in a mean, and the most that any loss counts.
CAP = 5.0
#: Points of a stored loss curve, at most.
_POINTS = 100


@dataclass(frozen=True)
class Outcome:
    """One run's result.

    Attributes:
        seed: Its seed.
        train_loss: Mean training loss over the last epoch's steps (over all if there are fewer);
            None if it diverged.
        test_accuracy: Share of test samples classified right at its end, in [0, 1].
        diverged_step: Step, counted from 1, that came to no number; None if there was none.
        steps: Steps done.
        seconds_per_step: Training time, without evaluation.
        losses: The curve (step, mean training loss of the steps since the last point); empty where
            none was asked for.
        accuracies: The curve (step, test accuracy); likewise.
        clock: For every point of `accuracies` (step, CPU seconds, wall-clock seconds) of training
            until then; empty but for runs that are evaluated at a rhythm of their own.
    """

    seed: int
    train_loss: float | None
    test_accuracy: float
    diverged_step: int | None
    steps: int
    seconds_per_step: float
    losses: tuple[tuple[int, float], ...] = ()
    accuracies: tuple[tuple[int, float], ...] = ()
    clock: tuple[tuple[int, float, float], ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it diverged."""
        return self.train_loss is None

    @property
    def capped_loss(self) -> float:
        """Training loss, at most :data:`CAP`, which is what divergence counts as."""
        return CAP if self.train_loss is None else min(self.train_loss, CAP)

    def to_json(self) -> dict[str, Any]:
        """Plain values; :meth:`from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Outcome:
        """Read what :meth:`to_json` gave.

        Raises:
            TypeError: It is something else.
        """
        curves = {
            key: tuple((int(step), *map(float, values)) for step, *values in kept[key])
            for key in _CURVES
        }
        return cls(**{**kept, **curves})


_CURVES = ("losses", "accuracies", "clock")


def make_outcome(
    *,
    seed: int,
    history: Tensor,
    per_epoch: int,
    diverged_step: int | None,
    accuracy: float,
    seconds_per_step: float,
    accuracies: Sequence[tuple[int, float]],
    curve: bool,
    clock: Sequence[tuple[int, float, float]] = (),
) -> Outcome:
    """Sum a run up.

    Args:
        seed: Its seed.
        history: Training loss of every step, (steps,).
        per_epoch: Steps in an epoch.
        diverged_step: As in :class:`Outcome`.
        accuracy: Test accuracy at its end.
        seconds_per_step: Training time per step.
        accuracies: Test accuracy at some steps.
        curve: Whether the curves are kept.
        clock: As in :class:`Outcome`.
    """
    loss = float("nan") if diverged_step else float(history[-per_epoch:].mean())
    return Outcome(
        seed=seed,
        train_loss=loss if math.isfinite(loss) else None,
        test_accuracy=accuracy,
        diverged_step=diverged_step,
        steps=len(history),
        seconds_per_step=seconds_per_step,
        losses=_thinned(history) if curve else (),
        accuracies=tuple(accuracies) if curve else (),
        clock=tuple(clock),
    )


def _thinned(history: Tensor) -> tuple[tuple[int, float], ...]:
    every = max(1, math.ceil(len(history) / _POINTS))
    means = [(min(i + every, len(history)), part.mean()) for i, part in _parts(history, every)]
    return tuple((step, float(mean)) for step, mean in means if math.isfinite(float(mean)))


def _parts(history: Tensor, every: int) -> list[tuple[int, Tensor]]:
    return [(i, history[i : i + every]) for i in range(0, len(history), every)]
