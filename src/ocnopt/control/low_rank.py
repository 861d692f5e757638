"""Algorithm 1 without second derivatives of the dynamics, where every Q_uu is of low rank.

The Hessian of a sample's value is then ``V = Z Z^T`` at every stage, with no more columns in Z than
the network has outputs. With ``P_i = g_u^T Z_i`` and ``Y_i = g_x^T Z_i``, Eq. 3 and 4 read

    Q_uu = E + 1/S sum_i P_i P_i^T,   Q_ux = P_i Y_i^T,   k_i = -M^-1 q_i,   K_i = -M^-1 P_i Y_i^T

where E is the weight decay, D is E plus the damping, M is Q_uu with D for E, and q_i is Q_u. The
value before the stage takes four small matrices of every sample from M^-1,

    B = P^T M^-1 P,   c = P^T M^-1 q,   J = P^T M^-1 E M^-1 P,   e = P^T M^-1 E M^-1 q,

as it is, where a sample follows the share a of its policy,

    V_x  = g_x^T V_h - a Y (2 c - a (B c + e)),   V_xx = Y ((I - a B)^2 + a^2 J) Y^T.

So its rank does not grow, and no matrix has a row or column per parameter unless parameters are
fewer than the columns of all P.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ocnopt.control.affine import Control
from ocnopt.control.chain import Chain, Link
from ocnopt.control.ddp import Passes, Policy, Stage, not_finite
from ocnopt.control.players import Player
from ocnopt.control.symmetric import eigenvalues
from ocnopt.curvature.factorize import spd_factor
from ocnopt.finite import all_finite
from ocnopt.layers.base import Params
from ocnopt.layers.linear import LinearLayer

__all__ = ["LowRankDDP"]

#: Bytes of a number: systems are made and solved in double precision, as they are small and may be
#: nearly singular.
DOUBLE = 8


@dataclass
class _Blocks:
    """B (S, r, r), c (S, r), J and e as above; the latter None where nothing decays."""

    b: Tensor
    c: Tensor
    j: Tensor | None = None
    e: Tensor | None = None


class _System(ABC):
    """``M = D + 1/S sum_i P_i P_i^T``.

    Args:
        control: The control, in double precision.
        z: Z of every sample, transposed, (S, r, N).
        d: The diagonal of D, positive, (m).
    """

    matrix: Tensor

    def __init__(self, control: Control, z: Tensor, d: Tensor) -> None:
        self.control = control
        self.z = z
        self.d = d
        self.samples = z.shape[0]

    def factorize(self) -> bool:
        """Whether the matrix is positive definite, which all else requires."""
        factor = spd_factor(self.matrix)
        if factor is not None:
            self.factor = factor
        return factor is not None

    @abstractmethod
    def solve(self, q: Tensor) -> Tensor:
        """``M^-1 q``, (m)."""

    @abstractmethod
    def gain(self, w: Tensor) -> Tensor:
        """The mean over samples of ``M^-1 P w``, (S, r) to (m)."""

    @abstractmethod
    def blocks(self, v: Tensor, u: Tensor, decay: Tensor) -> _Blocks:
        """What the value takes, for ``q = g_u^T v + decay u``.

        Args:
            v: (S, N).
            u: The control, (m).
            decay: E, (m).
        """


class _ParameterSystem(_System):
    """M itself, for fewer parameters than columns."""

    def __init__(self, control: Control, z: Tensor, d: Tensor) -> None:
        super().__init__(control, z, d)
        self.p = control.stacked(z)
        self.matrix = self.p @ self.p.t() / self.samples
        self.matrix.diagonal().add_(d)

    def solve(self, q: Tensor) -> Tensor:
        return torch.cholesky_solve(q.unsqueeze(1), self.factor).squeeze(1)

    def gain(self, w: Tensor) -> Tensor:
        return self.solve(self.p @ w.reshape(-1) / self.samples)

    def blocks(self, v: Tensor, u: Tensor, decay: Tensor) -> _Blocks:
        q = self.control.stacked(v.unsqueeze(1)) + (decay * u).unsqueeze(1)
        solved = torch.cholesky_solve(self.p, self.factor)  # M^-1 P
        b = _own(self.p.t(), solved, self.samples)
        c = _own(solved.t(), q, self.samples).squeeze(2)
        if not bool(decay.any()):
            return _Blocks(b, c)
        left = (decay.unsqueeze(1) * solved).t()
        e = _own(left, torch.cholesky_solve(q, self.factor), self.samples).squeeze(2)
        return _Blocks(b, c, _own(left, solved, self.samples), e)


class _ColumnSystem(_System):
    """``A = I + P^T D^-1 P / S``, for fewer columns than parameters; P is not formed.

    ``M^-1 P = D^-1 P A^-1`` and ``M^-1 = D^-1 - D^-1 P A^-1 P^T D^-1 / S`` (Woodbury).
    """

    def __init__(self, control: Control, z: Tensor, d: Tensor) -> None:
        super().__init__(control, z, d)
        self.matrix = control.gram(z, z, 1 / d) / self.samples
        self.matrix.diagonal().add_(1)

    def solve(self, q: Tensor) -> Tensor:
        scaled = q / self.d
        return scaled - self.gain(self._columns(scaled))

    def gain(self, w: Tensor) -> Tensor:
        w = torch.cholesky_solve(w.reshape(-1, 1), self.factor).reshape(w.shape)
        v = (w.unsqueeze(1) @ self.z).squeeze(1)
        return self.control.total(v) / (self.d * self.samples)

    def blocks(self, v: Tensor, u: Tensor, decay: Tensor) -> _Blocks:
        samples, rank, _ = self.z.shape
        inverse = torch.cholesky_inverse(self.factor)
        own = inverse.reshape(samples, rank, samples, rank).diagonal(dim1=0, dim2=2).movedim(2, 0)
        eye = torch.eye(rank, dtype=own.dtype, device=own.device)
        b = samples * (eye - own)  # P^T M^-1 P = S (A - I) A^-1
        f = self._right(v, decay * u, 1 / self.d)
        c = _own(inverse, f, samples).squeeze(2)
        if not bool(decay.any()):
            return _Blocks(b, c)
        weight = decay / self.d.square()
        gram = self.control.gram(self.z, self.z, weight)
        g = self._right(v, decay * u, weight) - gram @ (inverse @ f) / samples
        e = _own(inverse, g, samples).squeeze(2)
        return _Blocks(b, c, _own(inverse, gram @ inverse, samples), e)

    def _columns(self, u: Tensor) -> Tensor:
        """``P^T u``, (S, r)."""
        return (self.z @ self.control.apply(u).unsqueeze(2)).squeeze(2)

    def _right(self, v: Tensor, rest: Tensor, weight: Tensor) -> Tensor:
        """``P^T diag(weight) q`` of every sample's ``q = g_u^T v + rest``, (S r, S)."""
        of_rest = self._columns(weight * rest).reshape(-1, 1)
        return self.control.gram(self.z, v.unsqueeze(1), weight) + of_rest


