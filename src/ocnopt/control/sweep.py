"""One step of DDPNOpt (Algorithm 3): the Bellman pass backward, the feedback pass forward.

    theta_t <- theta_t - eta M_t^-1 sum_i w_i P_u^(i) [ v_{t+1}^(i) + clip(K_{t+1}^(i) rho_t^(i)) ]

with ``rho_t = P_x^T dx_t``, how far the updates of the players before t have moved the sample's
cost directions. In the linear rollout that is the sum over those players of
``P_h^T g(x; update)``; in the nonlinear one it is read off a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.bellman import pull_back, pull_back_joint
from ocnopt.control.players import Player
from ocnopt.curvature.metric import Metric
from ocnopt.layers.base import Params

__all__ = ["Stage", "Sweep"]


class Mover(Protocol):
    """How a player's parameters move: the optimizer's side of a stage."""

    scale: float

    def observe(
        self,
        mean: Callable[[], Params],
        factors: Callable[[], tuple[Tensor, Tensor]],
        samples: int,
    ) -> Metric:
        """Update the preconditioner with the Bellman objective."""

    def probe(self, mean: Params) -> Params:
        """The open-loop step ``-eta M^-1 E[Q_u]``."""

    def base(self) -> Params:
        """The gradient as the loop left it."""

    def move(self, d: Params) -> Params:
        """The parameters' change for the direction d."""


@dataclass
class Stage:
    """A player within one step.

    Attributes:
        player: The player.
        mover: How its parameters move.
        bound: Bound on feedback relative to the open-loop term, or None.
        values: v and K at its output, per batch.
        feedback: Per batch, at rank one (unbounded, applied, v); else (ratio to the open-loop
            term, factor applied).
        delta: The parameters' change.
    """

    player: Player
    mover: Mover
    bound: float | None
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    feedback: list[tuple[Tensor, ...] | None] = field(default_factory=list)
    delta: Params = ()


