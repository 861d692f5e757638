"""Networks with a layer that solves a differential equation (methods 4.10)."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.networks.parts import require_images
from ocnopt.experiments.problems import Solver
from ocnopt.ode import ConcatConv2d, NeuralODE, TimedSequential
from ocnopt.ode.solve import ADAPTIVE

__all__ = ["OdeCNN", "ode_cnn", "require_torchdiffeq"]


@dataclass(frozen=True)
class OdeCNN:
    """Three convolutions that make images small, a Neural ODE on what they see, and a head.

    The image network of Liu, Chen and Theodorou (NeurIPS 2021): 207,306 parameters on MNIST and
    208,458 on CIFAR-10 with 64 channels. Theirs ends in a mean over 6x6 pixels, which are all that
    MNIST leaves but not all of CIFAR-10's 7x7; here it is over all of them.

    Attributes:
        channels: Of every convolution, those of the vector field included.
        method: The solver of the equation. One that does not choose its steps takes a single one.
        rtol: Its relative tolerance, where it chooses its steps.
        atol: Its absolute tolerance, likewise.
        max_steps: Steps of a solve at which it is given up, and a run counts as diverged. Three to
            ten are usual; without an end, one at too high a learning rate goes on for hours.
    """

    channels: int = 64
    method: Solver = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 200


def ode_cnn(recipe: OdeCNN, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a convolutional network with a Neural ODE from time 0 to 1.

    Args:
        recipe: What to build.
        shape: Shape of one image, (channels, height, width); at least 6 pixels each way.
        classes: Number of outputs (logits).

    Returns:
        A network from (batch, *shape) to (batch, classes).

    Raises:
        InputError: If the inputs are no images, or too small, or torchdiffeq is not installed.
    """
    require_images("ode-cnn", shape, 6)
    require_torchdiffeq("ode-cnn")
    c = recipe.channels
    end = {"max_num_steps": recipe.max_steps} if recipe.method in ADAPTIVE else {}
    field = TimedSequential(
        ConcatConv2d(c, c, 3, padding=1), nn.ReLU(), ConcatConv2d(c, c, 3, padding=1)
    )
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], c, 3, bias=False),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(c, c, 4, stride=2, padding=1, bias=False),
            act2=nn.ReLU(),
            conv3=nn.Conv2d(c, c, 4, stride=2, padding=1, bias=False),
            ode=NeuralODE(
                field, method=recipe.method, rtol=recipe.rtol, atol=recipe.atol, options=end
            ),
            act3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(c, classes),
        )
    )


def require_torchdiffeq(network: str) -> None:
    """Refuse a network where nothing can solve its equation.

    Args:
        network: Its name on the command line.

    Raises:
        InputError: As it says.
    """
    if importlib.util.find_spec("torchdiffeq") is None:
        raise InputError(f"network {network} needs torchdiffeq; pip install 'ocnopt[ode]'")