@dataclass
class _LowRankPolicy(Policy):
    """A policy without its matrices.

    Attributes:
        step: The mean of k over samples, (m).
        system: Of M.
        y: Y of every sample, transposed, (S, r, n); None where dx is zero.
    """

    step: Tensor
    system: _System
    y: Tensor | None

    def change(self, rate: float, dx: Tensor) -> Tensor:
        """The mean of ``du`` over samples."""
        du = rate * self.step
        if self.y is None:
            return du
        w = self.y @ dx.unsqueeze(2)
        return du - self.system.gain(w.squeeze(2).to(du.dtype))


class LowRankDDP(Passes):
    """Algorithm 1 with dynamics of first order, where damping and decay make ``D`` positive.

    It does what :class:`ocnopt.control.ddp.DDP` does; arguments as in
    :class:`ocnopt.control.ddp.Passes`.

    Raises:
        GraphError: The matrices do not fit into memory, or samples depend on one another.
    """

    def __init__(
        self,
        chain: Chain,
        decays: Mapping[Player, Params],
        samples: int,
        dtype: torch.dtype,
        share: float = 1.0,
    ) -> None:
        self._outputs = chain.output.numel()
        super().__init__(chain, decays, samples, dtype, share)

    @property
    def _control_dtype(self) -> torch.dtype:
        return torch.float64

    def backward(self, v: Tensor, k: Tensor, damping: float) -> list[_LowRankPolicy | None] | None:
        """Lines 2 to 6 of Algorithm 1; arguments as in :class:`ocnopt.control.ddp.Passes`."""
        if not all_finite([v, k]):
            raise not_finite(None)
        z = _root(k)
        policies: list[_LowRankPolicy | None] = []
        for stage in reversed(self._stages):
            v, z = stage.s.pull(v), stage.s.pull_columns(z)
            y = None if stage.g is None else stage.g.pull_columns(z)
            policy = None
            if stage.control is not None:
                policy = _minimize(stage, v, z, y, damping)
                if policy is None:
                    return None
            policies.append(policy)
            if stage.g is None or y is None:
                break
            v, z = _value(stage, policy, v, y, self.share)
        return policies[::-1]

    def _room(self, link: Link, first: bool) -> tuple[int, int]:
        samples, m = self.samples, link.player.layer.numel
        n, h = link.x.numel() // samples, link.h.numel() // samples
        columns = self._columns(link)
        side = min(m, columns)
        kept = 2 * side**2 + columns * (n + h) + link.x.numel() + m
        if not link.parameter_free:
            kept += samples * h * h
        linear = isinstance(link.player.layer, LinearLayer)
        if not linear:
            kept += samples * h * m
        if not first and not (linear and link.x.shape[0] == samples):
            kept += samples * h * n
        # P, or what stands for it where a linear layer has few locations.
        few = linear and side == columns and link.x.numel() <= samples * link.x.shape[-1] ** 2
        return DOUBLE * kept, DOUBLE * (4 * side**2 + 3 * columns * (samples * h if few else m))

    def _largest(self, link: Link) -> str:
        m = link.player.layer.numel
        return f"whose Q_uu is {m} x {m} and of rank {min(m, self._columns(link))}"

    def _columns(self, link: Link) -> int:
        """The most columns that all P of a stage have together."""
        return min(self._outputs, link.h.numel())


