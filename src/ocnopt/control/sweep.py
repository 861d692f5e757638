"""One step of DDPNOpt (Algorithm 3): the Bellman pass backward, the feedback pass forward.

    theta_t <- theta_t - eta M_t^-1 sum_i w_i P_u^(i) [ v_{t+1}^(i) + clip(K_{t+1}^(i) rho_t^(i)) ]

with ``rho_t = P_x^T dx_t``, how far the updates of the players before t have moved the sample's
cost directions. In the linear rollout that is the sum over those players of
``P_h^T g(x; update)``; in the nonlinear one it is read off a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.bellman import PROPORTIONAL, pull_back, pull_back_all, pull_back_joint
from ocnopt.control.players import Player
from ocnopt.control.trace import outer_norms
from ocnopt.curvature.metric import Metric
from ocnopt.layers.base import Params, add_all

__all__ = ["Stage", "Sweep"]


class Mover(Protocol):
    """How a player's parameters move: the optimizer's side of a stage."""

    params: list[Tensor]
    states: list[dict[str, Any]]
    scale: float
    #: Whether the players' own gradients are not in :meth:`base`.
    partial: bool
    #: Whether the loop did more than rescale the gradient.
    edited: bool
    report: dict[str, float]

    @property
    def plain(self) -> bool:
        """Whether M = I."""

    @property
    def only_rate(self) -> float | None:
        """The learning rate, where the move is the direction times it and nothing else."""

    def observe(
        self,
        mean: Callable[[], Params],
        factors: Callable[[], tuple[Tensor, Tensor]],
        samples: int,
    ) -> Metric:
        """Update the preconditioner with the Bellman objective."""

    def probe(self, mean: Params) -> Params:
        """The open-loop step ``-eta M^-1 E[Q_u]``."""

    def base(self) -> Params | None:
        """The gradient as the loop left it; None where autograd formed none."""

    def masked(self, d: Params) -> Params:
        """The direction without the entries that the loop has set to zero in the gradient."""

    def move(self, d: Params, bound: float | None = None) -> Params:
        """The parameters' change for the direction d, feedback bounded by ``bound``."""


@dataclass
class Stage:
    """A player within one step.

    Attributes:
        player: The player.
        mover: How its parameters move.
        bound: Bound on feedback relative to the open-loop term, or None.
        values: v and K at its output, per batch.
        feedback: Per batch: what the policy asked for and what the bound let through, as ratios to
            the open-loop term, or followed by the term itself.
        delta: The parameters' change.
        metric: The preconditioner's inverse.
        probe: The batch's open-loop step, for the recursion "joint".
    """

    player: Player
    mover: Mover
    bound: float | None
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    feedback: list[tuple[Tensor, ...] | None] = field(default_factory=list)
    delta: Params = ()
    metric: Metric | None = None
    probe: Params | None = None


