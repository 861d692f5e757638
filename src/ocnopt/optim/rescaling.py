"""Seeing what the loop did to gradients between ``backward`` and ``step``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ocnopt.control.record import Recorder, sample_of
from ocnopt.control.sweep import Stage
from ocnopt.optim.parallel import mean_over, processes

__all__ = ["measure_scales"]


def measure_scales(stages: Sequence[Stage], recorder: Recorder) -> None:
    """Set every mover's scale: the factor by which clipping or unscaling changed its gradient.

    The recorded signals know nothing of it, so a few entries of one gradient per player are
    compared with what autograd made them.
    """
    pairs = [
        (stage, made, sample_of(stage.player.params[-1]))
        for stage in stages
        if (made := recorder.samples[stage.player.index]) is not None
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
    for (stage, _, _), product, square in zip(pairs, products, squares, strict=True):
        own = product / square if square > 0 else common
        # Rounding apart, clipping and unscaling have one factor for all players.
        close = abs(own - common) <= 1e-3 * abs(common)
        stage.mover.scale = common if close else own
