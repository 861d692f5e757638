"""Networks without shortcuts or branches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ocnopt.experiments.networks.parts import ACTIVATIONS, require_images
from ocnopt.experiments.problems import Activation, Head

__all__ = ["CNN", "FCN", "cnn", "fcn"]


@dataclass(frozen=True)
class FCN:
    """A fully connected network; one linear layer more than there are hidden widths.

    Attributes:
        widths: Hidden widths, first to last.
        activation: Non-linearity after every layer but the last.
        head: What is applied to the last layer's output.
    """

    widths: tuple[int, ...] = (32, 32, 32, 16)
    activation: Activation = "tanh"
    head: Head = "identity"


@dataclass(frozen=True)
class CNN:
    """Four 3x3 convolutions with two 2x2 max-pools among them, two linear layers.

    Attributes:
        channels: Channels of every convolution.
        hidden: Width between the two linear layers.
        pools: Convolutions, counted from 1, that a max-pool follows.
    """

    channels: int = 32
    hidden: int = 128
    pools: tuple[int, int] = (2, 4)


def fcn(recipe: FCN, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a fully connected network.

    Args:
        recipe: What to build.
        shape: Shape of one input; flattened.
        classes: Number of outputs: logits, or their sigmoid.

    Returns:
        A network from (batch, *shape) to (batch, classes).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(shape)
    for width in recipe.widths:
        layers += [nn.Linear(inputs, width), ACTIVATIONS[recipe.activation]()]
        inputs = width
    layers.append(nn.Linear(inputs, classes))
    if recipe.head == "sigmoid":
        layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


def cnn(recipe: CNN, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a convolutional network.

    Args:
        recipe: What to build.
        shape: Shape of one image, (channels, height, width); at least 4 pixels each way.
        classes: Number of outputs (logits).

    Returns:
        A network from (batch, *shape) to (batch, classes).

    Raises:
        InputError: If the inputs are no images, or too small to be pooled twice.
    """
    require_images("cnn", shape, 4)
    inputs, height, width = shape
    layers: list[nn.Module] = []
    for number in (1, 2, 3, 4):
        layers += [nn.Conv2d(inputs, recipe.channels, 3, padding=1), nn.ReLU()]
        if number in recipe.pools:
            layers.append(nn.MaxPool2d(2))
        inputs = recipe.channels
    features = recipe.channels * (height // 4) * (width // 4)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(features, recipe.hidden),
        nn.ReLU(),
        nn.Linear(recipe.hidden, classes),
    )
