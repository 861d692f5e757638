"""The few directions of an eigenbasis in which M is more than its damping.

Most eigenvalues are far below the damping. What a gradient has in their directions is known from
its norm, and need not be looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ocnopt.curvature.directions import Directions

__all__ = ["Salient", "salient"]

#: Below so many multiplications per gradient, all of it is faster rotated than looked through.
SMALL = 1 << 18


@dataclass(frozen=True)
class Salient:
    """Where M is looked at entry by entry.

    Attributes:
        inputs: Columns of U_A, (groups, in, i).
        outputs: Columns of U_B, (groups, out, o).
        scales: M there, (groups, o, i).
        floor: M in all other directions; None where there are none.
        at: Indices of the outputs and of the inputs, or None.
    """

    inputs: Tensor
    outputs: Tensor
    scales: Tensor
    floor: Tensor | None = None
    at: tuple[Tensor, Tensor] | None = None

    def turned(self, matrix: Tensor) -> Tensor:
        """``U_B^T D U_A`` in these directions, (..., groups, o, i)."""
        return self.outputs.mT @ (matrix @ self.inputs)

    def gram(self, turned: Tensor, whole: Callable[[], Tensor]) -> Tensor:
        """Gram matrices of gradients under ``M^-1``, (B, r, r).

        Args:
            turned: The gradients in these directions, (B, r, groups, o, i).
            whole: The gradients' Gram matrices in all directions.
        """
        kept = turned.flatten(2)
        product = kept @ (kept / self.scales.flatten()).mT
        if self.floor is not None:
            product += rest(whole(), squares(kept)) / self.floor
        return product

    def seen(self, turned: Tensor, other: Tensor | None, where: Directions) -> Tensor:
        """``L^T [(U_B^T D U_A) / sqrt(M)] R``, (..., groups, s, r).

        Args:
            turned: The gradients in these directions.
            other: ``L^T (U_B^T D U_A) R``, where there are other directions than these.
            where: L and R.
        """
        left, right = self.within(where)
        part = left.mT @ ((turned * self.weights) @ right)
        if self.floor is None:
            return part
        assert other is not None
        return part + other / self.floor.sqrt()

    @cached_property
    def weights(self) -> Tensor:
        """``1 / sqrt(M)``, less what it is in all other directions."""
        own = self.scales.rsqrt()
        return own if self.floor is None else own - self.floor.rsqrt()

    def within(self, where: Directions) -> tuple[Tensor, Tensor]:
        """L and R in these directions alone, (groups, o, s) and (groups, i, r)."""
        if self.at is None:
            return where.outputs, where.inputs
        outputs, inputs = self.at
        return where.outputs[:, outputs], where.inputs[:, inputs]


def salient(basis_a: Tensor, basis_b: Tensor, scales: Tensor, tolerance: float) -> Salient:
    """Where M is more than its smallest entry.

    Without it in every other direction, an error of at most the tolerance in Gram numbers.

    Args:
        basis_a: U_A, (groups, in, in).
        basis_b: U_B, (groups, out, out).
        scales: M, (groups, out, in).
        tolerance: A relative error; 0 for all directions.
    """
    everything = Salient(basis_a, basis_b, scales)
    _, out, into = scales.shape
    if not tolerance or out * into * (out + into) < SMALL:
        return everything
    floor, most = scales.aminmax()
    # The rest is a difference of squares, whose rounding the floor magnifies.
    if float(most / floor) * _rounding(scales) > 0.1 * tolerance:
        return everything
    above = scales > floor * (1 + tolerance)
    inputs = above.any(0).any(0).nonzero()[:, 0]
    outputs = above.any(0).any(1).nonzero()[:, 0]
    if len(inputs) * len(outputs) > out * into / 2:
        return everything
    return Salient(
        basis_a[:, :, inputs],
        basis_b[:, :, outputs],
        scales[:, outputs[:, None], inputs],
        floor,
        (outputs, inputs),
    )


def squares(vectors: Tensor) -> Tensor:
    """Inner products of vectors (B, r, n) with each other, (B, r, r)."""
    if vectors.shape[1] == 1:  # summed in pairs, where a product of matrices adds one by one
        return vectors.square().sum(-1, keepdim=True)
    return vectors @ vectors.mT


def rest(whole: Tensor, kept: Tensor) -> Tensor:
    """What is left of inner products; of one vector with itself it is not below zero."""
    left = whole - kept
    return left.clamp_min(0) if left.shape[-1] == 1 else left


def _rounding(scales: Tensor) -> float:
    """Relative rounding of a gradient's norm and of its rotation: a few units in the last place."""
    eps = torch.finfo(scales.dtype).eps
    reduced = torch.get_float32_matmul_precision() != "highest"
    if scales.device.type == "cuda" and scales.dtype == torch.float32 and reduced:
        eps = 2.0**-11
    return 8 * eps
