"""The vector fields of the flows, and how they are solved."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from ocnopt.ode import ContinuousFlow
from ocnopt.ode.fields import ConcatSquashLinear, TimedSequential

__all__ = ["GAS", "MINIBOONE", "PLANE", "FlowNetwork", "build", "exactly"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "softplus": nn.Softplus}
#: Tolerances at which what is reported is computed.
_REPORTED = 1e-5
#: Steps of one solve: a field that needs more counts as diverged rather than to hold up the rest.
_MOST_STEPS = 200


@dataclass(frozen=True)
class FlowNetwork:
    """A flow before its dimension is known.

    Attributes:
        hidden: Width of the hidden layers.
        layers: Layers of a field, each a ``ConcatSquashLinear``.
        activation: Between them.
        legs: Fields, one after the other.
        divergence: As in :class:`~ocnopt.ode.flow.ContinuousFlow`.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        seminorm: As in :class:`~ocnopt.ode.NeuralODE`.
    """

    hidden: int
    layers: int
    activation: Literal["tanh", "softplus"]
    legs: int = 1
    divergence: str = "exact"
    rtol: float = 1e-6
    atol: float = 1e-8
    seminorm: bool = False


#: For two dimensions, on one core.
PLANE = FlowNetwork(64, 3, "tanh", rtol=1e-3, atol=1e-3)
#: Of the code that was released with SNOpt.
MINIBOONE = FlowNetwork(860, 3, "softplus", divergence="hutchinson")
#: Likewise.
GAS = FlowNetwork(160, 4, "tanh", legs=5, divergence="hutchinson", seminorm=True)


def build(network: FlowNetwork, dim: int) -> ContinuousFlow:
    """Make a flow with weights from torch's generator.

    Args:
        network: What it is like.
        dim: Dimension of its points.
    """
    widths = [dim, *[network.hidden] * (network.layers - 1), dim]
    solver: dict[str, Any] = {"seminorm": network.seminorm}
    return ContinuousFlow(
        [_field(widths, network.activation) for _ in range(network.legs)],
        dim,
        divergence=network.divergence,
        rtol=network.rtol,
        atol=network.atol,
        options={"max_num_steps": _MOST_STEPS},
        **solver,
    )


def exactly(flow: ContinuousFlow) -> ContinuousFlow:
    """The same density with the same weights, by tighter solves and exact divergences.

    Args:
        flow: It is left as it is.
    """
    return ContinuousFlow(
        [leg.func for leg in flow.legs],
        flow.dim,
        rtol=_REPORTED,
        atol=_REPORTED,
        options={"max_num_steps": _MOST_STEPS},
    )


def _field(widths: list[int], activation: str) -> TimedSequential:
    parts: list[nn.Module] = []
    for into, out in pairwise(widths):
        parts += [ConcatSquashLinear(into, out), _ACTIVATIONS[activation]()]
    return TimedSequential(*parts[:-1])
