"""What the networks are put together from."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import Activation, Norm

__all__ = ["ACTIVATIONS", "around_blocks", "convolution", "require_images"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}

#: Groups of a group normalization, or the largest divisor of the channels below it.
_GROUPS = 8


def convolution(
    name: str,
    inputs: int,
    outputs: int,
    size: int,
    norm: Norm,
    stride: int = 1,
    bias: bool = True,
) -> dict[str, nn.Module]:
    """A convolution that keeps height and width (over the stride), and its normalization.

    Without normalization weights are He's.

    Args:
        name: Ending of the names, as in conv1 and norm1.
        inputs: Channels read.
        outputs: Channels made.
        size: Of its square kernel; odd.
        norm: What follows it.
        stride: Of the convolution.
        bias: Whether it has one where no normalization has it in its place.

    Returns:
        Its modules by name, in order.
    """
    bias = bias and norm == "none"
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
    if norm == "none":  # nothing else keeps the scale from layer to layer (He et al., ICCV 2015)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    modules: dict[str, nn.Module] = {f"conv{name}": conv}
    if norm == "batch":
        modules[f"norm{name}"] = nn.BatchNorm2d(outputs)
    elif norm == "group":
        modules[f"norm{name}"] = nn.GroupNorm(math.gcd(_GROUPS, outputs), outputs)
    return modules


def around_blocks(
    blocks: Sequence[nn.Module],
    widths: tuple[int, ...],
    norm: Norm,
    shape: tuple[int, ...],
    classes: int,
) -> nn.Sequential:
    """Put a stem of one 3x3 convolution before blocks, and a global average and a head behind.

    Args:
        blocks: The first reads the stem.
        widths: Channels that every block makes; the stem makes as many as the first.
        norm: Normalization of the stem.
        shape: Shape of one image.
        classes: Number of outputs.
    """
    stem = convolution("", shape[0], widths[0], 3, norm)
    return nn.Sequential(
        OrderedDict(
            stem=stem.pop("conv"),
            **stem,
            act=nn.ReLU(),
            blocks=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(widths[-1], classes),
        )
    )


def require_images(network: str, shape: tuple[int, ...], least: int) -> None:
    """Refuse inputs that are no images, or too small.

    Args:
        network: Its name on the command line.
        shape: Shape of one input.
        least: Height and width that it needs.

    Raises:
        InputError: As it says.
    """
    if len(shape) != 3 or min(shape[1:]) < least:
        raise InputError(
            f"{network} needs images of at least {least}x{least} pixels, not inputs of shape "
            f"{shape}"
        )
