"""The inverse of a preconditioner that is diagonal in a Kronecker-factored eigenbasis."""

from __future__ import annotations

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
from ocnopt.curvature.salient import Salient, rest, salient, squares
from ocnopt.layers.base import CHUNK

if TYPE_CHECKING:
    from ocnopt.curvature.directions import Directions
    from ocnopt.layers.base import Params
    from ocnopt.layers.linear import LinearLayer

__all__ = ["Eigen", "outer_seen", "rotated_factors"]


class Eigen(Metric):
    """``M`` diagonal in a Kronecker-factored eigenbasis (George et al. 2018).

    Args:
        rates: As above; all equal.
        layer: The layer.
        basis_a: Orthonormal columns (groups, in, in).
        basis_b: (groups, out, out).
        scales: Eigenvalues with damping added, (groups, out, in).
        tolerance: Relative error allowed in Gram numbers. Most eigenvalues are far below the
            damping, and need not be looked at one by one.
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

    @cached_property
    def salient(self) -> Salient:
        """Where the eigenbasis is looked at for Gram numbers."""
        return salient(self.basis_a, self.basis_b, self.scales, self.tolerance)

    def sample_gram(self, gradients: Params) -> Tensor:
        """Per-sample gradients are rotated once; in the eigenbasis M is diagonal."""
        matrix = self._matrix(gradients)
        turned = self.salient.turned(matrix)
        gram = self.salient.gram(turned, lambda: squares(matrix.flatten(2)))
        return gram.to(gradients[0].dtype) * self.rates[0]

    def factor_gram(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Gradients are formed in the eigenbasis, of rotated factors, where M is diagonal."""
        rows, cols = rows.to(self.basis_a.dtype), cols.to(self.basis_a.dtype)
        turned = rotated_factors(rows, cols, self.salient.inputs, self.salient.outputs)
        whole = partial(over_locations, rows, rows, cols, cols)
        return self.salient.gram(turned, whole) * self.rates[0]

    def sample_gram_and_seen(self, gradients: Params, where: Directions) -> tuple[Tensor, Tensor]:
        """:meth:`sample_gram`, and ``L^T [(U_B^T D U_A) / sqrt(scales)] R`` of the gradients.

        What both look at is rotated once.

        Args:
            gradients: (B, r, *parameter).
            where: L and R.

        Returns:
            (B, r, r) and (B, r, groups, columns of L, columns of R).
        """
        basis, matrix, other = self.salient, self._matrix(gradients), None
        if basis.floor is None:
            turned = basis.turned(matrix)
        else:  # one product with the gradients for both: they are large
            columns = matrix @ torch.cat((basis.inputs, where.inputs_turned), -1)
            kept = basis.inputs.shape[-1]
            turned = basis.outputs.mT @ columns[..., :kept]
            other = where.outputs_turned.mT @ columns[..., kept:]
        gram = basis.gram(turned, lambda: squares(matrix.flatten(2)))
        return gram.to(gradients[0].dtype) * self.rates[0], basis.seen(turned, other, where)

    def factor_gram_and_seen(
        self, rows: Tensor, cols: Tensor, where: Directions
    ) -> tuple[Tensor, Tensor]:
        """The same of gradients by their factors, as in :meth:`factor_gram`."""
        rows, cols = rows.to(self.basis_a.dtype), cols.to(self.basis_a.dtype)
        basis, other = self.salient, None
        turned = rotated_factors(rows, cols, basis.inputs, basis.outputs)
        if basis.floor is not None:
            other = rotated_factors(rows, cols, where.inputs_turned, where.outputs_turned)
        gram = basis.gram(turned, partial(over_locations, rows, rows, cols, cols))
        return gram * self.rates[0], basis.seen(turned, other, where)

    def outer_seen(
        self, layer: LinearLayer, a: Tensor, columns: Tensor, where: Directions
    ) -> Tensor:
        """``L^T [(U_B^T D U_A) / sqrt(scales)] R`` of ``D = P_h [a; 1]^T``, which is not formed.

        Args:
            layer: A linear layer.
            a: Inputs (B, in).
            columns: (r, B, out).
            where: L and R.

        Returns:
            (B / networks, r, networks, columns of L, columns of R).
        """
        basis, networks = self.salient, layer.networks
        rows, cols = self._turned_factors(layer, a, columns)
        left, right = basis.within(where)
        q, p = by_network(rows, networks), by_network(cols, networks)
        parts = []
        each = max(basis.weights.numel(), p.numel())
        for some in right.split(max(1, CHUNK // each), -1):
            # (networks, in, out * columns): M's diagonal and R, for all samples alike.
            table = (basis.weights.mT.unsqueeze(-1) * some.unsqueeze(-2)).flatten(2)
            moved = (q @ table).unflatten(-1, (-1, some.shape[-1]))
            parts.append(left.mT.unsqueeze(1) @ (p.unsqueeze(-1) * moved))
        seen = torch.cat(parts, -1)  # (r, networks, B / networks, columns of L, columns of R)
        seen = seen.movedim(2, 0)
        if basis.floor is None:
            return seen
        signals = columns.to(self.basis_b.dtype)
        return seen + outer_seen(layer, a, signals, where) / basis.floor.sqrt()

    def _matrix(self, gradients: Params) -> Tensor:
        return self.layer.to_matrix(gradients).to(self.basis_b.dtype)

    def _as_seen(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """``[a; 1]`` and signals in the basis' dtype."""
        dtype = self.basis_a.dtype
        return layer.homogeneous(a).to(dtype), columns.to(dtype)

    def _turned_factors(
        self, layer: LinearLayer, a: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same in salient directions."""
        basis = self.salient
        if basis.floor is None:
            return self.turn_factors(layer, a, columns)
        inputs, signals = self._as_seen(layer, a, columns)
        return layer.times(inputs, basis.inputs), each_column(layer, signals, basis.outputs)

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
        scales, floor = self.salient.scales, self.salient.floor
        rows, turned = self._turned_factors(layer, a, columns)
        sizes = rows.square()
        product = gram_of(turned, turned * layer.times(sizes, scales.reciprocal().mT))
        if floor is not None:
            inputs, signals = self._as_seen(layer, a, columns)
            whole = torch.linalg.vecdot(inputs, inputs)[:, None, None] * gram_of(signals, signals)
            kept = sizes.sum(-1)[:, None, None] * gram_of(turned, turned)
            product = product + rest(whole, kept) / floor
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


def by_network(values: Tensor, networks: int) -> Tensor:
    """Samples (..., S * b, n), one network's after another's, as (..., S, b, n)."""
    own: Tensor = values.unflatten(-2, (networks, -1))
    return own


def outer_seen(layer: LinearLayer, a: Tensor, columns: Tensor, where: Directions) -> Tensor:
    """Outer products ``P_h [a; 1]^T`` between turned directions.

    Args:
        layer: A linear layer.
        a: Inputs (B, in).
        columns: (r, B, out), in the directions' dtype.
        where: The directions.

    Returns:
        (B / networks, r, networks, columns of L, columns of R).
    """
    inputs = layer.homogeneous(a).to(columns.dtype)
    q = by_network(layer.times(inputs, where.inputs_turned), layer.networks)
    p = by_network(each_column(layer, columns, where.outputs_turned), layer.networks)
    return (p.unsqueeze(-1) * q.unsqueeze(-2)).movedim(2, 0)
