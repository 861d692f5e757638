"""Differential dynamic programming on a chain, with every second-order term (Algorithm 1).

Equations are those of Liu, Chen & Theodorou, ICLR 2021 (Eq. 3 to 5, 12 and 26); the regularization
and the value under regularized gains are those of Tassa, Erez & Todorov 2012 (Eq. 10 and 11).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ocnopt.control.affine import Control, control_of, control_room
from ocnopt.control.chain import Chain, Link
from ocnopt.control.players import Player
from ocnopt.control.room import room
from ocnopt.control.transport import Transport, bend, layer_jacobian, state_jacobian
from ocnopt.curvature.factorize import spd_factor
from ocnopt.errors import GraphError, NonFiniteError
from ocnopt.finite import all_finite
from ocnopt.layers.base import Params

__all__ = ["DDP", "Expansion", "Gains", "Passes", "Policy", "Stage", "not_finite"]


@dataclass
class Expansion:
    """The Bellman objective Q of one stage to second order, and the value at its input.

    Attributes:
        q_u: (S, m).
        q_uu: Mean over samples, (m, m).
        q_ux: (S, m, n); None where the stage's state is fixed.
        v_x: Value gradient at its input, (S, n); None as above.
        v_xx: Its Hessian, (S, n, n); None as above.
    """

    q_u: Tensor
    q_uu: Tensor
    q_ux: Tensor | None = None
    v_x: Tensor | None = None
    v_xx: Tensor | None = None


@dataclass
class Policy(ABC):
    """``du = alpha k + K dx`` of every sample at one stage, and what k is expected to save.

    Attributes:
        control: The stage's control.
        slope: ``k^T Q_u`` of the batch.
        bow: ``k^T Q_uu k`` of the batch.
    """

    control: Control
    slope: float
    bow: float

    @abstractmethod
    def change(self, rate: float, dx: Tensor) -> Tensor:
        """The mean of ``du`` over samples, (m).

        Args:
            rate: alpha.
            dx: Change of the state at the stage's input, (S, n).
        """


@dataclass
class Gains(Policy):
    """A policy with its matrices.

    Attributes:
        k: (S, m).
        gain: K, (S, m, n); None where dx is zero.
    """

    k: Tensor
    gain: Tensor | None

    def change(self, rate: float, dx: Tensor) -> Tensor:
        """The mean of ``du`` over samples."""
        du = rate * self.k.mean(0)
        if self.gain is None:
            return du
        return du + (self.gain @ dx.unsqueeze(-1)).squeeze(-1).mean(0)


@dataclass
class Stage:
    """One stage at this batch.

    Attributes:
        link: The layer and what follows it.
        s: Jacobian of what follows it.
        g: Jacobian of the layer; None where its input is fixed.
        control: Its parameters; None where they stay as they are.
        decay: Their weight decay (m); None as above.
    """

    link: Link
    s: Transport
    g: Transport | None
    control: Control | None
    decay: Tensor | None


class Passes(ABC):
    """Algorithm 1 but for how its backward pass is computed.

    Args:
        chain: The network at this batch.
        decays: The controlled players with the weight decay of each of their parameters, shaped as
            the parameter and the same throughout it.
        samples: S: the batch's samples, or 1 for the stacked problem.
        dtype: The dtype of values.
        share: What a sample's value takes its own policy times: 1, or 1/S, its part in the update.
        inspect: Expand the first stage in its state, too.

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
        inspect: bool = False,
    ) -> None:
        self.samples = samples
        self.dtype = dtype
        self.share = share
        links = chain.links
        self._links = links
        first = next((i for i, link in enumerate(links) if link.player in decays), len(links))
        start = 0 if inspect else first
        _require_rows(links, samples)
        self._require_room([k for k in links if k.player in decays], inspect)
        self._stages: list[Stage] = []
        for i, link in enumerate(links[start:], start):
            control = decay = None
            if link.player in decays:
                control = control_of(link, samples, self._control_dtype)
                decay = control.join(decays[link.player])
            free = i > start or inspect
            self._stages.append(
                Stage(
                    link,
                    state_jacobian(link, samples, dtype),
                    layer_jacobian(link, samples, dtype) if free else None,
                    control,
                    decay,
                )
            )

    @property
    def _control_dtype(self) -> torch.dtype:
        """The dtype of what is computed about parameters."""
        return self.dtype

    @abstractmethod
    def backward(self, v: Tensor, k: Tensor, damping: float) -> Sequence[Policy | None] | None:
        """Lines 2 to 6 of Algorithm 1.

        Args:
            v: Gradient of every sample's cost in the network's output, (S, n).
            k: Its Hessian, (S, n, n).
            damping: Added to the diagonal of Q_uu.

        Returns:
            A policy per stage, None where nothing is controlled; or None as a whole where a Q_uu
            with its damping is not positive definite.

        Raises:
            NonFiniteError: With the layer at which it began.
        """

    def forward(
        self, policies: Sequence[Policy | None], rates: Mapping[Player, float]
    ) -> tuple[Tensor, dict[Player, Params]]:
        """Lines 7 to 11 of Algorithm 1, with ``du = mean_i (alpha k_i + K_i dx_i)``.

        Args:
            policies: From :meth:`backward`.
            rates: alpha of every controlled player.

        Returns:
            The network's output under the new parameters, and these.
        """
        new: dict[Player, Params] = {}
        x = self._stages[0].link.x
        for stage, policy in zip(self._stages, policies, strict=True):
            params: Params | None = None
            link = stage.link
            if policy is not None:
                dx = (x.to(self.dtype) - link.x.to(self.dtype)).reshape(self.samples, -1)
                du = policy.control.split(policy.change(rates[link.player], dx))
                params = tuple(p + d for p, d in zip(link.player.params, du, strict=True))
                new[link.player] = params
            x = link.f(x, params)
        return x, new

    @abstractmethod
    def _room(self, link: Link, first: bool) -> tuple[int, int]:
        """Bytes that a controlled stage keeps, and that it takes for a while.

        Args:
            link: The stage.
            first: Whether its state is fixed.
        """

    @abstractmethod
    def _largest(self, link: Link) -> str:
        """What takes the room at a stage, as a relative clause."""

    def _require_room(self, links: list[Link], inspect: bool) -> None:
        """Raise unless the largest stage's matrices and all policies fit into memory."""
        if not links:
            return
        kept, taken = zip(
            *(self._room(link, i == 0 and not inspect) for i, link in enumerate(links)), strict=True
        )
        most = max(range(len(links)), key=lambda i: kept[i] + taken[i])
        need, available = sum(kept) + max(taken), room(links[0].x.device)
        if need > available:
            raise GraphError(
                f"vanilla DDP would take about {need / 2**30:.1f} GiB, most of it at layer "
                f"{links[most].player.name!r}, {self._largest(links[most])}; "
                f"{available / 2**30:.1f} GiB are at hand. "
                "Use DDPNOpt, which never forms them, or a smaller batch or network"
            )


