"""Players of one stage who solve jointly: the cooperative, group-rational policy.

The joint ``P = E[P_theta P_theta^T]`` of players n, m at one stage is taken block by block as
``A_nm (x) B_nm`` with ``A_nm = E[a_n a_m^T]`` and ``B_nm = locations * E[V_h,n V_h,m^T]``: the
factors that each player's M is built from, and the same means across players. Damping is on the
diagonal blocks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.trace import ALL, Trace
from ocnopt.control.turns import Moments, Turn
from ocnopt.curvature.coupling import Coarse, Coupling, Pair, couple
from ocnopt.curvature.frames import EigenFrame, Frame, KroneckerFrame
from ocnopt.curvature.kronecker import Factored
from ocnopt.curvature.metric import Eigen, Kronecker
from ocnopt.layers.base import CHUNK, Params

__all__ = ["Cooperation", "parties"]

#: Coordinates and coupling by the members' names, with the tensors that they were computed from.
Known = dict[tuple[str, ...], tuple[tuple[Tensor, ...], list[Frame], Coupling, Coarse]]


class Cooperation:
    """A party whose members' M is a Kronecker product.

    Cross factors are kept in the state of the pair's first player under the second's name, so that
    players who part and meet again go on from where they were.

    Args:
        turns: The members, at least two.
        known: Where couplings are kept between steps.
    """

    def __init__(self, turns: list[Turn], known: Known) -> None:
        self.turns = turns
        self.known = known
        self.frames: list[Frame] = []
        self.coupling: Coupling | None = None
        self.coarse: Coarse
        self.tolerance = 0.0

    def observe(self, moments: Moments) -> None:
        """Update the cross factors where the members' own were, and the coupling with them."""
        rule = self.turns[0].mover.preconditioner
        assert isinstance(rule, Factored)
        self.tolerance = rule.gram_tolerance
        pairs = list(combinations(self.turns, 2))
        if not any(rule.refreshed(turn.mover.states[0]) for turn in self.turns):
            pairs = [
                (one, other)
                for one, other in pairs
                if f"A:{other.player.name}" not in one.mover.states[0]
            ]
        for (one, other), found in zip(pairs, moments(pairs) if pairs else (), strict=True):
            state = one.mover.states[0]
            for factor, batch in zip("AB", found, strict=True):
                key = f"{factor}:{other.player.name}"
                kept = state.get(key)
                state[key] = batch if kept is None else torch.lerp(batch, kept, rule.decay)
        try:
            self.frames, self.coupling, self.coarse = self._joined(rule)
        except ValueError:
            self._count(1)
            self.coupling = None  # every member by itself

    def _joined(self, rule: Factored) -> tuple[list[Frame], Coupling, Coarse]:
        """What is known, unless a factor has changed since."""
        names = tuple(turn.player.name for turn in self.turns)
        pairs = list(combinations(range(len(self.turns)), 2))
        crosses = {
            (n, m): (
                self.turns[n].mover.states[0][f"A:{names[m]}"],
                self.turns[n].mover.states[0][f"B:{names[m]}"],
            )
            for n, m in pairs
        }
        own = [turn.mover.states[0][factor] for turn in self.turns for factor in "AB"]
        made_of = (*own, *(tensor for pair in crosses.values() for tensor in pair))
        known = self.known.get(names)
        if known is not None and all(a is b for a, b in zip(known[0], made_of, strict=True)):
            # An eigenbasis stays, but its eigenvalues are corrected at every step.
            frames = known[1] if _separable(known[1]) else [_frame(t, rule) for t in self.turns]
            return frames, known[2], known[3]
        frames = [_frame(turn, rule) for turn in self.turns]
        correlations = {(n, m): frames[n].correlate(*crosses[n, m], frames[m]) for n, m in pairs}
        coupling = couple(correlations, len(self.turns))
        self._count(coupling.failures)
        coarse = Coarse(correlations, len(self.turns), rule.gram_tolerance)
        self.known[names] = (made_of, frames, coupling, coarse)
        return frames, coupling, coarse

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
        if self.coupling.strength < self.tolerance or self.coarse.coupling is None:
            return None
        simple = all(trace.single for trace in members)
        if simple and isinstance(self.coupling, Pair) and _separable(self.frames):
            out = self._outer_gram(members, self.coupling)
        else:
            out = self._sample_gram(batch, members)
        out = out.to(members[0].dtype)
        return out[:, 0, 0] if members[0].rank == 1 else out

    def _outer_gram(self, traces: Sequence[Trace], pair: Pair) -> Tensor:
        """One location per sample: from inputs and signals, no per-sample gradient is formed."""
        total: Tensor | None = None
        factors = []
        sides = ((pair.a_left, pair.b_left), (pair.a_right, pair.b_right))
        for turn, trace, frame, (a, b) in zip(self.turns, traces, self.frames, sides, strict=True):
            layer: Any = trace.layer
            assert turn.metric is not None
            dtype = frame.dtype
            rows = layer.homogeneous(trace.features[0]).to(dtype)
            columns = [
                layer.times(column.to(dtype), frame.b_root @ b) for column in trace.columns[0]
            ]
            factors.append((torch.stack(columns, 1), layer.times(rows, frame.a_root @ a)))
            part = layer.gram(trace.features[0], trace.columns[0], turn.metric)
            total = part if total is None else total + part
        assert total is not None
        networks = traces[0].layer.networks
        added = pair.outer_gram(*_by_network(factors, networks)) * self._rate
        return total + added.movedim(0, 1).reshape(total.shape).to(total.dtype)

    def _sample_gram(self, batch: Batch, traces: Sequence[Trace]) -> Tensor:
        """From the members' per-sample gradients, as many at once as there is room for."""
        coarse = self.coarse
        assert coarse.coupling is not None
        step = batch.samples
        if all(trace.layer.networks == 1 for trace in traces):
            size = sum(trace.layer.numel * trace.rank for trace in traces)
            step = max(1, CHUNK // size)
        parts = []
        for start in range(0, batch.samples, step):
            part = ALL if step >= batch.samples else slice(start, start + step)
            ys, own = [], []
            for turn, trace, frame, inputs in zip(
                self.turns, traces, self.frames, coarse.inputs, strict=True
            ):
                layer: Any = trace.layer
                gradients = trace.sample_columns(part)
                assert turn.metric is not None
                own.append(turn.metric.sample_gram(gradients))
                matrix = layer.to_matrix(gradients)
                ys.append(frame.enter(matrix.to(frame.dtype), inputs))
            total = torch.stack(own).sum(0)
            parts.append(total + coarse.coupling.added(ys) * self._rate)
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


def _by_network(factors: list[tuple[Tensor, Tensor]], networks: int) -> list[tuple[Tensor, Tensor]]:
    """Columns (B, r, kb), inputs (B, ka) as (B / S, S, r, kb), (B / S, S, ka)."""
    return [
        (p.unflatten(0, (networks, -1)).movedim(0, 1), q.unflatten(0, (networks, -1)).movedim(0, 1))
        for p, q in factors
    ]


def parties(
    turns: Sequence[Turn], batches: Sequence[Batch], known: Known
) -> tuple[list[Cooperation], dict[Any, str]]:
    """Who of a stage's players can solve jointly, and why the others act by themselves.

    Args:
        turns: The players of one stage.
        batches: Recorded samples.
        known: Where couplings are kept between steps.

    Returns:
        The parties, and a reason per player of a stage with several who is in none.
    """
    alone: dict[Any, str] = {}
    alike: dict[tuple[Any, ...], list[Turn]] = {}
    for turn in turns:
        reason = _lone(turn, batches)
        if reason:
            alone[turn.player] = reason
            continue
        alike.setdefault(_kind(turn, batches), []).append(turn)
    found = []
    for members in alike.values():
        if len(members) > 1:
            found.append(Cooperation(members, known))
        elif len(turns) > 1:
            mine = _locations(members[0], batches)
            others = sorted({n for t in turns for n in _locations(t, batches)} - set(mine))
            alone[members[0].player] = (
                f"acts alone: {mine[0]} locations against {', '.join(map(str, others))} of the "
                "others at its stage"
                if mine and others
                else "acts alone: no other player at its stage has the same options and blocks"
            )
    return found, alone if len(turns) > 1 else {}


def _lone(turn: Turn, batches: Sequence[Batch]) -> str:
    if not isinstance(turn.mover.preconditioner, Factored):
        return "acts alone: M has no blocks between players (only a Kronecker M has)"
    calls = {len(t.inputs) for b in batches if (t := b.traces.get(turn.player)) is not None}
    if calls != {1}:
        return "acts alone: it is called several times in a pass"
    return ""


def _locations(turn: Turn, batches: Sequence[Batch]) -> tuple[int, ...]:
    if not turn.player.layer.kronecker:
        return ()
    return tuple(t.locations for b in batches if (t := b.traces.get(turn.player)) is not None)


def _kind(turn: Turn, batches: Sequence[Batch]) -> tuple[Any, ...]:
    """What members of one party have in common."""
    metric_rule = turn.mover.preconditioner
    layer: Any = turn.player.layer
    return (
        _locations(turn, batches),
        repr(metric_rule.options()),
        turn.mover.rates[0],  # a Kronecker M has one for all of a player's parameters
        turn.mover.scale,
        layer.networks,
        layer.groups,
        turn.player.params[0].dtype,
        turn.player.params[0].device,
    )
