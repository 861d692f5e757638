"""Directions in which the players of a stage are seen together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Directions"]


@dataclass(frozen=True)
class Directions:
    """Some directions of a player's coordinates (:mod:`ocnopt.curvature.frames`).

    Attributes:
        outputs: L, orthonormal columns (groups, out, s).
        inputs: R, orthonormal columns (groups, in, r).
        outputs_turned: What signals are multiplied by to be seen there, but for M's own diagonal:
            (groups, out, s).
        inputs_turned: Likewise inputs, (groups, in, r).
    """

    outputs: Tensor
    inputs: Tensor
    outputs_turned: Tensor
    inputs_turned: Tensor
