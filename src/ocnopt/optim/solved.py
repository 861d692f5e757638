"""Layers of Neural ODEs: factors from the adjoint, steps by EKFAC's rule (methods 4.4 to 4.6)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.control.hooks import GradHook
from ocnopt.control.players import Player, find_solved
from ocnopt.control.sampled import sample_of, thrown_away
from ocnopt.control.turns import Turn
from ocnopt.curvature import Identity
from ocnopt.curvature.kronecker import EKFAC
from ocnopt.ode.neural_ode import NeuralODE
from ocnopt.ode.statistics import AdjointStatistics
from ocnopt.optim.base import ModelOptimizer
from ocnopt.optim.mover import ParamMover
from ocnopt.optim.parallel import processes, sum_over
from ocnopt.optim.rescaling import measure_scales, unscaling

__all__ = ["SolvedLayers"]


class SolvedLayers:
    """The players inside a model's Neural ODEs, and how an optimizer moves them.

    Args:
        owner: The optimizer; known weakly.
        model: Its model.
        sample_step: D, the time between two points at which the adjoint is looked at.
        reduction: The loss's, "mean" or "sum" over samples.
    """

    def __init__(
        self, owner: ModelOptimizer, model: nn.Module, sample_step: float, reduction: str
    ) -> None:
        self._owner = weakref.ref(owner)
        self.sample_step = sample_step
        self.reduction = reduction
        self.players = find_solved(model)
        self.odes = [m for m in model.modules() if isinstance(m, NeuralODE)]
        self._reasons: dict[Player, str] = {}
        #: A few entries of every gradient, as autograd accumulated them.
        self.samples: dict[Tensor, Tensor] = {}
        self._count = 1
        due, begin = weakref.WeakMethod(self._due), weakref.WeakMethod(self._begin)
        self.statistics = AdjointStatistics(
            self.players,
            _step_of(self),
            lambda: found() if (found := due()) else [],
            lambda: found() if (found := begin()) else None,
        )
        for ode in self.odes:
            ode.follow(self.statistics)
        self._handles = [
            param.register_post_accumulate_grad_hook(GradHook(self, player.index))
            for player in self.players
            for param in player.params
        ]
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    def remove(self) -> None:
        """Follow the model no longer."""
        self._finalizer()
        for ode in self.odes:
            ode.unfollow(self.statistics)
        self.clear()

    def clear(self) -> None:
        """Forget the passes since the last step."""
        self.statistics.clear()
        self.samples = {}

    # hook of a parameter

    #: Whether gradients are looked at.
    active = True

    def commit(self, index: int, param: Tensor) -> None:
        """Autograd accumulated a gradient."""
        self.samples[param] = sample_of(param)
        self.statistics.count(torch._C._current_graph_task_id())

    def _begin(self) -> None:
        """A backward pass begins: forget those before it if the loop threw away what they made."""
        if thrown_away(self.samples, self.samples):
            self.clear()

    # when factors are wanted

    def _rule(self, player: Player) -> EKFAC | None:
        owner = self._owner()
        if owner is None:
            return None
        group = owner._group_of().get(player.params[0])
        rule = None if group is None else owner._build(group)
        return rule if isinstance(rule, EKFAC) and player.layer.kronecker else None

    def _due(self) -> list[Player]:
        """The players whose factors the coming step renews."""
        owner = self._owner()
        due = []
        for player in self.players if owner is not None else []:
            rule = self._rule(player)
            assert owner is not None
            state = owner.state.get(player.params[0], {})
            if rule is not None and rule.due(state):
                due.append(player)
        return due

    def reason(self, player: Player) -> str:
        """Why a player takes first-order steps; empty where it does not."""
        if not player.layer.kronecker:
            return "no Kronecker factors: M = I"
        owner = self._owner()
        if self._rule(player) is None and owner is not None:
            group = owner._group_of().get(player.params[0])
            if group is not None:
                return f"its group's preconditioner is {group['preconditioner']['name']!r}"
        return self._reasons.get(player, "")

    # the step

    def movers(
        self,
        graded: list[Tensor],
        group_of: dict[Tensor, dict[str, Any]],
        states: Callable[[Any], list[dict[str, Any]]],
    ) -> list[ParamMover]:
        """Movers of the players with a gradient, ready to move.

        Args:
            graded: Parameters with a gradient that nobody else moves.
            group_of: The parameter group of each.
            states: Returns copies of the optimizer's state.
        """
        have = set(graded)
        self._reasons = {}
        renewed = self._renewed()
        turns: list[Turn] = []
        movers: list[ParamMover] = []
        for player in self.players:
            rule = self._rule(player)
            if rule is None or not all(p in have for p in player.params):
                self._reasons[player] = "one of its parameters received no gradient"
                continue
            groups = [group_of[p] for p in player.params]
            mine = states(player.params)
            known = player in renewed or "U_A" in mine[0]
            if not known:
                self._reasons[player] = "its Neural ODE was not solved in the last passes"
            mover = ParamMover(
                list(player.params), groups, mine, rule if known else Identity(), player.layer
            )
            turns.append(Turn(player, mover, None))
            movers.append(mover)
        measure_scales(turns, self.samples)
        for turn, mover in zip(turns, movers, strict=True):
            self._observe(turn.player, mover, renewed)
        return movers

    def _observe(
        self, player: Player, mover: ParamMover, renewed: dict[Player, tuple[Tensor, Tensor]]
    ) -> None:
        def factors() -> tuple[Tensor, Tensor]:
            if player not in renewed:  # due, but nothing was seen: as before
                return mover.states[0]["A"], mover.states[0]["B"]
            a, b = renewed[player]
            return a, b * unscaling(mover.scale) ** 2

        mover.observe(factors=factors, samples=self._count)

    def _renewed(self) -> dict[Player, tuple[Tensor, Tensor]]:
        """A and B of the players that are due, over all processes."""
        seen, mine = self.statistics, self.statistics.samples
        self._count = mine or self._count
        if processes() > 1:
            device = self.players[0].params[0].device if self.players else None
            total = torch.tensor([float(mine)], device=device, dtype=torch.float64)
            self._count = int(sum_over((total,))[0]) or self._count
        per_sample = float(mine) if self.reduction == "mean" else 1.0
        out = {}
        for player in self._due():
            found = seen.moments.get(player)
            if processes() == 1:
                if found is not None:
                    out[player] = seen.factors(player, self._count, per_sample)
                continue
            inputs, signals, weight = seen.sums(player)
            inputs, signals, weight = sum_over((inputs, signals * per_sample**2, weight))
            if float(weight) > 0:
                out[player] = (inputs / weight, signals / self._count)
        return out


def _step_of(layers: SolvedLayers) -> Callable[[], float]:
    known = weakref.ref(layers)
    return lambda: found.sample_step if (found := known()) is not None else 1.0


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
