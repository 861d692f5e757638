"""Seeing what the loop did to gradients between ``backward`` and ``step``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.record import sample_of
from ocnopt.control.turns import Turn
from ocnopt.optim.parallel import mean_over, processes

__all__ = ["loss_unit", "measure_scales", "unscaling"]


def measure_scales(turns: Sequence[Turn], samples: Mapping[Tensor, Tensor]) -> None:
    """Set every mover's scale: the factor by which clipping or unscaling changed its gradient.

    A change that is no common factor (a mask, a clip by value) marks the mover as edited.

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
    before, after = before.double(), after.double()
    products = [float(x.sum()) for x in (before * after).split(sizes)]
    squares = [float(x.sum()) for x in (before * before).split(sizes)]
    total = sum(squares)
    common = sum(products) / total if total > 0 else 1.0
    factors: dict[int, list[float]] = {}
    for (turn, _, _), product, square in zip(pairs, products, squares, strict=True):
        both = factors.setdefault(id(turn), [0.0, 0.0])
        both[0] += product
        both[1] += square
    for turn in turns:
        product, square = factors.get(id(turn), (0.0, 0.0))
        own = product / square if square > 0 else common
        # Rounding apart, clipping and unscaling have one factor for all players.
        close = abs(own - common) <= 1e-3 * abs(common)
        scale = common if close else own
        # What is not finite is no rescaling: the update will say which gradient it is.
        turn.mover.scale = scale if math.isfinite(scale) else 1.0
    for (turn, _, now), old in zip(pairs, before.split(sizes), strict=True):
        rest = now.double() - turn.mover.scale * old
        turn.mover.edited |= float(rest.abs().max()) > 1e-2 * float(now.abs().max())


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


def _whole(scale: float) -> bool:
    """Whether a factor is a power of two."""
    exponent = math.log2(scale)
    return abs(exponent - round(exponent)) < 1e-3
