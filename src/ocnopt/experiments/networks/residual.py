"""Residual networks: blocks whose input also goes round them (He et al., CVPR 2016)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ocnopt.experiments.networks.parts import (
    ACTIVATIONS,
    around_blocks,
    convolution,
    require_images,
)
from ocnopt.experiments.problems import Activation, Norm

__all__ = ["ResidualBlock", "ResidualCNN", "ResidualFCN", "residual_cnn", "residual_fcn"]


@dataclass(frozen=True)
class ResidualFCN:
    """A stem, residual blocks of linear layers, and a head.

    Attributes:
        widths: Width of every block; the stem has that of the first. A block whose width is not
            that of the one before has a linear layer as its shortcut.
        depth: Linear layers on the main path of a block.
        activation: Non-linearity after every layer, and after the sum that ends a block.
    """

    widths: tuple[int, ...] = (32, 32, 24, 16)
    depth: int = 2
    activation: Activation = "tanh"


@dataclass(frozen=True)
class ResidualCNN:
    """A stem, residual blocks of 3x3 convolutions with ReLU, a global average and a head.

    With 64-64-128-128-256-256-512-512 channels and batch normalization it is ResNet-18 in its form
    for small images.

    Attributes:
        widths: Channels of every block; the stem has those of the first. A block with other
            channels than the one before halves height and width, and has a 1x1 convolution as its
            shortcut.
        depth: Convolutions on the main path of a block.
        norm: Normalization of every convolution.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    depth: int = 2
    norm: Norm = "none"


class ResidualBlock(nn.Module):
    """``end(main(x) + shortcut(x))``.

    Args:
        main: The modules of the main path by name, in order.
        shortcut: What goes round them.
        end: The non-linearity of the sum.
    """

    def __init__(self, main: Mapping[str, nn.Module], shortcut: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self._main = tuple(main)
        for name, module in main.items():
            self.add_module(name, module)
        self.shortcut = shortcut
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: What enters both paths.

        Returns:
            What both have come to.
        """
        z = x
        for name in self._main:
            z = getattr(self, name)(z)
        out: Tensor = self.end(z + self.shortcut(x))
        return out


def residual_fcn(recipe: ResidualFCN, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a residual network of linear layers.

    Args:
        recipe: What to build.
        shape: Shape of one input; flattened.
        classes: Number of outputs (logits).

    Returns:
        A network from (batch, *shape) to (batch, classes).
    """
    activation = ACTIVATIONS[recipe.activation]

    def block(inputs: int, width: int) -> ResidualBlock:
        main: dict[str, nn.Module] = {}
        for i in range(1, recipe.depth + 1):
            main[f"fc{i}"] = nn.Linear(inputs if i == 1 else width, width)
            if i < recipe.depth:
                main[f"act{i}"] = activation()
        # No bias: that of the main path's last layer is added to the same sum.
        shortcut = nn.Identity() if inputs == width else nn.Linear(inputs, width, bias=False)
        return ResidualBlock(main, shortcut, activation())

    widths = recipe.widths
    blocks = [block(*pair) for pair in zip((widths[0], *widths), widths, strict=False)]
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            stem=nn.Linear(math.prod(shape), widths[0]),
            act=activation(),
            blocks=nn.Sequential(*blocks),
            head=nn.Linear(widths[-1], classes),
        )
    )


def residual_cnn(recipe: ResidualCNN, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a residual network of convolutions.

    Args:
        recipe: What to build.
        shape: Shape of one image, (channels, height, width).
        classes: Number of outputs (logits).

    Returns:
        A network from (batch, *shape) to (batch, classes).

    Raises:
        InputError: If the inputs are no images.
    """
    require_images("residual-cnn", shape, 1)
    norm = recipe.norm

    def block(inputs: int, width: int) -> ResidualBlock:
        stride = 1 if inputs == width else 2
        main = convolution("1", inputs, width, 3, norm, stride)
        for i in range(2, recipe.depth + 1):
            main[f"act{i - 1}"] = nn.ReLU()
            main.update(convolution(str(i), width, width, 3, norm))
        shortcut: nn.Module = nn.Identity()
        if inputs != width:
            projection = convolution("", inputs, width, 1, norm, stride, bias=False)
            shortcut = projection["conv"]
            if len(projection) > 1:
                shortcut = nn.Sequential(OrderedDict(projection))
        return ResidualBlock(main, shortcut, nn.ReLU())

    widths = recipe.widths
    blocks = [block(*pair) for pair in zip((widths[0], *widths), widths, strict=False)]
    return around_blocks(blocks, widths, norm, shape, classes)
