"""Say in words what a comparison of two optimizers showed, from its numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal


@dataclass(frozen=True)
class Scores:
    """What one optimizer came to at one learning rate, by seed.

    Attributes:
        losses: Training loss over the last epoch, one per seed; NaN for a run that diverged.
        accuracies: Test accuracy in [0, 1], one per seed.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """The same seeds with and without feedback at one learning rate.

    Attributes:
        lr: The learning rate.
        plain: Scores of the optimizer without feedback.
        feedback: Scores of the one with it, seed by seed.
    """

    lr: float
    plain: Scores
    feedback: Scores

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.plain.losses)

    @property
    def lower(self) -> int:
        """On how many seeds the loss is lower with feedback."""
        return sum(f < p for p, f in self._pairs())

    @property
    def higher(self) -> int:
        """On how many seeds the loss is higher with feedback."""
        return sum(f > p for p, f in self._pairs())

    @property
    def verdict(self) -> Literal["helped", "hurt", "unclear"]:
        """What feedback did.

        It helped where the loss is lower on every seed and the mean test accuracy not lower, it
        hurt in the opposite case, and all else is unclear.
        """
        gain = fmean(self.feedback.accuracies) - fmean(self.plain.accuracies)
        if self.lower == self.seeds and gain >= 0:
            return "helped"
        if self.higher == self.seeds and gain <= 0:
            return "hurt"
        return "unclear"

    def _pairs(self) -> list[tuple[float, float]]:
        # A run that diverged lost to every run that did not.
        losses = zip(self.plain.losses, self.feedback.losses, strict=True)
        return [(_or_inf(plain), _or_inf(feedback)) for plain, feedback in losses]


_WORDS = {
    "helped": "feedback helped",
    "hurt": "feedback did not help, it hurt",
    "unclear": "feedback made no clear difference",
}


def sentence(comparisons: Sequence[Comparison], plain: str, feedback: str) -> str:
    """Say what was seen at every learning rate, in one sentence.

    Args:
        comparisons: One or more, each with one or more seeds.
        plain: Name of the optimizer without feedback.
        feedback: Name of the one with it.
    """
    parts = [
        f"at learning rate {c.lr:g} {_WORDS[c.verdict]} ({feedback} against {plain}: training loss"
        f" {mean_loss(c.feedback)} against {mean_loss(c.plain)}, lower on {c.lower} of {c.seeds}"
        f" seeds, test accuracy {100 * fmean(c.feedback.accuracies):.1f} % against"
        f" {100 * fmean(c.plain.accuracies):.1f} %)"
        for c in comparisons
    ]
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def mean_loss(scores: Scores) -> str:
    """Mean loss over seeds, or on how many of them the run diverged."""
    diverged = sum(not math.isfinite(loss) for loss in scores.losses)
    if diverged:
        return f"diverged on {diverged} of {len(scores.losses)} seeds"
    return f"{fmean(scores.losses):.3f}"


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def _or_inf(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