class Sweep:
    """The two passes over the stages of a step.

    Args:
        stages: Players with gradients, in forward order.
        batches: Recorded samples.
        rule: The recursion.
        rollout: "linear", "nonlinear" or "off".
        reduce: Averages tensors over data-parallel processes, or None.
        total: Sums a number over processes, or None.
    """

    def __init__(
        self,
        stages: list[Stage],
        batches: list[Batch],
        rule: str,
        rollout: str,
        reduce: Callable[[Params], Params] | None = None,
        total: Callable[[Params], Params] | None = None,
    ) -> None:
        self.stages = stages
        self.batches = batches
        self.rule = rule
        self.rollout = rollout
        self.reduce = reduce
        self.total = total
        self.rho: list[Tensor | None] = [None] * len(batches)
        self.path: list[list[Tensor | None]] = []
        self.samples = sum(batch.samples for batch in batches)
        if total is not None:
            (count,) = total((torch.tensor(float(self.samples)),))
            self.samples = int(count)

    def weighted(
        self, stage: Stage, coefficients: list[Tensor], base: Params, scale: float
    ) -> Params:
        """``base + scale * sum over batches and processes of P_u c``."""
        if self.reduce is None:
            for batch, c in zip(self.batches, coefficients, strict=True):
                trace = batch.traces.get(stage.player)
                if trace is not None:
                    base = trace.add_weighted(base, c, scale)
            return base
        local = tuple(torch.zeros_like(p) for p in stage.player.params)
        for batch, c in zip(self.batches, coefficients, strict=True):
            trace = batch.traces.get(stage.player)
            if trace is not None:
                local = trace.add_weighted(local, c, 1.0)
        return tuple(
            torch.add(b, p, alpha=scale) for b, p in zip(base, self.reduce(local), strict=True)
        )

    def backward(self) -> None:
        """Lines 6 to 13 of Algorithm 3: values and preconditioners, last player to first."""
        values = [(batch.v, batch.k) for batch in self.batches]
        for position in range(len(self.stages) - 1, -1, -1):
            stage = self.stages[position]
            stage.values = values
            mover = stage.mover

            def mean(stage: Stage = stage) -> Params:
                if self.rule == "off":
                    return stage.mover.base()
                coefficients = [
                    batch.signal_weights(v) - batch.baseline()
                    for batch, (v, _) in zip(self.batches, stage.values, strict=True)
                ]
                return self.weighted(stage, coefficients, stage.mover.base(), stage.mover.scale)

            def factors(stage: Stage = stage) -> tuple[Tensor, Tensor]:
                return self._factors(stage)

            metric = mover.observe(mean, factors, self.samples)
            if self.rule == "off" or position == 0:
                continue  # no player before the first asks for its value
            if self.rule == "joint":
                step = mover.probe(mean())
                values = [
                    self._pull_joint(batch, stage, step, v, k)
                    for batch, (v, k) in zip(self.batches, values, strict=True)
                ]
                continue
            values = [
                self._pull(batch, stage, metric, v, k)
                for batch, (v, k) in zip(self.batches, values, strict=True)
            ]

    def _pull(
        self, batch: Batch, stage: Stage, metric: Metric, v: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        trace = batch.traces.get(stage.player)
        if trace is None:
            return v, k
        s = batch.own_gram(trace.gram(metric))
        return pull_back(self.rule, v, k, s, batch.weight * stage.mover.scale)

    def _pull_joint(
        self, batch: Batch, stage: Stage, step: Params, v: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        trace = batch.traces.get(stage.player)
        if trace is None:
            return v, k
        return pull_back_joint(v, k, batch.own(trace.dots(step)))

    def _factors(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """``E[a a^T]`` over samples and locations; locations times ``E[V_h V_h^T]``."""
        a_sum = b_sum = None
        rows_seen = 0
        for batch, (v, _) in zip(self.batches, stage.values, strict=True):
            trace = batch.traces.get(stage.player)
            if trace is None:
                continue
            rows, cols = trace.rows_and_cols(batch.signal_own(v), 1.0)
            rows_seen += rows.shape[0] * rows.shape[1]
            a = _second_moment(rows.to(trace.dtype))
            b = _second_moment(cols.to(trace.dtype))
            a_sum = a if a_sum is None else a_sum + a
            b_sum = b if b_sum is None else b_sum + b
        assert a_sum is not None and b_sum is not None
        seen = a_sum.new_tensor([rows_seen])
        if self.total is not None:
            a_sum, b_sum, seen = self.total((a_sum, b_sum, seen))
        return a_sum / seen, b_sum / self.samples

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
        coefficients = []
        idle = True
        for i, batch in enumerate(self.batches):
            v, k = stage.values[i]
            moved = rho[i] if self.rollout != "off" else None
            if moved is None:
                stage.feedback.append(None)
                x = v
                idle = idle and self.rule == "off"
            else:
                applied = self._feedback(stage, i, v, k, moved)
                x = v + applied
                idle = False
            coefficients.append(batch.signal_weights(x) - batch.baseline())
        base = stage.mover.base()
        d = base if idle else self.weighted(stage, coefficients, base, stage.mover.scale)
        stage.delta = stage.mover.move(d)
        return stage.delta

    def _feedback(self, stage: Stage, i: int, v: Tensor, k: Tensor, rho: Tensor) -> Tensor:
        """``K rho``, bounded relative to the sample's open-loop term."""
        if v.dim() == 1:
            raw = applied = k * rho
            if stage.bound is not None:
                limit = v.abs() * stage.bound
                applied = torch.clamp(raw, -limit, limit)
            stage.feedback.append((raw, applied, v))
            return applied
        raw = (k @ rho.unsqueeze(-1)).squeeze(-1)
        batch = self.batches[i]
        trace = batch.traces.get(stage.player)
        if trace is None:
            stage.feedback.append(None)
            return raw
        ratio = trace.ratio(batch.signal_own(v), batch.signal_own(raw))
        factor = torch.ones_like(ratio)
        if stage.bound is not None:
            factor = torch.where(ratio > stage.bound, stage.bound / ratio, factor)
        stage.feedback.append((ratio, factor))
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


def _second_moment(x: Tensor) -> Tensor:
    """Sum of outer products of (B, L, groups, n) over B and L: (groups, n, n)."""
    flat = x.reshape(-1, *x.shape[2:]).transpose(0, 1)
    return flat.transpose(1, 2) @ flat
