"""The inverse of a preconditioner, as the Bellman pass and the update need it.

A metric answers two questions about ``M_t`` of Table 2: what is ``M^-1 d``, and what is the Gram
matrix ``P_u^T Q_uu^-1 P_u`` with ``Q_uu = M / eta``. It holds the learning rates for the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ocnopt.layers.base import Params
    from ocnopt.layers.linear import LinearLayer

Rates = tuple[float, ...]


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
        return over_locations(rows, rows, cols, cols) * self.rates[0]

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
        self._scales = scales

    @property
    def scales(self) -> Params:
        """Diagonal entries, one tensor per parameter."""
        return self._scales

    def scale_rows(self, index: Tensor) -> Tensor:
        """Rows of the first parameter's entries."""
        return self._scales[0][index]

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

    def sample_gram(self, gradients: Params) -> Tensor:
        """``sum G_k G_l / m``; one column's gradients are squared, and read once more."""
        if gradients[0].shape[1] > 1:
            return super().sample_gram(gradients)
        total: Tensor | float = 0.0
        for g, scale, rate in zip(gradients, self.scales, self.rates, strict=True):
            spread = scale.reciprocal().mul_(rate).flatten()
            total = total + g.flatten(1).square().to(spread.dtype) @ spread
        assert isinstance(total, Tensor)
        return total[:, None, None]

    def solve_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """Division by the scales of the rows touched."""
        return rows * self.rates[0] / self.scale_rows(index)

    def outer_gram(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> Tensor:
        """``sum_oj p_o p'_o a_j^2 / m_oj``."""
        spread: Tensor | float = 0.0
        scales = self.scales
        if layer.has_weight:
            inverse = scales[0].reciprocal()
            spread = layer.times(a.square(), inverse.view(layer.networks, -1, a.shape[-1]).mT)
            spread = spread.mul_(self.rates[0])
        if layer.has_bias:
            spread = spread + layer.each(self.rates[-1] / scales[-1], a.shape[0])
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
        return over_locations(rows, rows_m, cols, cols_m) * self.rates[0]

    def outer_gram(self, layer: LinearLayer, a: Tensor, columns: Tensor) -> Tensor:
        """``(a^T A^-1 a) (p^T B^-1 p')``."""
        rows = layer.homogeneous(a)
        rows_m = layer.times(rows.to(self.a_inverse.dtype), self.a_inverse).to(rows.dtype)
        columns_m = each_column(layer, columns.to(self.b_inverse.dtype), self.b_inverse)
        columns_m = columns_m.to(columns.dtype)
        size = (rows * rows_m).sum(-1).mul_(self.rates[0])
        return gram_of(columns, columns_m) * size[:, None, None]


def by_group(x: Tensor, matrices: Tensor) -> Tensor:
    """Vectors (..., groups, B, L, n) times their group's matrix (groups, n, k)."""
    lead, (groups, samples, locations, n) = x.shape[:-4], x.shape[-4:]
    flat = x.reshape(*lead, groups, samples * locations, n) @ matrices
    return flat.view(*lead, groups, samples, locations, -1)


def over_locations(rows: Tensor, rows_m: Tensor, cols: Tensor, cols_m: Tensor) -> Tensor:
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


def each_column(layer: LinearLayer, columns: Tensor, matrices: Tensor) -> Tensor:
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
