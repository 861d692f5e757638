"""What a race is: the problem, who runs, and the rules, all of them fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.sensitivity import MOST
from ocnopt.experiments.race.contender import Contender
from ocnopt.experiments.tuning import VALIDATION

__all__ = ["Paper", "Race"]


@dataclass(frozen=True)
class Paper:
    """What a paper reports of the same race.

    Attributes:
        source: Where its figures are from, and how exact they are.
        accuracy: Final test accuracy in %, by contender's label.
        seconds: By accuracy in %, then by label: the seconds to it.
    """

    source: str
    accuracy: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[float, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Race:
    """Optimizers on one problem, tuned alike, against the clock.

    Attributes:
        title: Heading of the page.
        base: Data, network, batch size and length of every run. Its optimizer, learning rate and
            seed do not count; runs are on one thread.
        contenders: One to eight, with as many candidates each.
        baseline: Label of the one that sets the targets and that others are compared with.
        seeds: Final runs of each contender.
        tuning_seeds: Runs of each candidate, from other seeds.
        tuning_epochs: Length of these; None for that of the final runs.
        validation: Share of the training set that candidates are compared on.
        evaluate_every: Epochs from one evaluation to the next.
        targets: Shares of the baseline's final accuracy, ascending, in (0, 1].
        headline: The one of them that the sentence is about.
        claim: What the paper says; empty where it says nothing.
        paper: Its figures, where they are known.
        notes: What a reader has to know besides.

    Raises:
        InputError: Contenders are too many, not treated alike or not told apart, or a number is
            out of its range.
    """

    title: str
    base: TrainConfig
    contenders: tuple[Contender, ...]
    baseline: str = "adam"
    seeds: int = 3
    tuning_seeds: int = 1
    tuning_epochs: int | None = None
    validation: float = VALIDATION
    evaluate_every: float = 0.25
    targets: tuple[float, ...] = (0.9, 0.95, 0.98, 1.0)
    headline: float = 0.98
    claim: str = ""
    paper: Paper | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check all of it."""
        labels = [c.label for c in self.contenders]
        if not 1 <= len(labels) <= MOST:
            raise InputError(f"a race has 1 to {MOST} contenders, not {len(labels)}")
        if len(set(labels)) < len(labels):
            raise InputError(f"contenders need labels of their own, not {', '.join(labels)}")
        counts = {c.label: c.candidates for c in self.contenders}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{label} {count}" for label, count in counts.items())
            raise InputError(f"every contender must have as many candidates, to be fair: {listed}")
        if self.baseline not in labels:
            raise InputError(f"the baseline {self.baseline!r} is none of {', '.join(labels)}")
        for name in ("seeds", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.validation < 1:
            raise InputError(f"validation must be a share in (0, 1), not {self.validation}")
        ascending = sorted(set(self.targets)) == list(self.targets)
        if not ascending or not all(0 < share <= 1 for share in self.targets):
            raise InputError(f"targets must be ascending shares in (0, 1], not {self.targets}")
        if self.headline not in self.targets:
            raise InputError(f"headline must be one of the targets, not {self.headline}")
        if self.paper is not None:
            named = {*self.paper.accuracy, *(n for row in self.paper.seconds.values() for n in row)}
            if named - set(labels):
                raise InputError(
                    f"the paper's figures name {', '.join(sorted(named - set(labels)))}, which is"
                    f" none of {', '.join(labels)}"
                )

    @property
    def fixed(self) -> bool:
        """Whether every contender has a single setting, so that there is nothing to choose."""
        return all(c.candidates == 1 for c in self.contenders)

    @property
    def trials(self) -> int:
        """Runs that are needed to choose."""
        return 0 if self.fixed else self.tuning_seeds * sum(c.candidates for c in self.contenders)

    @property
    def final(self) -> TrainConfig:
        """What final runs share, resolved: the whole training set, tested on the test set."""
        plain = replace(
            self.base,
            optimizer="sgd",
            lr=None,
            options={},
            validation=0.0,
            output=None,
            resume=False,
            curve=False,
            threads=1,
            evaluate_every=self.evaluate_every,
        )
        return plain.resolved()

    @property
    def tuning(self) -> TrainConfig:
        """What candidates' runs share, resolved: tested on the validation share."""
        base = replace(self.final, validation=self.validation)
        if self.tuning_epochs is None:
            return base
        return replace(base, epochs=self.tuning_epochs, steps=None)
