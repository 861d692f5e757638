"""The cooperative solve: M with correlations between the players of a stage.

In the coordinates of :mod:`ocnopt.curvature.frames` M is the identity plus, between two players,
the Kronecker product of two small correlations. For a pair the singular vectors of both make it a
set of 2 x 2 matrices with ones on the diagonal and a product of canonical correlations beside
them: the Schur complement that the DGNOpt paper's cooperative players need, diagonalized at once.
More than two players have no such basis; their system is well conditioned, and conjugate gradients
solve it to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ocnopt.curvature.correlation import Correlation, Correlations, dense
from ocnopt.curvature.factorize import definite, singular_bases, spd_factor
from ocnopt.finite import finite_blocks

__all__ = ["Coupling", "Many", "Pair", "Solved", "couple"]

#: Correlations that no damped factors over the same samples can have are brought below this.
MOST = 0.999
#: They are scaled down at most this often.
RAISES = 40
#: Conjugate gradients stop here whatever the residual; a dozen steps are usual.
STEPS = 200


class Coupling(ABC):
    """``C``, the identity with correlations between players off its diagonal.

    Running means that began at different steps can claim correlations that no data have; these
    are scaled down, all of a group alike, until C is positive definite there.

    Attributes:
        failures: How often correlations had to be scaled down.
        strength: A bound on the norm of what C has beside the identity.
    """

    failures: int = 0
    strength: float = 0.0

    @abstractmethod
    def solve(self, ys: list[Tensor]) -> list[Tensor]:
        """``C^-1 y`` for players' matrices (..., groups, out, in)."""

    @abstractmethod
    def gram(self, ys: list[Tensor]) -> Tensor:
        """``y_k^T C^-1 y_l`` for players' matrices (B, r, groups, out, in): (B, groups, r, r)."""

    def added(self, ys: list[Tensor]) -> Tensor:
        """What C adds to the players' own products, as in :meth:`gram`."""
        total = self.gram(ys)
        for y in ys:
            total = total - products(y, y)
        return total


