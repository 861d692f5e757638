"""A player without parameters at every stage: robust control, or a cooperative helper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.turns import Group
from ocnopt.errors import OptionError
from ocnopt.real import is_real

__all__ = ["Fictitious", "require_penalty"]

KINDS = ("cooperative", "adversarial")

#: An adversary may weigh a sample at most this much more, over all stages together. The saddle
#: point it plays for exists while ``K |P_h|^2 < penalty``; on the way there its weight grows
#: without bound.
LIMIT = 2.0


@dataclass(frozen=True)
class Fictitious:
    """A player v that is added to the pre-activations of every stage, ``h = g(x; theta) + v``.

    It pays ``penalty |v|^2 / 2`` and is eliminated before the stage's own players decide. With a
    value function of rank one that multiplies v and K of the sample by ``1 / (1 + z)`` where the
    player cooperates and by ``1 / (1 - z)`` where it opposes, with ``z = K |P_h|^2 / penalty`` and
    ``P_h`` the gradients at all of the stage's pre-activations. An opponent's factors, from the
    last stage back, come to at most :data:`LIMIT` as a product. A large penalty leaves the step as
    it is. Source: derived for this package from the H-infinity
    game, after the suggestion of robust control in the DGNOpt paper.

    Args:
        kind: "cooperative" or "adversarial".
        penalty: What the player pays, in units of cost per squared pre-activation.

    Raises:
        OptionError: An option out of range.
    """

    kind: str
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"fictitious={self.kind!r} is not known; choose one of {KINDS}")
        require_penalty(self.penalty)

    def eliminate(
        self, batch: Batch, group: Group, v: Tensor, k: Tensor, grown: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The value at a stage's output once the fictitious player has chosen.

        Args:
            batch: The samples.
            group: The stage.
            v: (B,).
            k: (B,).
            grown: The product of the factors at the later stages, (B,).

        Returns:
            v, K and that product with this stage's factor, same shapes.
        """
        z = torch.zeros_like(v)
        for turn in group.turns:
            trace = batch.traces.get(turn.player)
            if trace is not None:
                z = z + trace.signal_squares()
        z = k * z * batch.lift * batch.lift / self.penalty
        rest = 1 + z if self.kind == "cooperative" else torch.maximum(1 - z, grown / LIMIT)
        return v / rest, k / rest, grown / rest


def require_penalty(penalty: float) -> float:
    """The price of a fictitious player, as a float.

    Args:
        penalty: The option.

    Raises:
        OptionError: It is not positive and finite.
    """
    if not (is_real(penalty) and 0 < penalty < math.inf):
        raise OptionError(f"penalty={penalty!r}, but it must be positive and finite")
    return float(penalty)
