"""Rounds of a bandit over alignments: how long they last and what they were worth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

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

#: The alignment of "auto", counted from the last.
AUTO = -1

#: Whose rounds an alignment is played in; neither keeps the other alive.
_PLAYED: WeakKeyDictionary[Alignment, ref[Rounds]] = WeakKeyDictionary()


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
        return Fixed(option, option="alignment")
    made: dict[str, Callable[[], Alignment]] = {
        "auto": lambda: Fixed(AUTO),
        "early": lambda: Fixed(0),
        "late": lambda: Fixed(-1),
        "random": lambda: RandomAlignment(every=ROUND),
        "epsilon-greedy": lambda: EpsilonGreedy(every=ROUND),
        "exp3++": lambda: Exp3PlusPlus(every=ROUND),
    }
    possible = f"{', '.join(made)}, a whole number, or an object of ocnopt.control.alignment"
    if not isinstance(option, str):
        mapping = " (mappings are for Game.stages alone)" if isinstance(option, Mapping) else ""
        raise OptionError(
            f"alignment={option!r} cannot be a {type(option).__name__}{mapping}; choose one of "
            f"{possible}"
        )
    if option not in made:
        raise OptionError(f"alignment={option!r} is not known; choose one of {possible}")
    return made[option]()


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

    def take(self) -> None:
        """Have the alignment for these rounds alone, as long as they last.

        Raises:
            OptionError: Another optimizer plays it.
        """
        player = _PLAYED.get(self.alignment)
        if player is not None and player() not in (None, self):
            raise OptionError(
                f"alignment: this {type(self.alignment).__name__} is played by another optimizer, "
                "and a round is of one; give each an object of its own"
            )
        _PLAYED[self.alignment] = ref(self)

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
            "every": self.alignment.every,
            "steps": self.steps,
            "sums": list(self._sums),
        }

    def require_loadable(self, state: Mapping[str, Any], arms: int | None) -> None:
        """Raise unless a state can be loaded; nothing is changed.

        Args:
            state: What `state_dict` gave.
            arms: How many alignments there are; None where that is not known yet.

        Raises:
            OptionError: It is of another kind of alignment, or of another number of them.
        """
        trial = copy.deepcopy(self.alignment)
        trial.load_state_dict(state["alignment"])
        if arms is not None:
            trial.start(arms)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; where rounds have another length now, the open one begins anew.

        Raises:
            OptionError: It is of another kind of alignment.
        """
        self.alignment.load_state_dict(state["alignment"])
        same = state.get("every") == self.alignment.every
        self.steps = state["steps"] if same else 0
        self._sums = list(state["sums"]) if same else [0.0, 0.0]
