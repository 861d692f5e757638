"""Players of one stage who solve jointly: the cooperative, group-rational policy.

The joint ``P = E[P_theta P_theta^T]`` of players n, m at one stage is taken block by block as
``A_nm (x) B_nm`` with ``A_nm = E[a_n a_m^T]`` and ``B_nm = locations * E[V_h,n V_h,m^T]``: the
factors that each player's M is built from, and the same means across players. Damping is on the
diagonal blocks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.cross import Cross, cross_factors, update_cross_factors
from ocnopt.control.trace import ALL, Trace
from ocnopt.control.turns import Moments, Turn
from ocnopt.curvature.coarse import Coarse, coarse
from ocnopt.curvature.correlation import Correlation
from ocnopt.curvature.coupling import Coupling, couple
from ocnopt.curvature.directions import Directions
from ocnopt.curvature.eigen import Eigen
from ocnopt.curvature.frames import EigenFrame, Frame, KroneckerFrame
from ocnopt.curvature.kronecker import Factored
from ocnopt.curvature.metric import Kronecker
from ocnopt.layers.base import CHUNK, Params

__all__ = ["Cooperation", "Joined", "Known"]


@dataclass(frozen=True)
class Joined:
    """What members have in common, until one of their factors changes.

    Attributes:
        made_of: The factors.
        frames: The members' coordinates, where these stay so long: an eigenbasis does, but its
            eigenvalues are corrected at every step.
        coupling: Between them.
        coarse: The same for Gram numbers; None where they need none.
        directions: The members', in which it is; None for one who is not in it.
    """

    made_of: tuple[Tensor, ...]
    frames: list[Frame] | None
    coupling: Coupling
    coarse: Coarse | None
    directions: list[Directions | None]


#: By the members' names.
Known = dict[tuple[str, ...], Joined]


class Cooperation:
    """A party whose members' M is a Kronecker product.

    Args:
        turns: The members, at least two.
        known: Where couplings are kept between steps.
    """

    def __init__(self, turns: list[Turn], known: Known) -> None:
        self.turns = turns
        self.known = known
        self.frames: list[Frame] = []
        self.coupling: Coupling | None = None
        self.coarse: Coarse | None = None
        self.directions: list[Directions | None] = []
        self.tolerance = 0.0

    def observe(self, moments: Moments) -> None:
        """Update the cross factors where the members' own were, and the coupling with them."""
        rule = self.turns[0].mover.preconditioner
        assert isinstance(rule, Factored)
        self.tolerance = rule.gram_tolerance
        update_cross_factors(self.turns, rule, moments)
        try:
            self._join(rule)
        except ValueError:
            self._count(1)
            self.coupling = None  # every member by itself

    def _join(self, rule: Factored) -> None:
        """Take what is known, unless a factor has changed since."""
        names = tuple(turn.player.name for turn in self.turns)
        crosses = {
            (n, m): found
            for n, m in combinations(range(len(self.turns)), 2)
            if (found := cross_factors(self.turns[n], self.turns[m], rule)) is not None
        }
        self.coupling = None
        if not crosses:
            return  # no two have met yet
        own = [turn.mover.states[0][factor] for turn in self.turns for factor in "AB"]
        made_of = (*own, *(tensor for cross in crosses.values() for tensor in (cross.a, cross.b)))
        known = self.known.get(names)
        if known is not None and _same(known.made_of, made_of):
            self.frames = known.frames or [_frame(turn, rule) for turn in self.turns]
            self.coupling, self.coarse = known.coupling, known.coarse
            self.directions = known.directions
            return
        self.frames = [_frame(turn, rule) for turn in self.turns]
        correlations = {
            (n, m): self._correlation(n, m, crosses.get((n, m)))
            for n, m in combinations(range(len(self.turns)), 2)
        }
        self.coupling = couple(correlations, len(self.turns))
        self.coarse = coarse(self.coupling, rule.gram_tolerance)
        if self.coarse is not None:
            both = zip(self.frames, self.coarse.bases, strict=True)
            self.directions = [bases and frame.directions(*bases) for frame, bases in both]
        self._count(self.coupling.failures)
        stay = self.frames if _separable(self.frames) else None
        self.known[names] = Joined(made_of, stay, self.coupling, self.coarse, self.directions)

    def _correlation(self, n: int, m: int, cross: Cross | None) -> Correlation:
        """Zero where the two have not met."""
        one, other = self.frames[n], self.frames[m]
        if cross is not None:
            return one.correlate(*cross.factors(), other)
        return Correlation(
            one.a_root.new_zeros(*one.a_root.shape[:-1], other.a_root.shape[-1]),
            one.b_root.new_zeros(*one.b_root.shape[:-1], other.b_root.shape[-1]),
        )

    def _count(self, failures: int) -> None:
        if not failures:
            return
        turn = self.turns[0]
        state = turn.mover.states[0]
        state["failures"] = state.get("failures", 0) + failures
        turn.mover.report["failures"] = state["failures"]

    def solve(self, directions: list[Params]) -> list[Params]:
        """The joint ``M^-1`` applied to the members' directions."""
        if self.coupling is None:
            return [turn.mover.solve(d) for turn, d in zip(self.turns, directions, strict=True)]
        layers: list[Any] = [turn.player.layer for turn in self.turns]
        ys = [
            frame.enter(layer.to_matrix(d).to(frame.dtype))
            for frame, layer, d in zip(self.frames, layers, directions, strict=True)
        ]
        solved = self.coupling.solve(ys)
        return [
            layer.from_matrix(frame.leave(x).to(d[0].dtype))
            for frame, layer, x, d in zip(self.frames, layers, solved, directions, strict=True)
        ]

    def gram(self, batch: Batch) -> Tensor | None:
        """``P_u^T Q_uu^-1 P_u`` of the members together, of the columns as recorded.

        Returns:
            (B,) at rank one, else (B, r, r); None where a member took no part in the batch, or
            the coupling is too weak to be seen at the tolerance.
        """
        traces = [batch.traces.get(turn.player) for turn in self.turns]
        members = [trace for trace in traces if trace is not None]
        if self.coupling is None or len(members) < len(traces):
            return None
        if self.coupling.strength < self.tolerance or self.coarse is None:
            return None
        if all(trace.single for trace in members):
            out = self._outer_gram(members)
        else:
            out = self._sample_gram(batch, members)
        out = out.to(members[0].dtype)
        return out[:, 0, 0] if members[0].rank == 1 else out

    def _outer_gram(self, traces: Sequence[Trace]) -> Tensor:
        """One location per sample: gradients are outer products of what is turned once."""
        assert self.coarse is not None
        total, seen = None, []
        for turn, trace, frame, where in zip(
            self.turns, traces, self.frames, self.directions, strict=True
        ):
            layer: Any = trace.layer
            assert turn.metric is not None
            a, columns = trace.features[0], trace.columns[0]
            own = layer.gram(a, columns, turn.metric)
            total = own if total is None else total + own
            if where is not None:
                seen.append(frame.outer_seen(turn.metric, layer, a, columns, where))
        assert total is not None
        added = self.coarse.coupling.added(seen).movedim(0, 1).reshape(total.shape)
        out: Tensor = total + added.to(total.dtype) * self._rate
        return out

    def _sample_gram(self, batch: Batch, traces: Sequence[Trace]) -> Tensor:
        """From the members' per-sample gradients, as many at once as there is room for.

        Where a member has few locations, its gradients are formed in its coordinates alone.
        """
        assert self.coarse is not None
        size = sum(trace.layer.numel * trace.rank for trace in traces)
        step = max(1, CHUNK // size)
        members = list(zip(self.turns, traces, self.frames, self.directions, strict=True))
        parts = []
        for start in range(0, batch.samples, step):
            part = ALL if step >= batch.samples else slice(start, start + step)
            seen, own = [], []
            for turn, trace, frame, where in members:
                assert turn.metric is not None
                factors = trace.factors(part)
                gradients = trace.sample_columns(part) if factors is None else ()
                if where is None:
                    metric = turn.metric
                    own.append(
                        metric.sample_gram(gradients)
                        if factors is None
                        else metric.factor_gram(*factors)
                    )
                    continue
                if factors is not None:
                    gram, z = frame.gram_and_seen_factors(turn.metric, *factors, where)
                else:
                    gram, z = frame.gram_and_seen(turn.metric, gradients, where)
                own.append(gram)
                seen.append(z)
            total = torch.stack(own).sum(0)
            parts.append(total + self.coarse.coupling.added(seen).sum(1) * self._rate)
        return torch.cat(parts)

    @property
    def _rate(self) -> float:
        metric = self.turns[0].metric
        assert metric is not None
        return metric.rates[0]


def _frame(turn: Turn, rule: Factored) -> Frame:
    metric, state = turn.metric, turn.mover.states[0]
    if isinstance(metric, Eigen):
        return EigenFrame(metric, state["A"], state["B"], rule.damping)
    assert isinstance(metric, Kronecker)
    return KroneckerFrame(metric)


def _separable(frames: Sequence[Frame]) -> bool:
    return all(isinstance(frame, KroneckerFrame) for frame in frames)


def _same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether the tensors are the very same."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