def _minimize(
    stage: Stage, v: Tensor, z: Tensor, y: Tensor | None, damping: float
) -> _LowRankPolicy | None:
    """The policy that minimizes Q at one stage."""
    control, decay = stage.control, stage.decay
    assert control is not None and decay is not None
    v, z = v.double(), z.double()
    kind = _ColumnSystem if z.shape[0] * z.shape[1] <= control.size else _ParameterSystem
    system = kind(control, z, decay + damping)
    u = control.join(control.player.params)
    q = control.total(v) / len(v) + decay * u
    if not all_finite([z, q, system.matrix]):
        raise not_finite(stage.link)
    if not system.factorize():
        return None
    step = -system.solve(q)
    bent = (z @ control.apply(step).unsqueeze(2)).square().sum() / len(v)
    bow = float(bent + (decay * step) @ step)
    return _LowRankPolicy(control, float(step @ q), bow, step, system, y)


def _value(
    stage: Stage, policy: _LowRankPolicy | None, v: Tensor, y: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Gradient (S, n) and transposed Z (S, r, n) of the value at a stage's input."""
    assert stage.g is not None
    v_x = stage.g.pull(v)
    if policy is not None:
        assert stage.decay is not None
        u = policy.control.join(policy.control.player.params)
        of = policy.system.blocks(v.double(), u, stage.decay)
        change = 2 * of.c - share * (of.b @ of.c.unsqueeze(2)).squeeze(2)
        root = torch.eye(y.shape[1], dtype=of.b.dtype, device=of.b.device) - share * of.b
        if of.j is not None and of.e is not None:
            change = change - share * of.e
            values, vectors = eigenvalues(
                root @ root + share**2 * of.j, f"the value before {policy.control.player.name!r}"
            )
            root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).mT
        v_x = v_x - share * (change.to(y.dtype).unsqueeze(1) @ y).squeeze(1)
        y = root.to(y.dtype) @ y
    if y.shape[1] > y.shape[2]:  # no more columns than rows are needed
        y = torch.linalg.qr(y, mode="r").R
    return v_x, y


def _root(k: Tensor) -> Tensor:
    """Transposed Z (S, r, n) with ``Z Z^T`` the matrices k (S, n, n), but for rounding."""
    values, vectors = eigenvalues(k, "the criterion's Hessian")
    least = torch.finfo(k.dtype).eps * k.shape[1] * values.max()
    kept = (values > least).any(0)
    kept[-1] = True
    roots = values[:, kept].clamp_min(0).sqrt().unsqueeze(2)
    return (roots * vectors[:, :, kept].mT).to(k.dtype)


def _own(left: Tensor, right: Tensor, samples: int) -> Tensor:
    """Every sample's own block (S, r, c) of ``left @ right``, (S r, *) and (*, S c)."""
    rows = left.reshape(samples, -1, left.shape[1])
    return rows @ right.reshape(right.shape[0], samples, -1).transpose(0, 1)
