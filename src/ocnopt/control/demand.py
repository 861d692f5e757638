"""What a player's policy asks for, ``v + clip(K rho)``, as coefficients of the recorded columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.bellman import PROPORTIONAL
from ocnopt.control.turns import Turn

__all__ = ["demand"]


def demand(
    turn: Turn, batches: Sequence[Batch], rho: Sequence[Tensor | None], rule: str
) -> tuple[list[Tensor], bool]:
    """What the policy asks for beyond the gradient; the turn keeps what feedback came to.

    Args:
        turn: The player, whose values are known.
        batches: Recorded samples.
        rho: Per batch how far the cost directions have moved, (B,) or (B, r); None for not at all.
        rule: The recursion.

    Returns:
        Coefficients per batch, and whether they come to nothing.
    """
    excess = []
    idle = True
    for batch, (v, k), moved in zip(batches, turn.values, rho, strict=True):
        if moved is None:
            turn.feedback.append(None)
            excess.append(batch.signal_weights(v) - batch.baseline(turn.player))
            idle = idle and v is batch.v
            continue
        idle = False
        if batch.rank == 1:
            excess.append(_along_gradient(turn, batch, v, k, moved, rule))
        else:
            x = v + _columns(turn, batch, v, k, moved)
            excess.append(batch.signal_weights(x) - batch.baseline(turn.player))
    return excess, idle


def _along_gradient(
    turn: Turn, batch: Batch, v: Tensor, k: Tensor, rho: Tensor, rule: str
) -> Tensor:
    """``v - 1 + clip(K rho)`` at rank one."""
    bound = turn.bound
    if rule in PROPORTIONAL:
        # K / v is the terminal one at every player: the clipped ratio is a number per sample.
        ratio = batch.k * rho
        clipped = ratio if bound is None else ratio.clamp(-bound, bound)
        turn.feedback.append((ratio, clipped))
        return torch.addcmul(v - 1, v, clipped)
    raw = applied = k * rho
    if bound is not None:
        limit = v.abs() * bound
        applied = torch.clamp(raw, -limit, limit)
    turn.feedback.append((raw, applied, v))
    return v + (applied - 1)


def _columns(turn: Turn, batch: Batch, v: Tensor, k: Tensor, rho: Tensor) -> Tensor:
    """``clip(K rho)`` at rank r, bounded relative to the sample's open-loop term."""
    raw = (k @ rho.unsqueeze(-1)).squeeze(-1)
    trace = batch.traces.get(turn.player)
    if trace is None:
        turn.feedback.append(None)
        return raw
    ratio = trace.ratio(batch.signal_own(v), batch.signal_own(raw))
    factor = torch.ones_like(ratio)
    if turn.bound is not None:
        factor = torch.where(ratio > turn.bound, turn.bound / ratio, factor)
    turn.feedback.append((ratio, ratio * factor))
    return raw * factor[:, None]
