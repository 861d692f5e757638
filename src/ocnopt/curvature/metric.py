"""The inverse of a preconditioner, as the Bellman pass and the update need it.

A metric answers two questions about ``M_t`` of Table 2: what is ``M^-1 d``, and what is the Gram
matrix ``P_u^T Q_uu^-1 P_u`` with ``Q_uu = M / eta``. It holds the learning rates for the second.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ocnopt.layers.base import Params
    from ocnopt.layers.linear import LinearLayer

Rates = tuple[float, ...]


#: Below so many entries a matrix is faster multiplied than looked through.
SMALL = 1 << 11


class Metric:
    """``M = I``; the base class of the others.

    Args:
        rates: Learning rate of every parameter, in the order of the layer's parameters.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    @property
    def factored(self) -> bool:
        """Whether :meth:`factor_gram` is there: M has structure, or one rate for all parameters."""
        return len(set(self.rates)) == 1

    def solve(self, params: Params) -> Params:
        """``M^-1 d``; leading dimensions before a parameter's own are batches."""
        return params

    def solve_(self, params: Params) -> Params:
        """:meth:`solve`, which may write into what it is given."""
        return self.solve(params)

    def solve_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """``Q_uu^-1`` on rows (r, B, L, width) of a table, at ``index`` (B, L)."""
        return rows * self.rates[0]

    def sample_gram(self, gradients: Params) -> Tensor:
        """``G_k . Q_uu^-1 G_l`` for per-sample gradients (B, r, *parameter): (B, r, r)."""
        total: Tensor | None = None
        for left, right, rate in zip(gradients, self.solve(gradients), self.rates, strict=True):
            product = (left.flatten(2) @ right.flatten(2).transpose(1, 2)) * rate
            total = product if total is None else total + product
        assert total is not None
        return total

    def factor_gram(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Gram matrix of ``P_u = sum_l a_l (x) P_h,l`` over locations, which is never formed.

        Args:
            rows: Inputs ``[a; 1]``, (groups, B, L, in).
            cols: Columns (r, groups, B, L, out).

        Returns:
            (B, r, r).
        """
        return _over_locations(rows, rows, cols, cols) * self.rates[0]

    def outer_gram(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> Tensor:
        """Gram matrix of outer products ``P_u = a (x) P_h`` at one location per sample.

        Args:
            layer: A linear layer.
            a: Inputs (B, in).
            columns: (r, B, out).

        Returns:
            (B, r, r).
        """
        size: Tensor | float = self.rates[-1] if layer.has_bias else 0.0
        if layer.has_weight:
            size = torch.linalg.vecdot(a, a).mul_(self.rates[0]).add_(size)[:, None, None]
        return gram_of(columns, columns) * size


class Diagonal(Metric):
    """``M = diag(scales)``.

    Args:
        rates: As above.
        scales: Diagonal entries, one tensor per parameter.
    """

    def __init__(self, rates: Rates, scales: Params) -> None:
        super().__init__(rates)
        self.scales = scales

    @property
    def factored(self) -> bool:
        """A diagonal matrix is no Kronecker product."""
        return False

    def solve(self, params: Params) -> Params:
        """Elementwise division."""
        return tuple(p / s for p, s in zip(params, self.scales, strict=True))

    def solve_(self, params: Params) -> Params:
        """The same in place."""
        return tuple(p.div_(s) for p, s in zip(params, self.scales, strict=True))

    def solve_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """Division by the scales of the rows touched."""
        return rows * self.rates[0] / self.scales[0][index]

    def outer_gram(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> Tensor:
        """``sum_oj p_o p'_o a_j^2 / m_oj``."""
        spread: Tensor | float = 0.0
        if layer.has_weight:
            inverse = self.scales[0].reciprocal()
            spread = layer.times(a.square(), inverse.view(layer.networks, -1, a.shape[-1]).mT)
            spread = spread.mul_(self.rates[0])
        if layer.has_bias:
            spread = spread + layer.each(self.rates[-1] / self.scales[-1], a.shape[0])
        return gram_of(columns, columns * spread)


class Kronecker(Metric):
    """``M = A (x) B`` per group, given by the inverses of its (damped) factors.

    Args:
        rates: As above; all equal.
        layer: The layer, which knows how its parameters form matrices.
        a_inverse: (groups, in, in).
        b_inverse: (groups, out, out).
    """

    def __init__(self, rates: Rates, layer: object, a_inverse: Tensor, b_inverse: Tensor) -> None:
        super().__init__(rates)
        self.layer: LinearLayer = layer  # type: ignore[assignment]
        self.a_inverse = a_inverse
        self.b_inverse = b_inverse

    def solve(self, params: Params) -> Params:
        """``B^-1 D A^-1``."""
        matrix = self.layer.to_matrix(params)
        work = self.b_inverse @ matrix.to(self.b_inverse.dtype) @ self.a_inverse
        return self.layer.from_matrix(work.to(matrix.dtype))

    def factor_gram(self, rows: Tensor, cols: Tensor) -> Tensor:
        """``sum_lm (a_l^T A^-1 a_m) (p_l^T B^-1 p'_m)``."""
        rows, cols = rows.to(self.a_inverse.dtype), cols.to(self.a_inverse.dtype)
        rows_m, cols_m = by_group(rows, self.a_inverse), by_group(cols, self.b_inverse)
        return _over_locations(rows, rows_m, cols, cols_m) * self.rates[0]

    def outer_gram(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> Tensor:
        """``(a^T A^-1 a) (p^T B^-1 p')``."""
        rows = layer.homogeneous(a)
        rows_m = layer.times(rows.to(self.a_inverse.dtype), self.a_inverse).to(rows.dtype)
        columns_m = _each_column(layer, columns.to(self.b_inverse.dtype), self.b_inverse)
        columns_m = columns_m.to(columns.dtype)
        size = (rows * rows_m).sum(-1).mul_(self.rates[0])
        return gram_of(columns, columns_m) * size[:, None, None]


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
            self._turned = (a, columns, rows, _each_column(layer, columns.to(dtype), self.basis_b))
        return self._turned[2:]

    def sample_gram(self, gradients: Params) -> Tensor:
        """Per-sample gradients are rotated once; in the eigenbasis M is diagonal."""
        matrix = self.layer.to_matrix(gradients).to(self.basis_b.dtype)
        basis_a, basis_b, scales, floor = self._salient
        kept = (basis_b.mT @ (matrix @ basis_a)).flatten(2)
        product = kept @ (kept / scales.flatten()).mT
        if floor is not None:
            product += _rest(_squares(matrix.flatten(2)), _squares(kept)) / floor
        return product.to(gradients[0].dtype) * self.rates[0]

    def factor_gram(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Gradients are formed in the eigenbasis, of rotated factors, where M is diagonal."""
        rows, cols = rows.to(self.basis_a.dtype), cols.to(self.basis_a.dtype)
        basis_a, basis_b, scales, floor = self._salient
        turned = by_group(cols, basis_b).mT @ by_group(rows, basis_a)  # (r, groups, B, out, in)
        kept = turned.permute(2, 0, 1, 3, 4).flatten(2)
        product = kept @ (kept / scales.flatten()).mT
        if floor is not None:
            product += _rest(_over_locations(rows, rows, cols, cols), _squares(kept)) / floor
        return product * self.rates[0]

    @cached_property
    def _salient(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The directions in which M is more than its smallest entry, and that entry.

        Without it in every other direction, an error of at most ``tolerance`` in Gram numbers; None
        where all directions are kept.
        """
        everything = self.basis_a, self.basis_b, self.scales, None
        if not self.tolerance or self.scales[0].numel() < SMALL:
            return everything
        floor, most = self.scales.aminmax()
        # The rest is a difference of squares, whose rounding the floor magnifies.
        if float(most / floor) * _rounding(self.scales) > 0.1 * self.tolerance:
            return everything
        above = self.scales > floor * (1 + self.tolerance)
        inputs = above.any(0).any(0).nonzero()[:, 0]
        outputs = above.any(0).any(1).nonzero()[:, 0]
        if len(inputs) * len(outputs) > above.shape[1] * above.shape[2] / 2:
            return everything
        return (
            self.basis_a[:, :, inputs],
            self.basis_b[:, :, outputs],
            self.scales[:, outputs[:, None], inputs],
            floor,
        )

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
            turned = _each_column(layer, signals, basis_b)
        squares = rows.square()
        product = gram_of(turned, turned * layer.times(squares, scales.reciprocal().mT))
        if floor is not None:
            whole = torch.linalg.vecdot(inputs, inputs)[:, None, None] * gram_of(signals, signals)
            kept = squares.sum(-1)[:, None, None] * gram_of(turned, turned)
            product = product + _rest(whole, kept) / floor
        return product.to(columns.dtype) * self.rates[0]


def by_group(x: Tensor, matrices: Tensor) -> Tensor:
    """Vectors (..., groups, B, L, n) times their group's matrix (groups, n, k)."""
    lead, (groups, samples, locations, n) = x.shape[:-4], x.shape[-4:]
    flat = x.reshape(*lead, groups, samples * locations, n) @ matrices
    return flat.view(*lead, groups, samples, locations, -1)


def _over_locations(rows: Tensor, rows_m: Tensor, cols: Tensor, cols_m: Tensor) -> Tensor:
    """``sum_lm (a_l . a_m') (p_l . p_m')`` over locations and groups, (B, r, r).

    Args:
        rows: (groups, B, L, in).
        rows_m: The same, preconditioned.
        cols: (r, groups, B, L, out).
        cols_m: The same, preconditioned.
    """
    mixed = (rows @ rows_m.mT) @ cols_m  # (r, groups, B, L, out)
    left, right = (x.permute(2, 0, 1, 3, 4).flatten(2) for x in (cols, mixed))
    return left @ right.mT


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


def _each_column(layer: LinearLayer, columns: Tensor, matrices: Tensor) -> Tensor:
    """Columns (r, B, n) times the matrix of their samples' group (groups, n, k): (r, B, k)."""
    if layer.networks == 1:
        return columns @ matrices[0]
    return torch.stack([layer.times(column, matrices) for column in columns])


def gram_of(left: Tensor, right: Tensor) -> Tensor:
    """Gram matrices of columns (r, B, *) on the last dimension(s): (B, r, r)."""
    if left.shape[0] == 1:
        dots: Tensor = torch.linalg.vecdot(left[0].flatten(1), right[0].flatten(1))
        return dots[:, None, None]
    return left.flatten(2).transpose(0, 1) @ right.flatten(2).permute(1, 2, 0)


def to_float(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which coefficients and factors live: at least single precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
