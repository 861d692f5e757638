"""One step of DDPNOpt (Algorithm 3): the Bellman pass backward, the feedback pass forward.

    theta_t <- theta_t - eta M_t^-1 sum_i w_i P_u^(i) [ v_{t+1}^(i) + clip(K_{t+1}^(i) rho_t^(i)) ]

with ``rho_t = P_x^T dx_t``, how far the updates of the players before t have moved the sample's
cost directions. In the linear rollout that is the sum over those players of
``P_h^T g(x; update)``; in the nonlinear one it is read off a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.bellman import pull_back, pull_back_all, pull_back_joint
from ocnopt.control.demand import demand
from ocnopt.control.fictitious import Fictitious
from ocnopt.control.trace import outer_norms
from ocnopt.control.turns import Group, Turn
from ocnopt.control.views import InputMoments, Views
from ocnopt.curvature.eigen import Eigen
from ocnopt.curvature.factorize import Eigenbases
from ocnopt.layers.base import Params, add_all

__all__ = ["Sweep"]


class Sweep:
    """The two passes over the turns of a step.

    Args:
        turns: Players with gradients, in forward order.
        batches: Recorded samples.
        rule: The recursion.
        rollout: "linear", "nonlinear" or "off".
        curvature: What M is built from: "gradient", or "value" (Q_u and V_h, Table 2).
        reduce: Averages tensors over data-parallel processes, or None.
        total: Sums a number over processes, or None.
        groups: The turns by stage of the game; None where every player has a stage of its own.
        fictitious: A player without parameters at every stage, or None.
        step: The optimizer's steps before this one.
    """

    def __init__(
        self,
        turns: list[Turn],
        batches: list[Batch],
        rule: str,
        rollout: str,
        curvature: str = "gradient",
        reduce: Callable[[Params], Params] | None = None,
        total: Callable[[Params], Params] | None = None,
        groups: list[Group] | None = None,
        fictitious: Fictitious | None = None,
        step: int | None = None,
    ) -> None:
        self.turns = turns
        self.step = step
        self.groups = [Group([turn]) for turn in turns] if groups is None else groups
        self.fictitious = fictitious
        self.batches = batches
        self.rule = rule
        self.rollout = rollout
        self.curvature = curvature
        self.reduce = reduce
        self.total = total
        self.rho: list[Tensor | None] = [None] * len(batches)
        self.path: list[list[Tensor | None]] = []
        self._eigenbases = Eigenbases()
        self._rows: list[dict[Hashable, Tensor]] = []
        self.samples = sum(batch.samples for batch in batches)
        if total is not None:
            (count,) = total((batches[0].v.new_tensor(float(self.samples)),))
            self.samples = int(count)

    def weighted(self, turn: Turn, excess: list[Tensor], factor: float = 1.0) -> Params:
        """The gradient, plus the sum over batches and processes of ``P_u`` times the excess.

        Args:
            turn: The turn.
            excess: Coefficients of the recorded columns beyond those of the gradient, per batch.
            factor: Multiplies the result.
        """
        base, scale = turn.mover.base(), turn.mover.scale
        found = [
            (batch, trace, c)
            for batch, c in zip(self.batches, excess, strict=True)
            if (trace := batch.traces.get(turn.player)) is not None
        ]
        if turn.mover.partial:
            formed = add_all(
                [t.weighted((c + b.baseline(turn.player)).mul_(factor)) for b, t, c in found]
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

    def _gradient(self, turn: Turn) -> Params:
        """The plain gradient."""
        base = turn.mover.base()
        if base is not None and not turn.mover.partial:
            return base
        return self.weighted(turn, [torch.zeros_like(batch.v) for batch in self.batches])

    def backward(self) -> None:
        """Lines 6 to 13 of Algorithm 3: values and preconditioners, last player to first."""
        if self._backward_together():
            return
        values = [(batch.v, batch.k) for batch in self.batches]
        grown = [torch.ones_like(v) for v, _ in values] if self.fictitious is not None else []
        for group in reversed(self.groups):
            if self.fictitious is not None:
                found = [
                    self.fictitious.eliminate(batch, group, v, k, so_far)
                    for batch, (v, k), so_far in zip(self.batches, values, grown, strict=True)
                ]
                values = [(v, k) for v, k, _ in found]
                grown = [so_far for _, _, so_far in found]
            # A party looks at its members' inputs again: they stay laid out so long.
            self._rows = [{} for _ in self.batches] if group.parties else []
            for turn in group.turns:
                turn.values = values
                self._observe(turn)
            for party in group.parties:
                party.observe(self._moments)
            self._rows = []
            if self.rule == "joint":
                self._probe(group)
            if self.rule == "off" or group is self.groups[0]:
                continue  # no player before the first asks for its value
            values = [
                self._pull(batch, group, v, k)
                for batch, (v, k) in zip(self.batches, values, strict=True)
            ]

    def _value_mean(self, turn: Turn) -> Params:
        """``E[Q_u]``."""
        if all(v is batch.v for batch, (v, _) in zip(self.batches, turn.values, strict=True)):
            return self._gradient(turn)  # the value is the cost's own
        excess = [
            batch.signal_weights(v) - batch.baseline(turn.player)
            for batch, (v, _) in zip(self.batches, turn.values, strict=True)
        ]
        return self.weighted(turn, excess)

    def _probe(self, group: Group) -> None:
        """The batch's open-loop steps ``k``."""
        means = {id(turn): self._value_mean(turn) for turn in group.turns}
        for party in group.parties:
            solved = party.solve([means[id(turn)] for turn in party.turns])
            for turn, u in zip(party.turns, solved, strict=True):
                turn.probe = turn.mover.scaled(u)
        for turn in group.turns:
            if turn.probe is None:
                turn.probe = turn.mover.probe(means[id(turn)])

    def _observe(self, turn: Turn) -> None:
        """Update a player's preconditioner."""

        def mean() -> Params:
            return self._gradient(turn) if self.curvature == "gradient" else self._value_mean(turn)

        def factors() -> tuple[Tensor, Tensor]:
            return self._moments([(turn, turn)])[0]

        samples = self.samples // turn.player.layer.networks
        turn.metric = turn.mover.observe(mean, factors, samples, self.step, self._eigenbases)

    def _backward_together(self) -> bool:
        """All turns at once where M = I, samples have one location and the rank is one.

        Small networks spend their time on the number of operations; this makes it independent of
        the number of layers. Returns False where the turns are not of that kind.
        """
        if self.rule not in ("share", "sample") or len(self.batches) != 1 or self.fictitious:
            return False
        batch = self.batches[0]
        traces = [batch.traces.get(turn.player) for turn in self.turns]
        if (
            batch.rank > 1
            or not isinstance(batch.lift, float)
            or not all(
                turn.mover.plain and trace is not None and trace.single
                for turn, trace in zip(self.turns, traces, strict=True)
            )
        ):
            return False
        for turn in self.turns:
            turn.metric = turn.mover.observe(_no_mean, _no_factors, 0)
        first = len(self.groups[0].turns)
        values = [(batch.v, batch.k)]
        if len(self.groups) > 1:
            later = [trace for trace in traces[first:] if trace is not None]
            metrics = [turn.metric for turn in self.turns[first:] if turn.metric is not None]
            s = outer_norms(later, metrics).to(batch.v.dtype)  # (B, players after the first stage)
            share: Tensor | float = 1.0
            if self.rule == "share":
                weights = [batch.weight * turn.mover.scale for turn in self.turns[first:]]
                share = weights[0] if len(set(weights)) == 1 else s.new_tensor(weights)
            s = s * (share * batch.lift * batch.lift)
            if len(later) > len(self.groups) - 1:  # players of one stage answer as one
                sizes = [len(group.turns) for group in self.groups[1:]]
                s = torch.stack([part.sum(1) for part in s.split(sizes, 1)], 1)
            values = pull_back_all(batch.v, batch.k, s)
        for group, value in zip(self.groups, values, strict=True):
            for turn in group.turns:
                turn.values = [value]
        return True

    def _pull(self, batch: Batch, group: Group, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Through a stage: with one value for all, what its players answer adds up."""
        if self.rule == "joint":
            moves = [
                batch.own(trace.dots(turn.probe))
                for turn in group.turns
                if (trace := batch.traces.get(turn.player)) is not None and turn.probe is not None
            ]
            return pull_back_joint(v, k, add_up(moves)) if moves else (v, k)
        # Gram matrices, each with the factor by which the loop has scaled its players' gradients.
        grams: list[tuple[Tensor, float]] = []
        apart = group.turns
        for party in group.parties:
            together = party.gram(batch)
            if together is not None:
                grams.append((together, party.turns[0].mover.scale))
                apart = [turn for turn in apart if turn not in party.turns]
        for turn in apart:
            trace = batch.traces.get(turn.player)
            if trace is not None and turn.metric is not None:
                grams.append((trace.gram(turn.metric), turn.mover.scale))
        if not grams:
            return v, k
        scale = grams[0][1]
        if self.rule == "share" and any(other != scale for _, other in grams):
            grams, scale = [(s * own, 1.0) for s, own in grams], 1.0
        total = batch.own_gram(add_up([s for s, _ in grams]))
        return pull_back(self.rule, v, k, total, batch.weight * scale)

    def at_input(self, i: int, turn: Turn) -> tuple[Tensor, Tensor]:
        """The value's coefficients at a player's input, in batch i."""
        v, k = turn.values[i]
        if self.rule == "off" or turn.metric is None:
            return v, k
        group = next(group for group in self.groups if turn in group.turns)
        return self._pull(self.batches[i], group, v, k)

    def _moments(self, pairs: list[tuple[Turn, Turn]]) -> list[tuple[Tensor, Tensor]]:
        """Kronecker factors of pairs of players, of a player with itself on M's diagonal.

        Returns:
            Per pair ``E[a_n a_m^T]`` over samples and locations, and locations times
            ``E[V_h,n V_h,m^T]``.
        """
        sums: list[tuple[Tensor, ...] | None] = [None] * len(pairs)
        turns = list({id(turn): turn for pair in pairs for turn in pair}.values())
        for i, batch in enumerate(self.batches):
            rows = self._rows[i] if self._rows else {}
            views = Views(batch, turns, self._coefficients(i, turns), self._inputs[i], rows)
            for place, (one, other) in enumerate(pairs):
                parts: Params | None = views.moments(one, other)
                if parts is not None:
                    known = sums[place]
                    sums[place] = parts if known is None else add_all([known, parts])
        found = []
        for (one, _), parts in zip(pairs, sums, strict=True):
            assert parts is not None
            a, b, seen = parts if self.total is None else self.total(parts)
            networks = one.player.layer.networks
            found.append((a / (seen / networks), b / (self.samples / networks)))
        return found

    @cached_property
    def _inputs(self) -> list[InputMoments]:
        factored = [turn for turn in self.turns if turn.mover.preconditioner.factored]
        return [InputMoments(batch, factored) for batch in self.batches]

    def _coefficients(self, i: int, turns: list[Turn]) -> list[Tensor]:
        """Of the recorded columns, such that they make the signals that M is built from."""
        batch = self.batches[i]
        own = self.curvature == "gradient"
        return [
            batch.signal_own(batch.gradient_values(turn.player) if own else turn.values[i][0])
            for turn in turns
        ]

    def forward(self) -> None:
        """Lines 14 to 18 of Algorithm 3 in linear form: moves, first stage to last."""
        for group in self.groups:
            self.act(group, self.rho)
            self.follow(group)

    def act(self, group: Group, rho: list[Tensor | None]) -> None:
        """The moves of one stage's players, given the cost directions at their turn.

        Args:
            group: The stage.
            rho: Per batch (B,) or (B, r); None where nothing has moved yet.
        """
        if self.rollout == "off":
            rho = [None] * len(self.batches)
        apart = group.turns
        for party in group.parties:
            wanted = []
            for turn in party.turns:
                excess, idle = demand(turn, self.batches, rho, self.rule)
                d = self._gradient(turn) if idle else self._edited(turn, excess)
                wanted.append(turn.mover.limited(d, None if idle else turn.bound))
            for turn, u in zip(party.turns, party.solve(wanted), strict=True):
                turn.delta = turn.mover.finish(u)
            apart = [turn for turn in apart if turn not in party.turns]
        for turn in apart:
            excess, idle = demand(turn, self.batches, rho, self.rule)
            rate = turn.mover.only_rate
            direct = None if idle else self._solved_by_factors(turn, excess)
            if direct is not None:
                turn.delta = turn.mover.finish(direct)
            elif rate is not None and not idle:
                turn.delta = self.weighted(turn, excess, -rate)
            else:
                d = self._gradient(turn) if idle else self._edited(turn, excess)
                turn.delta = turn.mover.move(d, None if idle else turn.bound, own=not idle)

    def _solved_by_factors(self, turn: Turn, excess: list[Tensor]) -> Params | None:
        """``M^-1 d`` of an eigenbasis, where samples are so few that d need not be formed.

        The gradient was rotated to correct the eigenvalues; what is added to it is rotated by its
        factors. None where that takes more operations than forming the sum and rotating it.
        """
        metric, mover = turn.metric, turn.mover
        if not isinstance(metric, Eigen) or mover.partial or mover.edited or self.reduce:
            return None
        found = [
            (trace, c)
            for batch, c in zip(self.batches, excess, strict=True)
            if (trace := batch.traces.get(turn.player)) is not None
        ]
        networks, out, into = metric.scales.shape
        rows = sum(trace.samples for trace, _ in found)
        few = rows * (into**2 + out**2) < into * out * (into + out)
        if networks > 1 or not few or not all(trace.single for trace, _ in found):
            return None
        parts = [trace.rotated(metric, c * mover.scale) for trace, c in found]
        return metric.solve_sum(self._gradient(turn), parts)

    def _edited(self, turn: Turn, excess: list[Tensor]) -> Params:
        return turn.mover.masked(self.weighted(turn, excess))

    def follow(self, group: Group) -> None:
        """Carry the cost directions past a stage's moves."""
        for turn in group.turns:
            for i, batch in enumerate(self.batches):
                trace = batch.traces.get(turn.player)
                if trace is None:
                    continue
                moved = batch.own(trace.dots(turn.delta))
                before = self.rho[i]
                self.rho[i] = moved if before is None else before + moved
            self.path.append(list(self.rho))


def add_up(parts: list[Tensor]) -> Tensor:
    """Their sum."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _no_mean() -> Params:
    raise AssertionError("M = I does not depend on the gradient")


def _no_factors() -> tuple[Tensor, Tensor]:
    raise AssertionError("M = I asks for no factors")
