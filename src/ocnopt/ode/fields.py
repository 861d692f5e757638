"""Layers of vector fields that see the time (methods 4.10)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ConcatConv2d", "ConcatLinear", "ConcatSquashLinear", "TimedSequential"]


class ConcatLinear(nn.Module):
    """``W [x; t] + b``.

    Args:
        features_in: Features of x.
        features_out: Features of the result.
    """

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features_in + 1, features_out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """(B, features_in) and a time, or (B,) times, to (B, features_out)."""
        found: Tensor = self.linear(torch.cat([x, _column(t, x)], 1))
        return found


class ConcatConv2d(nn.Module):
    """A convolution that sees the time as one more channel.

    Args:
        channels_in: Channels of x.
        channels_out: Channels of the result.
        kernel_size: As in ``nn.Conv2d``.
        **options: Likewise (``stride``, ``padding``, ...).
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel_size: int = 3, **options: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in + 1, channels_out, kernel_size, **options)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """(B, channels_in, height, width) and a time, or (B,) times."""
        channel = _column(t, x)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        found: Tensor = self.conv(torch.cat([x, channel], 1))
        return found


class ConcatSquashLinear(nn.Module):
    """``(W x + b) * sigmoid(w t + c) + v t`` (Grathwohl et al. 2019).

    Every sample has its own copy of the time, so that a gate's gradient is known by sample.

    Args:
        features_in: Features of x.
        features_out: Features of the result.
    """

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features_in, features_out)
        self.gate = nn.Linear(1, features_out)
        self.shift = nn.Linear(1, features_out, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """(B, features_in) and a time, or (B,) times, to (B, features_out)."""
        column = _column(t, x)
        found: Tensor = self.linear(x) * self.gate(column).sigmoid() + self.shift(column)
        return found


class TimedSequential(nn.Module):
    """One layer after another; those of this file are given the time.

    Args:
        *layers: Modules, called as ``layer(t, x)`` if they are of this file, else ``layer(x)``.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """As the layers say."""
        for layer in self.layers:
            timed = isinstance(layer, (ConcatLinear, ConcatConv2d, ConcatSquashLinear))
            x = layer(t, x) if timed else layer(x)
        return x


def _column(t: Tensor, x: Tensor) -> Tensor:
    """The time of every sample, (B, 1)."""
    return t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)
