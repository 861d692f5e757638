"""What one step holds of every player: its turn, and who has a turn at the same stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.players import Player
from ocnopt.curvature.base import Preconditioner
from ocnopt.curvature.factorize import Eigenbases
from ocnopt.curvature.metric import Metric
from ocnopt.layers.base import Params

__all__ = ["Group", "Moments", "Mover", "Party", "Turn"]


class Mover(Protocol):
    """How a player's parameters move: the optimizer's side of a turn."""

    params: list[Tensor]
    preconditioner: Preconditioner
    rates: tuple[float, ...]
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
        step: int | None = None,
        eigenbases: Eigenbases | None = None,
    ) -> Metric:
        """Update the preconditioner with the Bellman objective."""

    def probe(self, mean: Params) -> Params:
        """The open-loop step ``-eta M^-1 E[Q_u]``."""

    def base(self) -> Params | None:
        """The gradient as the loop left it; None where autograd formed none."""

    def masked(self, d: Params) -> Params:
        """The direction without the entries that the loop has set to zero in the gradient."""

    def limited(self, d: Params, bound: float | None = None) -> Params:
        """The direction as M is to see it, feedback bounded by ``bound``."""

    def solve(self, d: Params) -> Params:
        """``M^-1 d``, for a direction that was :meth:`limited`."""

    def scaled(self, u: Params) -> Params:
        """``-eta u``, and nothing else."""

    def finish(self, u: Params) -> Params:
        """The parameters' change for the preconditioned direction ``u = M^-1 d``."""

    def move(self, d: Params, bound: float | None = None, own: bool = False) -> Params:
        """The parameters' change for d, by the three steps above; d is overwritten if ``own``."""


@dataclass
class Turn:
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


Moments = Callable[[list[tuple[Turn, Turn]]], list[tuple[Tensor, Tensor]]]


class Party(Protocol):
    """Players of one stage who solve jointly: M has blocks off its diagonal between them."""

    turns: list[Turn]

    def observe(self, moments: Moments) -> None:
        """Update the cross blocks; every member has observed its own.

        Args:
            moments: Returns, per pair of players, ``E[a_n a_m^T]`` and
                ``locations * E[V_h,n V_h,m^T]``.
        """

    def solve(self, directions: list[Params]) -> list[Params]:
        """The joint ``M^-1`` applied to the members' directions."""

    def gram(self, batch: Batch) -> Tensor | None:
        """``P_u^T Q_uu^-1 P_u`` of the members together, of the columns as recorded.

        Returns:
            (B,) at rank one, else (B, r, r); None where the members' own are to be added up.
        """


@dataclass
class Group:
    """Turns of one stage: they act on the same state and do not see each other's moves.

    Attributes:
        turns: The turns.
        parties: Those among them who solve jointly.
    """

    turns: list[Turn]
    parties: list[Party] = field(default_factory=list)