class DDP(Passes):
    """Algorithm 1 with every matrix formed.

    Args:
        chain: The network at this batch.
        decays: As in :class:`Passes`.
        samples: S: the batch's samples, or 1 for the stacked problem.
        dtype: The dtype of values.
        share: What a sample's value takes its own policy times: 1, or 1/S, its part in the update.
        order: Of the expansion of the dynamics; 1 leaves the terms ``V . f_**`` of Eq. 3 out.
        state_reg: Added to the diagonal of V_xx in the Q_uu and Q_ux that make the gains.
        inspect: Expand the first stage in its state, too, and keep every Q.

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
        order: int = 2,
        state_reg: float = 0.0,
        inspect: bool = False,
    ) -> None:
        self.order = order
        self.state_reg = state_reg
        self.inspect = inspect
        #: Q of every controlled stage in the last backward pass, where they are kept.
        self.expansions: dict[Player, Expansion] = {}
        super().__init__(chain, decays, samples, dtype, share, inspect)

    def backward(self, v: Tensor, k: Tensor, damping: float) -> list[Gains | None] | None:
        """Lines 2 to 6 of Algorithm 1; arguments as in :class:`Passes`."""
        self.expansions = {}
        policies: list[Gains | None] = []
        if not all_finite([v, k]):
            raise not_finite(None)
        for stage in reversed(self._stages):
            v_h, k_h = stage.s.pull(v), stage.s.pull_matrix(k)
            if self.order == 2:
                bent = bend(stage.link, v)
                k_h = k_h + (torch.diag_embed(bent) if bent.dim() == 2 else bent)
            k_h = _symmetric(k_h)
            extra = None
            if self.state_reg:
                unit = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
                extra = self.state_reg * stage.s.pull_matrix(unit.expand(self.samples, -1, -1))
            found: tuple[Expansion, Gains] | None = None
            if stage.control is not None:
                mixed = stage.control.mixed(v_h) if self.order == 2 and stage.g else None
                found = _minimize(stage, v_h, k_h, mixed, extra, damping)
                if found is None:
                    return None
                if self.inspect:
                    self.expansions[stage.link.player] = found[0]
            policies.append(None if found is None else found[1])
            if stage.g is None:
                break
            v, k = _value(stage, found, v_h, k_h, self.share)
            if found is not None:
                found[0].v_x, found[0].v_xx = v, k
        return policies[::-1]

    def _room(self, link: Link, first: bool) -> tuple[int, int]:
        size = torch.finfo(self.dtype).bits // 8
        gain = 0 if first else link.player.layer.numel * link.x.numel()
        return size * gain, size * control_room(link, self.samples, first)

    def _largest(self, link: Link) -> str:
        m, samples = link.player.layer.numel, self.samples
        return (
            f"whose Q_uu is {m} x {m} and whose Q_ux is {m} x {link.x.numel() // samples} for each "
            f"of {samples} sample{'s' if samples > 1 else ''}"
        )


def _minimize(
    stage: Stage,
    v_h: Tensor,
    k_h: Tensor,
    mixed: Tensor | None,
    extra: Tensor | None,
    damping: float,
) -> tuple[Expansion, Gains] | None:
    """Eq. 3 and 4 at one stage: Q and the policy that minimizes it."""
    control, decay = stage.control, stage.decay
    assert control is not None and decay is not None
    samples, m = v_h.shape[0], control.size
    u = control.join(control.player.params)
    q_u = control.pull(v_h.unsqueeze(-1)).squeeze(-1) + decay * u
    q_uu = control.curvature(k_h)
    q_uu.diagonal().add_(decay)
    e = Expansion(q_u, q_uu)
    uu = q_uu.clone() if extra is None else q_uu + control.curvature(extra)
    uu.diagonal().add_(damping)
    right = q_u.t()
    if stage.g is not None:
        e.q_ux = control.pull(stage.g.pull_columns(k_h))
        if mixed is not None:
            e.q_ux += mixed
        ux = e.q_ux
        if extra is not None:
            ux = ux + control.pull(stage.g.pull_columns(extra))
        right = torch.cat([right, ux.transpose(0, 1).reshape(m, -1)], 1)
    if not all_finite([right, uu]):
        raise not_finite(stage.link)
    factor = spd_factor(_symmetric(uu))
    if factor is None:
        return None
    solved = -torch.cholesky_solve(right, factor)
    k = solved[:, :samples].t()
    gain = None
    if stage.g is not None:
        gain = solved[:, samples:].reshape(m, samples, -1).transpose(0, 1)
    step = k.mean(0)
    slope, bow = float(step @ q_u.mean(0)), float(step @ (q_uu @ step))
    return e, Gains(control, slope, bow, k, gain)


def _value(
    stage: Stage,
    found: tuple[Expansion, Gains] | None,
    v_h: Tensor,
    k_h: Tensor,
    share: float,
) -> tuple[Tensor, Tensor]:
    """The value at a stage's input if every sample follows its share of its own policy.

    With the sample's own Q's and without their regularization, so that it is the cost-to-go of
    the gains as they are (Tassa et al., Eq. 11); Eq. 5 is the case without regularization.
    """
    assert stage.g is not None
    v_x, v_xx = stage.g.pull(v_h), stage.g.pull_matrix(k_h)
    if found is not None:
        assert stage.control is not None and stage.decay is not None
        e, policy = found
        assert policy.gain is not None and e.q_ux is not None
        gain, step = share * policy.gain, share * policy.k.unsqueeze(-1)
        own = stage.control.push(gain)  # g_u K, (S, N, n)
        uu_k = k_h @ stage.control.push(step)
        rest = stage.decay.unsqueeze(-1) * step + e.q_u.unsqueeze(-1)
        change = own.mT @ uu_k + gain.mT @ rest + e.q_ux.mT @ step
        cross = gain.mT @ (e.q_ux + 0.5 * stage.decay.unsqueeze(-1) * gain)
        v_x = v_x + change.squeeze(-1)
        v_xx = v_xx + own.mT @ (k_h @ own) + cross + cross.mT
    return v_x, _symmetric(v_xx)


def _symmetric(k: Tensor) -> Tensor:
    return (k + k.mT) / 2


def not_finite(link: Link | None) -> NonFiniteError:
    """The error for derivatives that are not finite.

    Args:
        link: The stage at which that is seen first; None for the criterion.
    """
    if link is None:
        return NonFiniteError(
            "the criterion's gradient or Hessian at the model's output is not finite; no "
            "weight was changed. Look for a division, root or logarithm of zero in it"
        )
    return NonFiniteError(
        f"the derivatives of the cost are not finite at layer {link.player.name!r} or in "
        "the operations behind it; no weight was changed. Look for a division, root or "
        "logarithm of zero there, or skip this batch"
    )


def _require_rows(links: list[Link], samples: int) -> None:
    """Raise unless every stage's rows belong to the samples of the output."""
    for link in links:
        rows = [t.shape[0] if t.dim() else 0 for t in (link.x, link.h)]
        if any(r == 0 or r % samples for r in rows):
            raise GraphError(
                f"layer {link.player.name!r} works on {rows[0]} rows, which are no multiple of the "
                f"{samples} samples of the output; use batch='joint', which needs no samples"
            )
