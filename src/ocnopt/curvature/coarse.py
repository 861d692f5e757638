"""Gram numbers of players who cooperate, from the few directions in which they are correlated.

``y^T C^-1 y`` differs from the players' own ``y^T y`` in what C has beside the identity. That is
of low rank as a rule: players have the mean of their inputs in common, and little else. With
orthonormal columns L, R per player, such that C is the identity but for ``(L L^T) (x) (R R^T)``,
the difference is one of ``L^T y R`` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ocnopt.curvature.correlation import Correlation, Correlations
from ocnopt.curvature.coupling import Coupling, Many, Pair, Solved, couple
from ocnopt.curvature.factorize import eigenbasis

__all__ = ["Coarse", "coarse"]

#: A coupling of so many entries is inverted once rather than solved for every step.
SMALL = 640


@dataclass(frozen=True)
class Coarse:
    """A coupling in some directions.

    Attributes:
        bases: Every player's: orthonormal columns of its outputs, (groups, out, s), and of its
            inputs, (groups, in, r). None for a player who has nothing in common with the others.
        coupling: Between the others' matrices (..., groups, s, r).
    """

    bases: list[tuple[Tensor, Tensor] | None]
    coupling: Coupling


def coarse(coupling: Coupling, tolerance: float) -> Coarse | None:
    """The coupling without what is too weak to matter.

    Args:
        coupling: Between players.
        tolerance: How much of C, in norm, may be left out.

    Returns:
        None where nothing is left.
    """
    if isinstance(coupling, Pair):
        return _of_pair(coupling, tolerance)
    assert isinstance(coupling, Many)
    return _of_many(coupling.correlations, coupling.players, tolerance)


def _of_pair(pair: Pair, tolerance: float) -> Coarse | None:
    """Canonical directions are the best there are: what is left out is the next correlation."""
    seen = pair.c.abs().amax(0) > tolerance
    rows, columns = (seen.any(dim).nonzero()[:, 0] for dim in (1, 0))
    if not len(rows):
        return None
    groups, out, inputs = pair.c.shape
    like = pair.c.new_empty(groups)
    bases: list[tuple[Tensor, Tensor] | None] = [
        (_chosen(b, out, rows, like), _chosen(a, inputs, columns, like))
        for b, a in ((pair.b_left, pair.a_left), (pair.b_right, pair.a_right))
    ]
    kept = Correlation(pair.a_values[:, columns], pair.b_values[:, rows])
    return Coarse(bases, Pair(kept))


def _of_many(correlations: Correlations, players: int, tolerance: float) -> Coarse | None:
    """Of every player what its correlations reach.

    C without its rows outside of L, R, for all players and both sides, and then without such
    columns, lacks at most ``4 sqrt(players)`` times what is left out of one side of one player.
    """
    share = tolerance / (4 * sqrt(players))
    sides: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(players)]
    for (n, m), between in correlations.items():
        of_a, of_b = between.bounds()
        for player, turned in ((n, False), (m, True)):
            for kept, side, weight in zip(
                sides[player], (between.b, between.a), (of_a, of_b), strict=True
            ):
                kept.append((side.mT if turned and side.dim() > 2 else side) * weight)
    found = [(_reached(b, share), _reached(a, share)) for b, a in sides]
    left = {n: both for n, both in enumerate(found) if all(x.shape[-1] for x in both)}
    if len(left) < 2:
        return None
    place = {n: i for i, n in enumerate(left)}
    small = {
        (place[n], place[m]): Correlation(
            _seen(left[n][1], between.a, left[m][1]), _seen(left[n][0], between.b, left[m][0])
        )
        for (n, m), between in correlations.items()
        if n in left and m in left
    }
    rough = couple(small, len(left), tolerance)
    sizes = [b.new_empty(len(b), b.shape[-1], a.shape[-1]) for b, a in left.values()]
    if isinstance(rough, Many) and sum(size[0].numel() for size in sizes) <= SMALL:
        with contextlib.suppress(ValueError):  # then step by step
            rough = Solved(rough, sizes)
    return Coarse([left.get(n) for n in range(players)], rough)


def _reached(sides: Sequence[Tensor], share: float) -> Tensor:
    """Directions of one player's inputs or outputs without which correlations are small.

    Args:
        sides: Of the correlations with its partners, (groups, n, *) or (groups, n) each.
        share: How large, all of them together, what is left out may be.

    Returns:
        Orthonormal columns (groups, n, k).
    """
    squares = torch.stack(
        [side.square() if side.dim() == 2 else side.square().sum(-1) for side in sides]
    ).sum(0)
    at = _largest(squares.amax(0), share**2 / 2)
    groups, n = squares.shape
    if not len(at) or all(side.dim() == 2 for side in sides):
        return _chosen(None, n, at, squares)
    # An eigenbasis of what is left: its coordinates are few.
    gram = squares.new_zeros(groups, len(at), len(at))
    for side in sides:
        rows = side[:, at]
        gram += rows.square().diag_embed() if side.dim() == 2 else rows @ rows.mT
    found = eigenbasis(gram)
    assert found.spectrum is not None
    left_out = (found.spectrum.sort(-1).values.cumsum(-1) <= share**2 / 2).sum(-1).min()
    order = found.spectrum.topk(len(at) - int(left_out)).indices
    basis = found.values.gather(-1, order.unsqueeze(-2).expand(-1, len(at), -1))
    out = squares.new_zeros(groups, n, basis.shape[-1])
    out[:, at] = basis
    return out


def _largest(squares: Tensor, left_out: float) -> Tensor:
    """Indices of the entries, in ascending order, without which the sum is at most that."""
    values, order = squares.sort()
    dropped = int((values.cumsum(0) <= left_out).sum())
    return order[dropped:].sort().values


def _chosen(basis: Tensor | None, n: int, at: Tensor, like: Tensor) -> Tensor:
    """Columns of a basis (groups, *, n), by default of the identity's."""
    if basis is not None:
        return basis[:, :, at]
    eye = torch.eye(n, dtype=like.dtype, device=like.device)[:, at]
    return eye.expand(len(like), -1, -1)


def _seen(left: Tensor, side: Tensor, right: Tensor) -> Tensor:
    """``L^T side R``."""
    return left.mT @ (side.unsqueeze(-1) * right if side.dim() == 2 else side @ right)
