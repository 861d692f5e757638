"""What a race came to: every contender's runs, the targets, and what is read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.race.analysis import (
    Curve,
    accuracy_at,
    curve_of,
    median_ratio,
    time_to_target,
)
from ocnopt.experiments.race.plan import Race
from ocnopt.experiments.race.tune import Tuned

__all__ = ["SHARES", "Entry", "Result"]

#: Shares of the epochs, and of the shortest run's time, at which accuracies are compared.
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Entry:
    """What one contender came to.

    Attributes:
        tuned: Its tuning.
        outcomes: Its final runs by seed; none where there was no setting to run.
        curves: Theirs.
    """

    tuned: Tuned
    outcomes: tuple[Outcome, ...]
    curves: tuple[Curve, ...]

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return self.tuned.contender.label

    @property
    def sound(self) -> list[int]:
        """Places of the runs that did not diverge."""
        return [place for place, outcome in enumerate(self.outcomes) if not outcome.failed]

    @property
    def failed(self) -> int:
        """How many final runs diverged."""
        return len(self.outcomes) - len(self.sound)

    @property
    def accuracies(self) -> list[float]:
        """Final test accuracy of the runs that did not diverge."""
        return [self.outcomes[place].test_accuracy for place in self.sound]

    @property
    def losses(self) -> list[float]:
        """Their training loss over the last epoch."""
        return [loss for o in self.outcomes if (loss := o.train_loss) is not None]

    @property
    def per_step(self) -> list[float]:
        """Seconds of a step, by run; of those that came as far as an evaluation."""
        pairs = zip(self.outcomes, self.curves, strict=True)
        return [curve.seconds[-1] / o.clock[-1][0] for o, curve in pairs if o.clock[-1][0]]

    def seconds_to(self, accuracy: float) -> list[float]:
        """Seconds to an accuracy, by seed; a run that diverges after it has reached it."""
        return [time_to_target(c.seconds, c.accuracies, accuracy) for c in self.curves]

    def epochs_to(self, accuracy: float) -> list[float]:
        """Epochs to an accuracy, likewise."""
        return [time_to_target(c.epochs, c.accuracies, accuracy) for c in self.curves]

    def at_epoch(self, epoch: float) -> list[float]:
        """Accuracy after so many epochs, of the runs that had not diverged by then."""
        return _known([accuracy_at(c.epochs, c.accuracies, epoch) for c in self.curves])

    def at_second(self, second: float) -> list[float]:
        """Accuracy after so many seconds, likewise."""
        return _known([accuracy_at(c.seconds, c.accuracies, second) for c in self.curves])


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


@dataclass(frozen=True)
class Result:
    """What a race came to.

    Attributes:
        race: Its rules.
        entries: One per contender, in their order.
        per_epoch: Steps in an epoch.
        machine: What it was run on.
    """

    race: Race
    entries: tuple[Entry, ...]
    per_epoch: int
    machine: str

    @classmethod
    def of(
        cls,
        race: Race,
        tuned: Sequence[Tuned],
        outcomes: Sequence[tuple[Outcome, ...]],
        per_epoch: int,
        machine: str,
    ) -> Result:
        """Read curves off outcomes.

        Args:
            race: Its rules.
            tuned: By contender.
            outcomes: By contender, then by seed.
            per_epoch: Steps in an epoch.
            machine: What it was run on.
        """
        cpu = race.base.device == "cpu"
        entries = tuple(
            Entry(t, runs, tuple(curve_of(o, per_epoch, cpu=cpu) for o in runs))
            for t, runs in zip(tuned, outcomes, strict=True)
        )
        return cls(race, entries, per_epoch, machine)

    @property
    def clock(self) -> str:
        """Whose seconds count."""
        return "CPU seconds" if self.race.base.device == "cpu" else "seconds"

    @property
    def baseline(self) -> Entry:
        """The contender that the others are compared with."""
        return next(e for e in self.entries if e.label == self.race.baseline)

    @cached_property
    def targets(self) -> dict[float, float]:
        """Accuracies by their share of the baseline's final mean; none where that diverged."""
        finals = self.baseline.accuracies
        return {share: share * fmean(finals) for share in self.race.targets} if finals else {}

    @cached_property
    def epochs(self) -> list[float]:
        """The evaluations until :data:`SHARES` of the epochs; all runs share them."""
        grid = max((c.epochs for e in self.entries for c in e.curves), key=len, default=())
        marks = [[epoch for epoch in grid if epoch <= share * grid[-1] + 1e-9] for share in SHARES]
        return sorted({mark[-1] for mark in marks if mark and mark[-1] > 0})

    @cached_property
    def seconds(self) -> list[float]:
        """:data:`SHARES` of the time of the shortest run: no other one was over by then."""
        ends = [e.curves[place].seconds[-1] for e in self.entries for place in e.sound]
        return [share * min(ends) for share in SHARES] if ends else []

    def ratio(self, entry: Entry, accuracy: float) -> float | None:
        """Seconds to an accuracy relative to the baseline's, between medians over seeds."""
        return median_ratio(entry.seconds_to(accuracy), self.baseline.seconds_to(accuracy))

    def ratio_of_epochs(self, entry: Entry, accuracy: float) -> float | None:
        """Epochs to an accuracy, likewise."""
        return median_ratio(entry.epochs_to(accuracy), self.baseline.epochs_to(accuracy))

    def ratio_of_steps(self, entry: Entry) -> float | None:
        """Seconds of a step, likewise."""
        return median_ratio(entry.per_step, self.baseline.per_step)

    @property
    def unsteadiness(self) -> float | None:
        """The greatest ratio of two seeds' seconds of a step; None where none has two seeds."""
        steps = [times for e in self.entries if len(times := e.per_step) > 1]
        return max((max(times) / min(times) for times in steps if min(times) > 0), default=None)

    @property
    def busiest(self) -> float | None:
        """The greatest ratio of wall-clock to CPU seconds of a run; None on a GPU."""
        ends = [o.clock[-1] for e in self.entries for o in e.outcomes]
        ratios = [wall / cpu for _, cpu, wall in ends if cpu > 0]
        return max(ratios) if ratios and self.race.base.device == "cpu" else None
