"""The inverse of a preconditioner that is diagonal in a Kronecker-factored eigenbasis."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ocnopt.curvature.metric import (
    Metric,
    Rates,
    by_group,
    each_column,
    gram_of,
    over_locations,
)

if TYPE_CHECKING:
    from ocnopt.layers.base import Params
    from ocnopt.layers.linear import LinearLayer

__all__ = ["Eigen", "rotated_factors"]

#: Below so many entries a matrix is faster multiplied than looked through.
SMALL = 1 << 11


class Eigen(Metric):
    """``M`` diagonal in a Kronecker-factored eigenbasis (George et al. 2018).

    Args:
        rates: As above; all equal.
        layer: The layer.
        basis_a: Orthonormal columns (groups, in, in).
        basis_b: (groups, out, out).
        scales: Eigenvalues with damping added, (groups, out, in).
        tolerance: Relative error allowed in Gram numbers. Most eigenvalues are far below the
            damping: what a gradient has in their directions is known from its norm, and need not
            be looked at one by one.
    """

    def __init__(
        self,
        rates: Rates,
        layer: object,
        basis_a: Tensor,
        basis_b: Tensor,
        scales: Tensor,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(rates)
        self.tolerance = tolerance
        self.layer: LinearLayer = layer  # type: ignore[assignment]
        self.basis_a = basis_a
        self.basis_b = basis_b
        self.scales = scales
        self._rotated: tuple[Params, Tensor] | None = None
        self._turned: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def rotate(self, params: Params) -> Tensor:
        """``U_B^T D U_A``, (..., groups, out, in).

        The last result is kept: without feedback the direction is what the eigenvalues were
        corrected with.
        """
        if self._rotated is None or self._rotated[0] is not params:
            matrix = self.layer.to_matrix(params).to(self.basis_b.dtype)
            turned = self.basis_b.transpose(-1, -2) @ matrix @ self.basis_a
            self._rotated = (params, turned)
        return self._rotated[1]

    def turn_factors(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of gradients ``P_h [a; 1]^T`` in the eigenbasis; the last result is kept.

        Args:
            layer: A linear layer.
            a: Inputs (B, in).
            columns: (r, B, out).

        Returns:
            ``[a; 1] U_A`` (B, in), ``P_h U_B`` (r, B, out).
        """
        if self._turned is None or self._turned[0] is not a or self._turned[1] is not columns:
            dtype = self.basis_a.dtype
            rows = layer.times(layer.homogeneous(a).to(dtype), self.basis_a)
            self._turned = (a, columns, rows, each_column(layer, columns.to(dtype), self.basis_b))
        return self._turned[2:]

    def sample_gram(self, gradients: Params) -> Tensor:
        """Per-sample gradients are rotated once; in the eigenbasis M is diagonal."""
        matrix = self.layer.to_matrix(gradients).to(self.basis_b.dtype)
        basis_a, basis_b, scales, floor = self._salient
        turned = basis_b.mT @ (matrix @ basis_a)
        gram = _gram_in_basis(turned, scales, floor, lambda: _squares(matrix.flatten(2)))
        return gram.to(gradients[0].dtype) * self.rates[0]

    def factor_gram(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Gradients are formed in the eigenbasis, of rotated factors, where M is diagonal."""
        rows, cols = rows.to(self.basis_a.dtype), cols.to(self.basis_a.dtype)
        basis_a, basis_b, scales, floor = self._salient
        turned = rotated_factors(rows, cols, basis_a, basis_b)
        whole = partial(over_locations, rows, rows, cols, cols)
        return _gram_in_basis(turned, scales, floor, whole) * self.rates[0]

    def sample_gram_and_rotated(self, gradients: Params, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`sample_gram`, and the rotated gradients at some coordinates of the inputs.

        What both look at is rotated once.

        Args:
            gradients: (B, r, *parameter).
            inputs: Indices in ascending order.

        Returns:
            (B, r, r) and (B, r, groups, out, kept).
        """
        matrix = self.layer.to_matrix(gradients).to(self.basis_b.dtype)
        basis_a, scales, floor, at = self._salient_and(inputs)
        turned = self.basis_b.mT @ (matrix @ basis_a)
        gram = _gram_in_basis(turned, scales, floor, lambda: _squares(matrix.flatten(2)))
        return gram.to(gradients[0].dtype) * self.rates[0], turned[..., at]

    def factor_gram_and_rotated(
        self, rows: Tensor, cols: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of gradients by their factors, as in :meth:`factor_gram`."""
        rows, cols = rows.to(self.basis_a.dtype), cols.to(self.basis_a.dtype)
        basis_a, scales, floor, at = self._salient_and(inputs)
        turned = rotated_factors(rows, cols, basis_a, self.basis_b)
        whole = partial(over_locations, rows, rows, cols, cols)
        gram = _gram_in_basis(turned, scales, floor, whole)
        return gram * self.rates[0], turned[..., at]

    @cached_property
    def _directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where M is more than its smallest entry: inputs and outputs; and that entry.

        Without it in every other direction, an error of at most ``tolerance`` in Gram numbers; None
        where all directions are kept.
        """
        if not self.tolerance or self.scales[0].numel() < SMALL:
            return None
        floor, most = self.scales.aminmax()
        # The rest is a difference of squares, whose rounding the floor magnifies.
        if float(most / floor) * _rounding(self.scales) > 0.1 * self.tolerance:
            return None
        above = self.scales > floor * (1 + self.tolerance)
        inputs = above.any(0).any(0).nonzero()[:, 0]
        outputs = above.any(0).any(1).nonzero()[:, 0]
        if len(inputs) * len(outputs) > above.shape[1] * above.shape[2] / 2:
            return None
        return inputs, outputs, floor

    @cached_property
    def _salient(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Bases and scales in those directions, and the smallest entry."""
        if self._directions is None:
            return self.basis_a, self.basis_b, self.scales, None
        inputs, outputs, floor = self._directions
        return (
            self.basis_a[:, :, inputs],
            self.basis_b[:, :, outputs],
            self.scales[:, outputs[:, None], inputs],
            floor,
        )

    def _salient_and(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """For all outputs, and salient inputs along with some others.

        Returns:
            The inputs' basis, the scales, M's smallest entry as in :attr:`_salient`, and where the
            inputs asked for are among those returned.
        """
        if self._directions is None:
            return self.basis_a, self.scales, None, inputs
        salient, _, floor = self._directions
        columns = torch.cat((salient, inputs)).unique()
        at = torch.searchsorted(columns, inputs)
        return self.basis_a[:, :, columns], self.scales[:, :, columns], floor, at

    def solve(self, params: Params) -> Params:
        """``U_B [(U_B^T D U_A) / scales] U_A^T``."""
        return self._turn_back(self.rotate(params), params[0].dtype)

    def solve_sum(self, base: Params, parts: list[tuple[Tensor, Tensor]]) -> Params:
        """``M^-1 (D + sum of g^T a)``, which is never formed.

        Args:
            base: D.
            parts: Rotated factors of what is added: ``a`` (B, in) and ``g`` (B, out).
        """
        turned = self.rotate(base)
        for rows, cols in parts:
            turned = torch.baddbmm(turned, cols.mT[None], rows[None])
        return self._turn_back(turned, base[0].dtype)

    def _turn_back(self, turned: Tensor, dtype: torch.dtype) -> Params:
        """``U_B (turned / scales) U_A^T``."""
        work = self.basis_b @ (turned / self.scales) @ self.basis_a.transpose(-1, -2)
        return self.layer.from_matrix(work.to(dtype))

    def outer_gram(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> Tensor:
        """The diagonal's formula, on rotated factors."""
        dtype = self.basis_a.dtype
        basis_a, basis_b, scales, floor = self._salient
        if floor is None:
            rows, turned = self.turn_factors(layer, a, columns)
        else:
            inputs, signals = layer.homogeneous(a).to(dtype), columns.to(dtype)
            rows = layer.times(inputs, basis_a)
            turned = each_column(layer, signals, basis_b)
        squares = rows.square()
        product = gram_of(turned, turned * layer.times(squares, scales.reciprocal().mT))
        if floor is not None:
            whole = torch.linalg.vecdot(inputs, inputs)[:, None, None] * gram_of(signals, signals)
            kept = squares.sum(-1)[:, None, None] * gram_of(turned, turned)
            product = product + _rest(whole, kept) / floor
        return product.to(columns.dtype) * self.rates[0]


def rotated_factors(rows: Tensor, cols: Tensor, basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Per-sample gradients, sums of outer products over locations, between two bases.

    Args:
        rows: Inputs (groups, B, L, in).
        cols: Columns (r, groups, B, L, out).
        basis_a: (groups, in, k).
        basis_b: (groups, out, m).

    Returns:
        (B, r, groups, m, k).
    """
    turned = by_group(cols, basis_b).mT @ by_group(rows, basis_a)
    return turned.permute(2, 0, 1, 3, 4)


def _gram_in_basis(
    turned: Tensor, scales: Tensor, floor: Tensor | None, whole: Callable[[], Tensor]
) -> Tensor:
    """Gram matrices of gradients (B, r, groups, out, in) under a diagonal of the eigenbasis.

    Args:
        turned: The gradients, rotated, in the directions that are looked at one by one.
        scales: M there.
        floor: M in all other directions; None where there are none.
        whole: The gradients' Gram matrices in all directions.
    """
    kept = turned.flatten(2)
    product = kept @ (kept / scales.flatten()).mT
    if floor is not None:
        product += _rest(whole(), _squares(kept)) / floor
    return product


def _squares(vectors: Tensor) -> Tensor:
    """Inner products of vectors (B, r, n) with each other, (B, r, r)."""
    if vectors.shape[1] == 1:  # summed in pairs, where a product of matrices adds one by one
        return vectors.square().sum(-1, keepdim=True)
    return vectors @ vectors.mT


def _rest(whole: Tensor, kept: Tensor) -> Tensor:
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
