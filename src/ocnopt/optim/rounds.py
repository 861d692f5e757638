"""Rounds of a bandit over alignments: how long they last and what they were worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ocnopt.control.alignment import (
    Alignment,
    EpsilonGreedy,
    Exp3PlusPlus,
    Fixed,
    RandomAlignment,
    loss_reward,
)
from ocnopt.errors import OptionError

__all__ = ["Rounds", "alignment_named"]

#: Steps of a round of the bandits that are chosen by name.
ROUND = 100


def alignment_named(option: str | int | Alignment) -> Alignment:
    """The alignment that an option stands for.

    Args:
        option: An object, an index, or "auto", "early", "late", "random", "epsilon-greedy",
            "exp3++".

    Raises:
        OptionError: It stands for none.
    """
    if isinstance(option, Alignment):
        return option
    if isinstance(option, int) and not isinstance(option, bool):
        return Fixed(option)
    made: dict[str, Callable[[], Alignment]] = {
        "auto": lambda: Fixed(AUTO),
        "early": lambda: Fixed(0),
        "late": lambda: Fixed(-1),
        "random": lambda: RandomAlignment(every=ROUND),
        "epsilon-greedy": lambda: EpsilonGreedy(every=ROUND),
        "exp3++": lambda: Exp3PlusPlus(every=ROUND),
    }
    if option not in made:
        raise OptionError(
            f"alignment={option!r} is not known; choose one of {', '.join(made)}, a whole number, "
            "or an object of ocnopt.control.alignment"
        )
    return made[option]()


#: The alignment of "auto", counted from the last.
AUTO = -1


class Rounds:
    """Counts the steps of a round and rewards it by what the loss did.

    The reward compares the mean loss of the round's second half with that of its first: what came
    before the round is not the arm's doing.

    Args:
        alignment: Fixed, or a bandit.
    """

    def __init__(self, alignment: Alignment) -> None:
        self.alignment = alignment
        self.steps = 0
        self._sums = [0.0, 0.0]

    def after_step(self, loss: float) -> None:
        """A step with this loss has been taken; ends the round where it is due."""
        every = self.alignment.every
        if every is None:
            return
        half = int(self.steps >= every // 2)
        self._sums[half] += loss
        self.steps += 1
        if self.steps >= every:
            first, second = every // 2, every - every // 2
            before = self._sums[0] / first if first else math.nan
            self.end(loss_reward(before, self._sums[1] / second) if first else 0.5)

    def end(self, reward: float) -> None:
        """End the round with a reward in [0, 1]."""
        self.alignment.reward(reward)
        self.steps = 0
        self._sums = [0.0, 0.0]

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "alignment": self.alignment.state_dict(),
            "steps": self.steps,
            "sums": list(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            OptionError: It is of another kind of alignment.
        """
        self.alignment.load_state_dict(state["alignment"])
        self.steps = state["steps"]
        self._sums = list(state["sums"])
