"""The full form of Algorithm 3: the passes over a chain with V_xx as a matrix per sample.

The recursion at a player is the one of the coefficient form; dense Jacobians carry the value to the
next player's output. That admits what no factor can: the Tikhonov term of line 12, and the second
derivatives of the dynamics (Eq. 26).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ocnopt.control import second_order
from ocnopt.control.chain import Link
from ocnopt.control.dense import DenseBatch, DenseTrace
from ocnopt.control.players import Player
from ocnopt.control.sweep import Sweep
from ocnopt.control.transport import bend
from ocnopt.control.turns import Group, Turn
from ocnopt.errors import GraphError
from ocnopt.layers.base import Params, add_all

__all__ = ["DenseSweep"]


class DenseSweep(Sweep):
    """Both passes with matrices; see :class:`Sweep`.

    Args:
        turns: Players with gradients, in forward order.
        batches: Their samples, with terminal values and Jacobians.
        value_reg: Tikhonov term epsilon on V_xx at every player's input (line 12).
        order: Expansion of the dynamics: 1, or 2 with the terms of Eq. 26.
        to_input: Whether V_x and V_xx at the first player's input are asked for.
        step: The optimizer's steps before this one.
        others: As in :class:`Sweep`.
    """

    batches: list[DenseBatch]  # type: ignore[assignment]

    def __init__(
        self,
        turns: list[Turn],
        batches: list[DenseBatch],
        rule: str,
        rollout: str,
        *others: object,
        value_reg: float = 0.0,
        order: int = 1,
        to_input: bool = False,
        step: int | None = None,
    ) -> None:
        super().__init__(turns, list(batches), rule, rollout, *others)  # type: ignore[arg-type]
        self.step = step
        self.value_reg = value_reg
        self.order = order
        self.to_input = to_input
        self.links: list[Link] = batches[0].chain.links
        order_of = [link.player for link in self.links]
        for batch in batches[1:]:
            if [link.player for link in batch.chain.links] != order_of:
                raise GraphError(
                    "the accumulated passes call their layers in different orders; use "
                    "terminal='gauss-newton'"
                )
        self.turn_of = {turn.player: turn for turn in turns}
        #: V_x and V_xx at the input of every player, per batch.
        self.states: dict[Player, list[tuple[Tensor, Tensor]]] = {}
        #: ``V_h . g_ux`` of every player, per batch; second order alone.
        self.mixed: dict[Player, list[Params]] = {}
        # Jacobians from every player's output to the network's, per batch.
        self._ahead: dict[Player, list[Tensor]] = {}

    def backward(self) -> None:
        """Lines 6 to 13 of Algorithm 3."""
        values = [(batch.v, batch.k) for batch in self.batches]
        ahead = [torch.eye(b.v.shape[1], dtype=b.v.dtype, device=b.v.device) for b in self.batches]
        ahead = [e.expand(b.samples, *e.shape) for e, b in zip(ahead, self.batches, strict=True)]
        for t in range(len(self.links) - 1, -1, -1):
            player = self.links[t].player
            values = [
                self._behind(b, t, v, k) for b, (v, k) in zip(self.batches, values, strict=True)
            ]
            ahead = [b.s[t].pull_columns(p) for b, p in zip(self.batches, ahead, strict=True)]
            self._ahead[player] = ahead
            turn = self.turn_of.get(player)
            if turn is not None:
                turn.values = values
                self._observe(turn)
                if self.rule == "joint":
                    self._probe(Group([turn]))
                if self.order == 2:
                    self.mixed[player] = [
                        second_order.mixed(b.chain.links[t], _dense(b, turn), v)
                        for b, (v, _) in zip(self.batches, values, strict=True)
                    ]
            if t == 0 and not (self.to_input and self.links[0].x.is_floating_point()):
                break  # no player before the first asks for its value
            values = [self._through(i, t, turn, v, k) for i, (v, k) in enumerate(values)]
            self.states[player] = values
            ahead = [b.g[t].pull_columns(p) for b, p in zip(self.batches, ahead, strict=True)]

    def _behind(self, batch: DenseBatch, t: int, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """``V_h`` and ``V_hh`` at a player's output from the value at the next one's input."""
        s = batch.s[t]
        v_h, k_h = s.pull(v), s.pull_matrix(k)
        if self.order == 2:
            bent = bend(batch.chain.links[t], v)
            k_h = k_h + (torch.diag_embed(bent) if bent.dim() == 2 else bent)
        return v_h, _symmetric(k_h)

    def _through(
        self,
        i: int,
        t: int,
        turn: Turn | None,
        v: Tensor,
        k: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The value at a player's input from ``V_h`` and ``V_hh`` at its output."""
        batch = self.batches[i]
        g = batch.g[t]
        metric = None if turn is None else turn.metric
        if turn is None or metric is None or self.rule == "off":
            v_x, k_x = g.pull(v), g.pull_matrix(k)
        elif self.order == 2:
            share = batch.weight * turn.mover.scale if self.rule == "share" else 1.0
            mixed = self.mixed[turn.player][i]
            v_x, k_x = second_order.pull_back(
                self.rule, _dense(batch, turn), metric, g, v, k, mixed, share, turn.probe
            )
        else:
            v, k = self._pull(batch, Group([turn]), v, k)
            v_x, k_x = g.pull(v), g.pull_matrix(k)
        k_x = _symmetric(k_x)
        if self.value_reg:
            k_x.diagonal(dim1=1, dim2=2).add_(self.value_reg)
        return v_x, k_x

    def forward(self) -> None:
        """Lines 14 to 18 of Algorithm 3, linear or with the layers run again."""
        states: list[Tensor | None] = [None] * len(self.batches)  # dx, or xhat
        reached: list[Tensor | None] = [None] * len(self.batches)
        nonlinear = self.rollout == "nonlinear"
        for t, link in enumerate(self.links):
            differential = list(states)
            if nonlinear:
                differential = [
                    None if x is None else self._apart(b, t, x)
                    for b, x in zip(self.batches, states, strict=True)
                ]
            turn = self.turn_of.get(link.player)
            delta: Params | None = None
            if turn is not None:
                delta = self._act(t, turn, differential)
            for i, batch in enumerate(self.batches):
                dx = differential[i]
                if delta is None and dx is None:
                    continue
                moved = None if dx is None else batch.g[t].push(dx)
                if delta is not None:
                    own = batch.traces[link.player].dots(delta)
                    ahead = self._ahead[link.player][i]
                    gain = (ahead @ own.unsqueeze(-1)).squeeze(-1)
                    before = reached[i]
                    reached[i] = gain if before is None else before + gain
                    moved = own if moved is None else moved + own
                if nonlinear:
                    here = batch.chain.links[t]
                    x = states[i]
                    params = link.player.params
                    new = (
                        params
                        if delta is None
                        else tuple(p + d for p, d in zip(params, delta, strict=True))
                    )
                    states[i] = here.f(here.x if x is None else x, new)
                else:
                    assert moved is not None
                    states[i] = batch.s[t].push(moved)
            if turn is not None:
                self.path.append(list(reached))

    def _apart(self, batch: DenseBatch, t: int, x: Tensor) -> Tensor:
        difference = x - batch.chain.links[t].x
        return difference.reshape(batch.samples, -1).to(batch.v.dtype)

    def _act(self, t: int, turn: Turn, dx: list[Tensor | None]) -> Params:
        """The move of one player, given the state differential at its input."""
        pushed = [
            None if x is None else b.g[t].push(x) for b, x in zip(self.batches, dx, strict=True)
        ]
        position = self.turns.index(turn)
        if self.order == 1 or self.rollout == "off" or all(x is None for x in dx):
            self.act(self.groups[position], pushed)
            return turn.delta
        excess = []
        extra: list[Params] = []
        for i, batch in enumerate(self.batches):
            (v, k), x, moved = turn.values[i], dx[i], pushed[i]
            assert x is not None and moved is not None
            trace = _dense(batch, turn)
            raw = (k @ moved.unsqueeze(-1)).squeeze(-1)
            inputs = second_order.inputs_of(batch.chain.links[t], trace, x)
            assert turn.metric is not None
            ratio = second_order.ratio(trace, turn.metric, inputs, v, raw)
            factor = torch.ones_like(ratio)
            if turn.bound is not None:
                factor = torch.where(ratio > turn.bound, turn.bound / ratio, factor)
            turn.feedback.append((ratio, ratio * factor))
            factor = factor[:, None]
            weights = batch.signal_weights(v + raw * factor)
            excess.append(weights - batch.baseline(turn.player))
            extra.append(second_order.shift(trace, inputs, batch.signal_weights(v * factor)))
        more = add_all(extra)
        if self.reduce is not None:
            more = self.reduce(more)
        d = self.weighted(turn, excess)
        d = tuple(torch.add(a, e, alpha=turn.mover.scale) for a, e in zip(d, more, strict=True))
        turn.delta = turn.mover.move(turn.mover.masked(d), turn.bound, own=True)
        return turn.delta


def _dense(batch: DenseBatch, turn: Turn) -> DenseTrace:
    trace = batch.traces[turn.player]
    assert isinstance(trace, DenseTrace)
    return trace


def _symmetric(k: Tensor) -> Tensor:
    return (k + k.transpose(1, 2)) / 2
