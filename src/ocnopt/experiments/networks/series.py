"""Networks for time series (methods 4.10)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ocnopt.experiments.data.series import lengths
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import Solver
from ocnopt.ode import NeuralODE, TimedSequential

__all__ = ["GruODE", "GruODENetwork", "gru_ode"]


@dataclass(frozen=True)
class GruODE:
    """A state that a differential equation moves between observations, and a GRU at them.

    The time-series network of Liu, Chen and Theodorou (NeurIPS 2021); they have 64 hidden features
    for ArticularyWordRecognition and 32 elsewhere, every observation, and dopri5.

    Attributes:
        hidden: Features of the state, and of every layer of the vector field.
        stride: Every so manieth observation is seen, from the first on. A step of training takes as
            many solves, forward and backward, as there are observations but one.
        method: The solver of the equation. A solver of fixed steps takes one from observation to
            observation.
        rtol: Its relative tolerance.
        atol: Its absolute tolerance.
    """

    hidden: int = 32
    stride: int = 1
    method: Solver = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3


class GruODENetwork(nn.Module):
    """A GRU whose state follows ``dh/dt = F(h)`` from one observation to the next.

    From ``h = 0`` on, ``h = GRUCell(x_i, h)`` at every observation i and ``h = h(1)``, with
    ``h(0) = h``, between two. The logits are those of the state at a series' last observation.

    The series of a batch may be of different lengths. Each is solved as far as it goes and no
    further, so that what it is padded with has no part in anything: neither in the steps that the
    solver takes for the others, nor in an optimizer's statistics. (A series of one observation is
    not solved at all, and an optimizer that counts samples by the solves does not count it.)

    Args:
        recipe: What to build.
        channels: Channels of an observation.
        classes: Number of outputs.
    """

    def __init__(self, recipe: GruODE, channels: int, classes: int) -> None:
        super().__init__()
        h = recipe.hidden
        layers: list[nn.Module] = [nn.Linear(h, h)]
        for _ in range(3):
            layers += [nn.Tanh(), nn.Linear(h, h)]
        self.stride = recipe.stride
        #: One for all intervals: an optimizer's statistics add up over them.
        self.ode = NeuralODE(
            TimedSequential(*layers),
            method=recipe.method,
            rtol=recipe.rtol,
            atol=recipe.atol,
            seminorm=True,
        )
        self.gru = nn.GRUCell(channels, h)
        self.head = nn.Linear(h, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify series.

        Args:
            x: (B, T, channels), NaN past a series' end.

        Returns:
            Logits, (B, classes).
        """
        x = x[:, :: self.stride]
        length = lengths(x).clamp(min=1)
        order = length.argsort(descending=True, stable=True)
        x = x[order]
        # How many series have an observation i; they are the first so many.
        alive = (length > torch.arange(x.shape[1] + 1, device=x.device)[:, None]).sum(1).tolist()
        h = x.new_zeros(len(x), self.gru.hidden_size)
        ended = []
        for i, (now, after) in enumerate(pairwise(alive)):
            if not now:
                break
            h = self.gru(x[:now, i], self.ode(h[:now]) if i else h[:now])
            ended.append(h[after:])
        # The shortest ended first, but come last.
        logits: Tensor = self.head(torch.cat(ended[::-1])[order.argsort()])
        return logits


def gru_ode(recipe: GruODE, shape: tuple[int, ...], classes: int) -> GruODENetwork:
    """Build a GRU-ODE.

    Args:
        recipe: What to build.
        shape: Shape of one series, (steps, channels).
        classes: Number of outputs (logits).

    Returns:
        A network from (batch, steps, channels) to (batch, classes).

    Raises:
        InputError: If the inputs are no time series.
    """
    if len(shape) != 2:
        raise InputError(
            f"gru-ode needs time series of (steps, channels), not inputs of shape {shape}"
        )
    return GruODENetwork(recipe, shape[1], classes)
