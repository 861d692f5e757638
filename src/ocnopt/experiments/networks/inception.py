"""Branching networks: blocks of parallel paths, concatenated (Szegedy et al., CVPR 2015)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.networks.parts import around_blocks, convolution, require_images
from ocnopt.experiments.problems import Norm

__all__ = ["Inception", "InceptionBlock", "inception"]

#: Sizes of the convolutions of every branch; the second 3x3 of the third makes it see 5x5 pixels.
_BRANCHES = {"branch1": (1,), "branch2": (1, 3), "branch3": (1, 3, 3), "branch4": (1,)}


@dataclass(frozen=True)
class Inception:
    """A stem, blocks of four branches each, a global average and a head.

    Attributes:
        widths: Channels that every block makes, a quarter by each branch; multiples of 4. The stem
            has those of the first. A block with other channels than the one before halves height
            and width first.
        norm: Normalization of every convolution.
    """

    widths: tuple[int, ...] = (16, 32)
    norm: Norm = "none"


class InceptionBlock(nn.Module):
    """Four branches from one input: 1x1; 1x1-3x3; 1x1-3x3-3x3; 3x3 max-pool-1x1.

    Args:
        inputs: Channels that are read.
        width: Channels that are made.
        norm: Normalization of every convolution.
        halve: Whether a 2x2 max-pool comes before the branches.
    """

    def __init__(self, inputs: int, width: int, norm: Norm, halve: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if halve else nn.Identity()
        for name, sizes in _BRANCHES.items():
            modules: dict[str, nn.Module] = {}
            if name == "branch4":
                modules["pool"] = nn.MaxPool2d(3, 1, padding=1)
            for i, size in enumerate(sizes, 1):
                if i > 1:
                    modules[f"act{i - 1}"] = nn.ReLU()
                modules.update(
                    convolution(str(i), inputs if i == 1 else width // 4, width // 4, size, norm)
                )
            self.add_module(name, nn.Sequential(OrderedDict(modules)))
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: (batch, inputs, height, width).

        Returns:
            What the branches have come to, one after the other in the channels.
        """
        x = self.pool(x)
        out: Tensor = self.end(torch.cat([getattr(self, name)(x) for name in _BRANCHES], 1))
        return out


def inception(recipe: Inception, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a branching network.

    Args:
        recipe: What to build.
        shape: Shape of one image, (channels, height, width).
        classes: Number of outputs (logits).

    Returns:
        A network from (batch, *shape) to (batch, classes).

    Raises:
        InputError: If widths are no multiples of 4, or the inputs no images, or too small to be
            halved as often as widths change.
    """
    widths = recipe.widths
    if any(width % 4 for width in widths):
        raise InputError(
            f"inception needs widths that are multiples of 4, a quarter for each branch, not "
            f"{', '.join(map(str, widths))}"
        )
    pairs = list(zip((widths[0], *widths), widths, strict=False))
    halvings = sum(before != width for before, width in pairs)
    require_images("inception", shape, 3 * 2**halvings)
    blocks = [
        InceptionBlock(before, width, recipe.norm, halve=before != width) for before, width in pairs
    ]
    return around_blocks(blocks, widths, recipe.norm, shape, classes)
