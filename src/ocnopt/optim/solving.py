"""What optimizers share that move the layers of Neural ODEs by the adjoint's factors."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ocnopt.control.players import Player, find_solved
from ocnopt.errors import OptionError
from ocnopt.optim.base import Coverage
from ocnopt.optim.feedback import FeedbackOptimizer
from ocnopt.optim.mover import ParamMover
from ocnopt.optim.solved import SolvedLayers
from ocnopt.real import is_real

__all__ = ["SolvingOptimizer", "require_sample_step"]


def require_sample_step(sample_step: float) -> float:
    """The time between two looks at the adjoint, as a float.

    Raises:
        OptionError: It is no finite, positive number.
    """
    if not (is_real(sample_step) and 0 < sample_step < math.inf):
        raise OptionError(f"sample_step={sample_step!r}, but it must be finite and positive")
    return float(sample_step)


class SolvingOptimizer(FeedbackOptimizer):
    """Neural ODEs by :class:`~ocnopt.optim.solved.SolvedLayers`, all else as the next class does.

    Attributes:
        sample_step: Time between two points at which the adjoint is looked at; set before the
            constructor of the next class runs.
    """

    sample_step: float
    _solved: SolvedLayers | None = None

    def _follow(self) -> SolvedLayers:
        """The Neural ODEs' layers, as they are now, are followed from here on."""
        found = _owned(find_solved(self.model))
        if self._solved is None or found != _owned(self._solved.players):
            if self._solved is not None:
                self._solved.remove()
            self._solved = SolvedLayers(self, self.model, self.sample_step, self.reduction)
        return self._solved

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; follow layers of a Neural ODE that were unfrozen for it."""
        super().add_param_group(param_group)
        if self._ready:
            self._follow()

    def _hook(self) -> None:
        self._follow()
        super()._hook()

    def _rest(
        self, params: list[Tensor], group_of: dict[Tensor, dict[str, Any]]
    ) -> list[ParamMover]:
        """The Neural ODEs' layers, and first-order steps for what is left."""
        assert self._solved is not None
        movers = self._solved.movers(params, group_of, self._states)
        done = {p for mover in movers for p in mover.params}
        return [*movers, *super()._rest([p for p in params if p not in done], group_of)]

    def _step(self) -> None:
        assert self._solved is not None
        try:
            super()._step()
        finally:
            self._solved.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the passes that made them."""
        super().zero_grad(set_to_none)
        if self._solved is not None:
            self._solved.clear()

    def detach(self) -> None:
        """Take every hook off the model; its Neural ODEs are followed no longer."""
        super().detach()
        if self._solved is not None:
            self._solved.remove()

    def coverage(self) -> list[Coverage]:
        """One row per trained parameter; treatment "adjoint" is that of a Neural ODE's layers."""
        assert self._solved is not None
        owner: dict[int, Player] = {id(p): q for q in self._solved.players for p in q.params}
        names = {name: id(p) for name, p in self.model.named_parameters()}
        rows = []
        for row in super().coverage():
            player = owner.get(names[row.parameter])
            if player is not None:
                reason = self._solved.reason(player)
                treatment = "first-order" if reason else "adjoint"
                row = row._replace(kind=player.layer.kind, treatment=treatment, reason=reason)
            rows.append(row)
        return rows


def _owned(players: list[Player]) -> list[tuple[str, tuple[str, ...]]]:
    """Which parameters of which layers."""
    return [(player.name, player.layer.names) for player in players]
