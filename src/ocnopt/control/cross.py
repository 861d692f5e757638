"""Kronecker factors across two players: running means that fit their own.

``A_nm = E[a_n a_m^T]`` and ``B_nm = locations * E[V_h,n V_h,m^T]`` belong beside each player's own
factors in one matrix, which is positive definite if all of it is a mean over the same samples. But
players meet, part and meet again, as alignments change or layers are frozen. A refresh that they
did not share therefore counts as one at which they had nothing in common: what comes of that is a
sum of covariances still.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ocnopt.control.turns import Moments, Turn
from ocnopt.curvature.base import State
from ocnopt.curvature.kronecker import Factored

__all__ = ["Cross", "cross_factors", "update_cross_factors"]


def update_cross_factors(turns: list[Turn], rule: Factored, moments: Moments) -> None:
    """Update the pairs that refreshed their own factors in this step, both of them.

    Factors are kept in the state of a pair's first player, by the second's name.

    Args:
        turns: The players.
        rule: Their preconditioner.
        moments: Returns the batch's factors of pairs.
    """
    fresh = [turn for turn in turns if rule.refreshed(_state(turn))]
    pairs = list(combinations(fresh, 2))
    for (one, other), found in zip(pairs, moments(pairs) if pairs else (), strict=True):
        missed = _missed(one, other) - 1
        new = _state(one)["refreshes"] == _state(other)["refreshes"] == 1
        for factor, batch in zip("AB", found, strict=True):
            key = _key(factor, other)
            kept = _state(one).get(key)
            if kept is None:
                value = batch if new else (1 - rule.decay) * batch
            else:
                value = torch.lerp(batch, kept * rule.decay**missed, rule.decay)
            _state(one)[key] = _shared(value, _state(one)[factor])
        for mine, theirs in ((one, other), (other, one)):
            _state(mine)[_key("met", theirs)] = _state(mine)["refreshes"]


def _shared(value: Tensor, own: Tensor) -> Tensor:
    """A player's own factor where that of the pair is the same: of inputs that both read."""
    return own if value.shape == own.shape and torch.equal(value, own) else value


def cross_factors(one: Turn, other: Turn, rule: Factored) -> Cross | None:
    """What two players had in common when they last met; None if they have not met."""
    state = _state(one)
    kept = [state.get(_key(factor, other)) for factor in "AB"]
    if kept[0] is None or kept[1] is None:
        return None
    return Cross(kept[0], kept[1], rule.decay ** _missed(one, other))


@dataclass(frozen=True)
class Cross:
    """Factors across two players.

    Attributes:
        a: ``A_nm`` as it was when they last met.
        b: ``B_nm``.
        left: What is left of either since.
    """

    a: Tensor
    b: Tensor
    left: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A_nm`` and ``B_nm`` as they are now."""
        return (self.a, self.b) if self.left == 1 else (self.a * self.left, self.b * self.left)


def _state(turn: Turn) -> State:
    return turn.mover.states[0]


def _key(what: str, other: Turn) -> str:
    return f"{what} with {other.player.name}"


def _missed(one: Turn, other: Turn) -> int:
    """Refreshes since two players last met, of the one who had more of them."""
    found = 0
    for mine, theirs in ((one, other), (other, one)):
        state = _state(mine)
        met = state.get(_key("met", theirs))
        found = max(found, 0 if met is None else state["refreshes"] - int(met))
    return found
