"""What two players' coordinates have in common: a Kronecker product of two correlations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Correlation", "Correlations", "dense"]


@dataclass(frozen=True)
class Correlation:
    """``a (x) b`` between the coordinates of players n and m.

    Either side may be diagonal, and is then given as that: inputs are where both players read the
    same tensor in the same eigenbasis.

    Attributes:
        a: Of their inputs, (groups, in, in of the other), or (groups, in).
        b: Of their output gradients, (groups, out, out of the other), or (groups, out).
    """

    a: Tensor
    b: Tensor

    def to_first(self, y: Tensor) -> Tensor:
        """``b y a^T`` for m's matrices (..., groups, out, in)."""
        return _right(_left(self.b, y), self.a)

    def to_second(self, y: Tensor) -> Tensor:
        """``b^T y a`` for n's."""
        return _right(_left(self.b.mT if self.b.dim() > 2 else self.b, y), self.a, turned=True)

    def times(self, scale: Tensor) -> Correlation:
        """Both sides times one number per group, (groups, 1, 1)."""
        return Correlation(*(x * (scale if x.dim() > 2 else scale[:, 0]) for x in (self.a, self.b)))

    def bounds(self) -> tuple[float, float]:
        """At least the spectral norms of both sides, over all groups, without a decomposition."""
        return _norm_bound(self.a), _norm_bound(self.b)


#: By pair of players (n, m), n < m.
Correlations = Mapping[tuple[int, int], Correlation]


def dense(side: Tensor) -> Tensor:
    """A side as matrices (groups, n, m), diagonal or not."""
    return side if side.dim() > 2 else side.diag_embed()


def _left(b: Tensor, y: Tensor) -> Tensor:
    return b @ y if b.dim() > 2 else b.unsqueeze(-1) * y


def _right(y: Tensor, a: Tensor, turned: bool = False) -> Tensor:
    if a.dim() == 2:
        return y * a.unsqueeze(-2)
    return y @ (a if turned else a.mT)


def _norm_bound(side: Tensor) -> float:
    if side.dim() == 2:
        return float(side.abs().max())
    sums = [torch.linalg.matrix_norm(side, order) for order in (1, float("inf"))]
    return float((sums[0] * sums[1]).sqrt().max())
