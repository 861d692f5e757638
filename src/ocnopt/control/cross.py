"""Kronecker factors across two players: running means that fit their own.

``A_nm = E[a_n a_m^T]`` and ``B_nm = locations * E[V_h,n V_h,m^T]`` belong beside each player's own
factors in one matrix, which is positive definite if all of it is a mean over the same samples. But
players meet, part and meet again, as alignments change or layers are frozen. A refresh that they
did not share therefore counts as one at which they had nothing in common: what comes of that is a
sum of covariances still.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from ocnopt.control.turns import Moments, Turn
from ocnopt.curvature.base import State
from ocnopt.curvature.kronecker import Factored

__all__ = ["cross_factors", "update_cross_factors"]


def update_cross_factors(turns: list[Turn], rule: Factored, moments: Moments) -> None:
    """Update the pairs that refreshed their own factors in this step, both of them.

    Factors are kept in the state of a pair's first player, by the second's place in the model.

    Args:
        turns: The players.
        rule: Their preconditioner.
        moments: Returns the batch's factors of pairs.
    """
    fresh = [turn for turn in turns if rule.refreshed(_state(turn))]
    pairs = list(combinations(fresh, 2))
    for (one, other), found in zip(pairs, moments(pairs) if pairs else (), strict=True):
        missed = max(_missed(one, other, rule), _missed(other, one, rule))
        new = _refreshes(_state(one), rule) == _refreshes(_state(other), rule) == 0
        for factor, batch in zip("AB", found, strict=True):
            key = f"{factor}:{other.player.index}"
            kept = _state(one).get(key)
            if kept is None:
                value = batch if new else (1 - rule.decay) * batch
            else:
                value = torch.lerp(batch, kept * rule.decay**missed, rule.decay)
            _state(one)[key] = _shared(value, _state(one)[factor])
        for mine, theirs in ((one, other), (other, one)):
            _state(mine)[f"met:{theirs.player.index}"] = _refreshes(_state(mine), rule)


def _shared(value: Tensor, own: Tensor) -> Tensor:
    """A player's own factor where that of the pair is the same: of inputs that both read."""
    return own if value.shape == own.shape and torch.equal(value, own) else value


def cross_factors(one: Turn, other: Turn) -> tuple[Tensor, Tensor] | None:
    """``A_nm`` and ``B_nm``, or None if the two have not met."""
    state, index = _state(one), other.player.index
    return (state[f"A:{index}"], state[f"B:{index}"]) if f"A:{index}" in state else None


def _state(turn: Turn) -> State:
    return turn.mover.states[0]


def _refreshes(state: State, rule: Factored) -> int:
    """How often a player has refreshed its factors before the last time."""
    return int(state["step"] - 1) // rule.update_every


def _missed(one: Turn, other: Turn, rule: Factored) -> int:
    """Refreshes of a player since it last met another, this one not counted."""
    met = _state(one).get(f"met:{other.player.index}")
    return 0 if met is None else _refreshes(_state(one), rule) - int(met) - 1