class Pair(Coupling):
    """Two players, by canonical correlations of their inputs and of their output gradients.

    Args:
        between: What they have in common.

    Attributes:
        b_left: The first player's canonical directions of output gradients, (groups, out, kb); None
            where they are its coordinates.
        b_right: The second player's.
        a_left: The first player's canonical directions of inputs, (groups, in, ka), or None.
        a_right: The second player's.
        c: Canonical correlations, (groups, kb, ka).

    Raises:
        ValueError: No singular vectors could be had.
    """

    def __init__(self, between: Correlation) -> None:
        self.a_left, a_values, self.a_right = _canonical(between.a)
        self.b_left, b_values, self.b_right = _canonical(between.b)
        for values in (a_values, b_values):
            most = values.abs().amax(-1, keepdim=True)
            over = most >= 1
            values.mul_(torch.where(over, MOST / most, 1))
            self.failures += int(over.any())
        self.a_values, self.b_values = a_values, b_values
        self.c = c = b_values[:, :, None] * a_values[:, None, :]
        self.strength = float(c.abs().max())
        rest = 1 - c * c
        #: What coupling adds to the inverse's diagonal and puts beside it.
        self.own = c * c / rest
        self.cross = c / rest

    def _canonically(self, ys: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Both players' matrices in the canonical coordinates, (..., groups, kb, ka)."""
        return (
            _into(self.b_left, ys[0], self.a_left),
            _into(self.b_right, ys[1], self.a_right),
        )

    def solve(self, ys: list[Tensor]) -> list[Tensor]:
        """``(u - c v) / (1 - c^2)`` in the canonical coordinates, and u, v the other way round."""
        u, v = self._canonically(ys)
        return [
            ys[0] + _out_of(self.b_left, self.own * u - self.cross * v, self.a_left),
            ys[1] + _out_of(self.b_right, self.own * v - self.cross * u, self.a_right),
        ]

    def gram(self, ys: list[Tensor]) -> Tensor:
        """The players' own products, and what coupling adds."""
        return products(ys[0], ys[0]) + products(ys[1], ys[1]) + self.added(ys)

    def added(self, ys: list[Tensor]) -> Tensor:
        """From the canonical coordinates alone."""
        u, v = self._canonically(ys)
        first = products(u, self.own * u - self.cross * v)
        return first + products(v, self.own * v - self.cross * u)


class Many(Coupling):
    """Any number of players, by conjugate gradients.

    Args:
        correlations: Between every two of them.
        players: How many there are.
        tolerance: Relative error allowed in Gram numbers.
    """

    def __init__(self, correlations: Correlations, players: int, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance
        self.players = players
        self.correlations = correlations
        self.strength = _strength(correlations, players)
        if self.strength >= 1:  # else C is positive definite
            self._scale_down(players)

    def _scale_down(self, players: int) -> None:
        """Until both sides' correlations are those of some data."""
        some = next(iter(self.correlations.values())).a
        scale = some.new_ones(some.shape[0], 1, 1)
        for _ in range(RAISES):
            wrong = ~(
                _definite({k: x.a for k, x in self.correlations.items()}, players, scale)
                & _definite({k: x.b for k, x in self.correlations.items()}, players, scale)
            )
            if not bool(wrong.any()):
                break
            scale = torch.where(wrong[:, None, None], 0.9 * scale, scale)
            self.failures += 1
        else:
            scale = torch.where(wrong[:, None, None], 0, scale)
        if self.failures:
            self.correlations = {pair: x.times(scale) for pair, x in self.correlations.items()}
            self.strength = _strength(self.correlations, players)

    def times(self, ys: list[Tensor]) -> list[Tensor]:
        """``C y``."""
        out = list(ys)
        for (n, m), between in self.correlations.items():
            out[n] = out[n] + between.to_first(ys[m])
            out[m] = out[m] + between.to_second(ys[n])
        return out

    def solve(self, ys: list[Tensor]) -> list[Tensor]:
        """To most of the digits that the dtype has."""
        return conjugate_gradients(self.times, ys, torch.finfo(ys[0].dtype).eps ** 0.7)

    def gram(self, ys: list[Tensor]) -> Tensor:
        """At rank one the quadratic form itself tells when it is known."""
        if ys[0].shape[1] == 1:
            goal = max(self.tolerance / 5, 4 * torch.finfo(ys[0].dtype).eps)
            return quadratic_form(self.times, ys, goal)[:, 0, :, None, None]
        goal = max(self.tolerance, torch.finfo(ys[0].dtype).eps ** 0.7)
        solved = conjugate_gradients(self.times, ys, goal)
        total = products(ys[0], solved[0])
        for y, x in zip(ys[1:], solved[1:], strict=True):
            total = total + products(y, x)
        return (total + total.mT) / 2


class Solved(Coupling):
    """A small C whose inverse is at hand: one product, where conjugate gradients take dozens.

    Args:
        coupling: Of any number of players.
        like: A matrix (groups, out, in) of every player.

    Raises:
        ValueError: C is not positive definite beyond rounding.
    """

    def __init__(self, coupling: Many, like: list[Tensor]) -> None:
        self.failures, self.strength = coupling.failures, coupling.strength
        flat = _flat(like)
        eye = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
        rows = eye.unsqueeze(1).expand(-1, len(flat), -1)
        factor = spd_factor(_flat(coupling.times(_apart(rows, like))).transpose(0, 1))
        if factor is None:
            raise ValueError("the coupling of some players has no inverse")
        #: ``C^-1 - I``, (groups, n, n).
        self.rest = torch.cholesky_inverse(factor) - eye

    def solve(self, ys: list[Tensor]) -> list[Tensor]:
        """``y + (C^-1 - I) y``."""
        y = _flat(ys)
        return _apart(y + (y.unsqueeze(-2) @ self.rest).squeeze(-2), ys)

    def gram(self, ys: list[Tensor]) -> Tensor:
        """The players' own products, and what coupling adds."""
        y = _flat(ys).transpose(1, 2)
        return y @ y.mT + self.added(ys)

    def added(self, ys: list[Tensor]) -> Tensor:
        """``y_k^T (C^-1 - I) y_l``."""
        y = _flat(ys).transpose(1, 2)  # (B, groups, r, n)
        samples, groups, rank, n = y.shape
        # All samples of a group in one product.
        turned = y.transpose(0, 1).reshape(groups, samples * rank, n) @ self.rest
        return y @ turned.view(groups, samples, rank, n).transpose(0, 1).mT


def couple(correlations: Correlations, players: int, tolerance: float = 0.0) -> Coupling:
    """The coupling of the players of a stage.

    Args:
        correlations: Between every two of them.
        players: How many there are, at least two.
        tolerance: Relative error allowed in Gram numbers.

    Raises:
        ValueError: No singular vectors could be had.
    """
    correlations, failures = _finite(correlations)
    if players == 2:
        (between,) = correlations.values()
        coupling: Coupling = Pair(between)
    else:
        coupling = Many(correlations, players, tolerance)
    coupling.failures += failures
    return coupling


def _finite(correlations: Correlations) -> tuple[Correlations, int]:
    """Correlations without the groups in which one is not finite; whether there were such."""
    sides = [side for between in correlations.values() for side in (between.a, between.b)]
    sound = torch.stack([finite_blocks(side) for side in sides]).all(0)
    if bool(sound.all()):
        return correlations, 0

    def kept(side: Tensor) -> Tensor:
        return torch.where(sound.view(-1, *[1] * (side.dim() - 1)), side, 0)

    return {k: Correlation(kept(x.a), kept(x.b)) for k, x in correlations.items()}, 1


def _strength(correlations: Correlations, players: int) -> float:
    """At least the norm of all correlations together: the greatest sum over one player's."""
    rows = [0.0] * players
    for pair, between in correlations.items():
        a, b = between.bounds()
        for n in pair:
            rows[n] += a * b
    return max(rows)


def _definite(sides: Mapping[tuple[int, int], Tensor], players: int, scale: Tensor) -> Tensor:
    """In which groups one side's correlations of all players are positive definite, (groups,)."""
    blocks: list[list[Tensor | None]] = [[None] * players for _ in range(players)]
    for (n, m), side in sides.items():
        block = dense(side) * scale
        blocks[n][m], blocks[m][n] = block, block.mT
    rows = []
    for row in blocks:
        like = next(block for block in row if block is not None)
        eye = torch.eye(like.shape[-2], dtype=like.dtype, device=like.device)
        own = eye.expand(like.shape[0], -1, -1)
        rows.append(torch.cat([own if block is None else block for block in row], -1))
    return definite(torch.cat(rows, -2))


def _canonical(side: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Singular vectors and values of a side; no vectors where it is diagonal."""
    if side.dim() == 2:
        return None, side.clone(), None
    return singular_bases(side)


def _into(b: Tensor | None, y: Tensor, a: Tensor | None) -> Tensor:
    """``b^T y a``, the identity where there is none."""
    y = y if b is None else b.mT @ y
    return y if a is None else y @ a


def _out_of(b: Tensor | None, y: Tensor, a: Tensor | None) -> Tensor:
    """``b y a^T``, likewise."""
    y = y if b is None else b @ y
    return y if a is None else y @ a.mT


def products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of matrices (B, r, groups, out, in): (B, groups, r, r)."""
    one, other = (x.flatten(-2).transpose(1, 2) for x in (left, right))
    return one @ other.mT


def conjugate_gradients(
    times: Callable[[list[Tensor]], list[Tensor]], ys: list[Tensor], tolerance: float
) -> list[Tensor]:
    """Solve ``C x = y`` for many right-hand sides at once.

    Args:
        times: ``C`` applied to players' matrices (..., groups, out, in); every leading index and
            every group is a system of its own. Positive definite.
        ys: The right-hand sides.
        tolerance: On the residual's norm relative to the right-hand side's.

    Returns:
        The solutions.
    """
    y = _flat(ys)
    x = torch.zeros_like(y)
    goal = torch.linalg.vecdot(y, y) * tolerance**2
    for step, p, size in _descents(times, ys):
        x = torch.addcmul(x, step, p)
        if not bool((size > goal).any()):
            break
    return _apart(x, ys)


def quadratic_form(
    times: Callable[[list[Tensor]], list[Tensor]], ys: list[Tensor], tolerance: float
) -> Tensor:
    """``y^T C^-1 y``, which conjugate gradients approach from below, for many y at once.

    Args:
        times: As in :func:`conjugate_gradients`.
        ys: The vectors.
        tolerance: The last contribution that counts, relative to the sum.

    Returns:
        (..., groups).
    """
    y = _flat(ys)
    before = torch.linalg.vecdot(y, y)
    total = torch.zeros_like(before)
    for step, _, size in _descents(times, ys):
        more = step[..., 0] * before
        total, before = total + more, size
        if not bool((more > tolerance * total).any()):
            break
    return total


def _descents(
    times: Callable[[list[Tensor]], list[Tensor]], ys: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Steps of conjugate gradients from zero: length, direction, the residual's square after it.

    The players' matrices lie side by side in one vector: few operations, where they are small.
    """
    r = p = _flat(ys)
    size = torch.linalg.vecdot(r, r)
    for _ in range(STEPS):
        c = _flat(times(_apart(p, ys)))
        along = torch.linalg.vecdot(p, c)
        # A system that is solved, or so small that its squares vanish, stays as it is.
        going = ~(along <= 0)  # what is not finite goes on, to be seen
        step = torch.where(going, size / along, 0)[..., None]
        r = torch.addcmul(r, step, c, value=-1)
        new = torch.linalg.vecdot(r, r)
        yield step, p, new
        turn = torch.where(going, new / size, 0)[..., None]
        p = torch.addcmul(r, turn, p)
        size = new


def _flat(ys: list[Tensor]) -> Tensor:
    """Players' matrices (..., out, in) as one vector (..., n)."""
    return torch.cat([y.flatten(-2) for y in ys], -1)


def _apart(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse of :func:`_flat`, as views."""
    parts = flat.split([y.shape[-2] * y.shape[-1] for y in like], -1)
    return [part.unflatten(-1, y.shape[-2:]) for part, y in zip(parts, like, strict=True)]
