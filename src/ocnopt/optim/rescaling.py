"""Seeing what the loop did to gradients between ``backward`` and ``step``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.sampled import sample_of
from ocnopt.control.turns import Turn
from ocnopt.optim.parallel import mean_over, processes

__all__ = ["loss_unit", "measure_scales", "unscale", "unscaling"]


def measure_scales(turns: Sequence[Turn], samples: Mapping[Tensor, Tensor]) -> None:
    """Set every mover's scale: the factor by which clipping or unscaling changed its gradient.

    A change that is no common factor (a mask, a clip by value) marks the mover as edited, where it
    is seen: one of a twentieth of the entries escapes with a chance of one in half a million.

    The recorded signals know nothing of it, so a few entries of every gradient are compared with
    what autograd made them.

    Args:
        turns: Players and their movers.
        samples: By parameter, what ``sample_of`` gave when autograd had accumulated the gradient.
    """
    pairs = [
        (turn, made, sample_of(param))
        for turn in turns
        for param in turn.player.params
        if param.grad is not None and (made := samples.get(param)) is not None
    ]
    if not pairs:
        return
    before = torch.cat([made for _, made, _ in pairs])
    after = torch.cat([now for _, _, now in pairs])
    if processes() > 1:
        (before,) = mean_over((before,))
    elif torch.equal(before, after):
        return
    sizes = [made.numel() for _, made, _ in pairs]
    rounding = max(torch.finfo(made.dtype).eps for _, made, _ in pairs)
    before, after = before.double(), after.double()
    squares = before * before
    # A mask has the factor of what it leaves.
    kinds = (before * after, squares * (after != 0), squares)
    sums = torch.stack([torch.stack([x.sum() for x in kind.split(sizes)]) for kind in kinds], 1)
    common = _factor(sums.sum(0).tolist(), 1.0)
    factors: dict[int, list[float]] = {}
    for (turn, _, _), found in zip(pairs, sums.tolist(), strict=True):
        known = factors.get(id(turn), [0.0, 0.0, 0.0])
        factors[id(turn)] = [a + b for a, b in zip(known, found, strict=True)]
    for turn in turns:
        own = _factor(factors.get(id(turn), [0.0, 0.0, 0.0]), common)
        # Rounding apart, clipping and unscaling have one factor for all players.
        close = abs(own - common) <= max(1e-3, rounding) * abs(common)
        scale = common if close else own
        # What is not finite is no rescaling: the update will say which gradient it is.
        turn.mover.scale = scale if math.isfinite(scale) else 1.0
    for (turn, _, _), old, now in zip(pairs, before.split(sizes), after.split(sizes), strict=True):
        rest = now - turn.mover.scale * old
        unlike = rest.abs().max() > max(1e-2, 2 * rounding) * now.abs().max()
        wiped = (now == 0) & (old.abs() > rounding * old.abs().max())
        turn.mover.edited |= bool(unlike | wiped.any())


def _factor(sums: list[float], unknown: float) -> float:
    """A factor from sums of ``before * after``, of ``before ** 2`` where left, and everywhere."""
    product, left, made = sums
    if left > 0:
        return product / left
    return 0.0 if made > 0 else unknown


def loss_unit(scale: float, batches: Sequence[Batch]) -> float:
    """What takes the total of recorded costs back to the process's own loss before a loss scaler.

    Args:
        scale: The factor by which gradients were rescaled.
        batches: The samples with their weights.
    """
    here = processes()
    factor = unscaling(scale)
    if factor < 1 and not _whole(scale):
        # Clipped, too, by an unknown factor; but most loops' weights add to about one.
        weights = sum(float(torch.as_tensor(b.weight).mean()) * b.samples for b in batches)
        if weights > 0:
            factor = min(1.0, max(factor, 2.0 ** -round(math.log2(weights * here))))
    return factor * here


def unscaling(scale: float) -> float:
    """The part of a gradient's rescaling that the curvature has to follow.

    A loss scaler multiplies by a power of two and takes it back. Whatever else rescales a gradient
    (clipping) is meant to shorten the step, which a curvature that shrank with it would undo.
    """
    if scale <= 0:
        return 1.0
    exponent = math.log2(scale)
    if _whole(scale):
        return 2.0 ** round(exponent)
    # Both at once cannot be told apart: a clip by less than a half is assumed, and that no clip
    # alone goes as far.
    return 2.0 ** math.ceil(exponent) if scale < 2**-8 else 1.0


def unscale(batches: Sequence[Batch], scale: float) -> None:
    """Take a loss scaler back where no criterion was called, whose gradient would have shown it.

    Args:
        batches: The samples, whose weights are changed.
        scale: The factor by which gradients were rescaled.
    """
    factor = unscaling(scale)
    for batch in batches if factor != 1 else []:
        if batch.source is None or all(call.scale is None for call in batch.source.calls):
            batch.weight, batch.lift = batch.weight / factor, batch.lift * factor


def _whole(scale: float) -> bool:
    """Whether a factor is a power of two."""
    exponent = math.log2(scale)
    return abs(exponent - round(exponent)) < 1e-3