class Sweep:
    """The two passes over the stages of a step.

    Args:
        stages: Players with gradients, in forward order.
        batches: Recorded samples.
        rule: The recursion.
        rollout: "linear", "nonlinear" or "off".
        curvature: What M is built from: "gradient", or "value" (Q_u and V_h, Table 2).
        reduce: Averages tensors over data-parallel processes, or None.
        total: Sums a number over processes, or None.
    """

    def __init__(
        self,
        stages: list[Stage],
        batches: list[Batch],
        rule: str,
        rollout: str,
        curvature: str = "gradient",
        reduce: Callable[[Params], Params] | None = None,
        total: Callable[[Params], Params] | None = None,
    ) -> None:
        self.stages = stages
        self.batches = batches
        self.rule = rule
        self.rollout = rollout
        self.curvature = curvature
        self.reduce = reduce
        self.total = total
        self.rho: list[Tensor | None] = [None] * len(batches)
        self.path: list[list[Tensor | None]] = []
        self.samples = sum(batch.samples for batch in batches)
        if total is not None:
            (count,) = total((batches[0].v.new_tensor(float(self.samples)),))
            self.samples = int(count)

    def weighted(self, stage: Stage, excess: list[Tensor], factor: float = 1.0) -> Params:
        """The gradient, plus the sum over batches and processes of ``P_u`` times the excess.

        Args:
            stage: The stage.
            excess: Coefficients of the recorded columns beyond those of the gradient, per batch.
            factor: Multiplies the result.
        """
        base, scale = stage.mover.base(), stage.mover.scale
        found = [
            (batch, trace, c)
            for batch, c in zip(self.batches, excess, strict=True)
            if (trace := batch.traces.get(stage.player)) is not None
        ]
        if stage.mover.partial:
            formed = add_all(
                [t.weighted((c + b.baseline(stage.player)).mul_(factor)) for b, t, c in found]
            )
            if base is None:
                return formed
            # What autograd did form is from elsewhere: a penalty, a use without the module.
            return tuple(torch.add(f, b, alpha=factor) for f, b in zip(formed, base, strict=True))
        assert base is not None
        if self.reduce is None:
            for i, (_, trace, c) in enumerate(found):
                base = trace.add_weighted(base, c, factor * scale, 1.0 if i else factor)
            return base
        local = self.reduce(add_all([trace.weighted(c) for _, trace, c in found]))
        return tuple(
            torch.mul(b, factor).add_(p, alpha=factor * scale)
            for b, p in zip(base, local, strict=True)
        )

    def _gradient(self, stage: Stage) -> Params:
        """The plain gradient."""
        base = stage.mover.base()
        if base is not None and not stage.mover.partial:
            return base
        return self.weighted(stage, [torch.zeros_like(batch.v) for batch in self.batches])

    def backward(self) -> None:
        """Lines 6 to 13 of Algorithm 3: values and preconditioners, last player to first."""
        if self._backward_together():
            return
        values = [(batch.v, batch.k) for batch in self.batches]
        for position in range(len(self.stages) - 1, -1, -1):
            stage = self.stages[position]
            stage.values = values
            metric = self._observe(stage)
            if self.rule == "off" or position == 0:
                continue  # no player before the first asks for its value
            values = [
                self._pull(batch, stage, metric, v, k)
                for batch, (v, k) in zip(self.batches, values, strict=True)
            ]

    def _observe(self, stage: Stage) -> Metric:
        """Update a player's preconditioner."""

        def value_mean() -> Params:
            if all(v is batch.v for batch, (v, _) in zip(self.batches, stage.values, strict=True)):
                return self._gradient(stage)  # the value is the cost's own
            excess = [
                batch.signal_weights(v) - batch.baseline(stage.player)
                for batch, (v, _) in zip(self.batches, stage.values, strict=True)
            ]
            return self.weighted(stage, excess)

        def mean() -> Params:
            return self._gradient(stage) if self.curvature == "gradient" else value_mean()

        def factors() -> tuple[Tensor, Tensor]:
            return self._factors(stage)

        samples = self.samples // stage.player.layer.networks
        stage.metric = stage.mover.observe(mean, factors, samples)
        if self.rule == "joint":
            stage.probe = stage.mover.probe(value_mean())
        return stage.metric

    def _backward_together(self) -> bool:
        """All stages at once where M = I, samples have one location and the rank is one.

        Small networks spend their time on the number of operations; this makes it independent of
        the number of layers. Returns False where the stages are not of that kind.
        """
        if self.rule not in ("share", "sample") or len(self.batches) != 1:
            return False
        batch = self.batches[0]
        traces = [batch.traces.get(stage.player) for stage in self.stages]
        if (
            batch.rank > 1
            or not isinstance(batch.lift, float)
            or not all(
                stage.mover.plain and trace is not None and trace.single
                for stage, trace in zip(self.stages, traces, strict=True)
            )
        ):
            return False
        metrics = [stage.mover.observe(_no_mean, _no_factors, 0) for stage in self.stages]
        for stage, metric in zip(self.stages, metrics, strict=True):
            stage.metric = metric
        if len(traces) == 1:
            self.stages[0].values = [(batch.v, batch.k)]
            return True
        later = [trace for trace in traces[1:] if trace is not None]
        s = outer_norms(later, metrics[1:]).to(batch.v.dtype)  # (B, players after the first)
        share: Tensor | float = 1.0
        if self.rule == "share":
            weights = [batch.weight * stage.mover.scale for stage in self.stages[1:]]
            share = weights[0] if len(set(weights)) == 1 else s.new_tensor(weights)
        values = pull_back_all(batch.v, batch.k, s * (share * batch.lift * batch.lift))
        for stage, (v, k) in zip(self.stages, values, strict=True):
            stage.values = [(v, k)]
        return True

    def _pull(
        self, batch: Batch, stage: Stage, metric: Metric, v: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        trace = batch.traces.get(stage.player)
        if trace is None:
            return v, k
        if stage.probe is not None:
            return pull_back_joint(v, k, batch.own(trace.dots(stage.probe)))
        s = batch.own_gram(trace.gram(metric))
        return pull_back(self.rule, v, k, s, batch.weight * stage.mover.scale)

    def at_input(self, i: int, stage: Stage) -> tuple[Tensor, Tensor]:
        """The value's coefficients at a player's input, in batch i."""
        v, k = stage.values[i]
        if self.rule == "off" or stage.metric is None:
            return v, k
        return self._pull(self.batches[i], stage, stage.metric, v, k)

    def _factors(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """``E[a a^T]`` over samples and locations; locations times ``E[V_h V_h^T]``."""
        a_sum = b_sum = None
        rows_seen = 0
        for batch, (v, _) in zip(self.batches, stage.values, strict=True):
            trace = batch.traces.get(stage.player)
            if trace is None:
                continue
            if self.curvature == "gradient":
                v = batch.gradient_values(stage.player)
            rows, cols = trace.rows_and_cols(batch.signal_own(v), 1.0)
            rows_seen += rows.shape[0] * rows.shape[1]
            a = trace.layer.second_moment(rows.to(trace.dtype))
            b = trace.layer.second_moment(cols.to(trace.dtype))
            a_sum = a if a_sum is None else a_sum + a
            b_sum = b if b_sum is None else b_sum + b
        assert a_sum is not None and b_sum is not None
        seen = a_sum.new_tensor([rows_seen])
        if self.total is not None:
            a_sum, b_sum, seen = self.total((a_sum, b_sum, seen))
        networks = stage.player.layer.networks
        return a_sum / (seen / networks), b_sum / (self.samples / networks)

    def forward(self) -> None:
        """Lines 14 to 18 of Algorithm 3 in linear form: moves, first player to last."""
        for position in range(len(self.stages)):
            self.act(position, self.rho)
            self.follow(position)

    def act(self, position: int, rho: list[Tensor | None]) -> Params:
        """The move of one player, given the cost directions at its turn.

        Args:
            position: Index among the stages.
            rho: Per batch (B,) or (B, r); None where nothing has moved yet.
        """
        stage = self.stages[position]
        excess = []
        idle = True
        for i, batch in enumerate(self.batches):
            v, k = stage.values[i]
            moved = rho[i] if self.rollout != "off" else None
            if moved is None:
                stage.feedback.append(None)
                excess.append(batch.signal_weights(v) - batch.baseline(stage.player))
                idle = idle and v is batch.v
                continue
            idle = False
            if batch.rank == 1:
                excess.append(self._feedback(stage, batch, v, k, moved))
            else:
                x = v + self._feedback_columns(stage, batch, v, k, moved)
                excess.append(batch.signal_weights(x) - batch.baseline(stage.player))
        rate = stage.mover.only_rate
        if rate is not None and not idle:
            stage.delta = self.weighted(stage, excess, -rate)
        else:
            d = self._gradient(stage) if idle else stage.mover.masked(self.weighted(stage, excess))
            stage.delta = stage.mover.move(d, None if idle else stage.bound)
        return stage.delta

    def _feedback(self, stage: Stage, batch: Batch, v: Tensor, k: Tensor, rho: Tensor) -> Tensor:
        """``v - 1 + clip(K rho)`` at rank one."""
        bound = stage.bound
        if self.rule in PROPORTIONAL:
            # K / v is the terminal one at every player: the clipped ratio is a number per sample.
            ratio = batch.k * rho
            clipped = ratio if bound is None else ratio.clamp(-bound, bound)
            stage.feedback.append((ratio, clipped))
            return torch.addcmul(v - 1, v, clipped)
        raw = applied = k * rho
        if bound is not None:
            limit = v.abs() * bound
            applied = torch.clamp(raw, -limit, limit)
        stage.feedback.append((raw, applied, v))
        return v + (applied - 1)

    def _feedback_columns(
        self, stage: Stage, batch: Batch, v: Tensor, k: Tensor, rho: Tensor
    ) -> Tensor:
        """``K rho``, bounded relative to the sample's open-loop term, at rank r."""
        raw = (k @ rho.unsqueeze(-1)).squeeze(-1)
        trace = batch.traces.get(stage.player)
        if trace is None:
            stage.feedback.append(None)
            return raw
        ratio = trace.ratio(batch.signal_own(v), batch.signal_own(raw))
        factor = torch.ones_like(ratio)
        if stage.bound is not None:
            factor = torch.where(ratio > stage.bound, stage.bound / ratio, factor)
        stage.feedback.append((ratio, ratio * factor))
        return raw * factor[:, None]

    def follow(self, position: int) -> None:
        """Carry the cost directions past a player's move."""
        stage = self.stages[position]
        for i, batch in enumerate(self.batches):
            trace = batch.traces.get(stage.player)
            if trace is None:
                continue
            moved = batch.own(trace.dots(stage.delta))
            before = self.rho[i]
            self.rho[i] = moved if before is None else before + moved
        self.path.append(list(self.rho))


def _no_mean() -> Params:
    raise AssertionError("M = I does not depend on the gradient")


def _no_factors() -> tuple[Tensor, Tensor]:
    raise AssertionError("M = I asks for no factors")
