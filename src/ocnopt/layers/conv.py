"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: any stride, padding, dilation and groups."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocnopt.layers.base import Capture, MatrixLayer, Params

#: Weights per location beyond which samples' gradients are products with patches.
MANY = 1024

_APPLY = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLayer(MatrixLayer):
    """``h = w * x + b`` (Eq. 14), seen as a linear layer on patches where factors are asked for."""

    kind = "Conv"

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.dims = len(module.kernel_size)
        self.stride = module.stride
        self.dilation = module.dilation
        self.groups = module.groups
        self.kernel = module.kernel_size
        self.out_channels = module.out_channels
        self.weight_shape = tuple(module.weight.shape)
        # Zero padding by numbers is left to the convolution; every other padding is applied to
        # the recorded input, after which the convolution needs none.
        native = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        self.pads = list(module._reversed_padding_repeated_twice)
        self.pad_mode = None if native else module.padding_mode.replace("zeros", "constant")
        self.padding: tuple[int, ...] = (
            tuple(int(p) for p in module.padding) if native else (0,) * self.dims
        )

    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        """The input."""
        return ((args[0] if args else kwargs["input"]).detach(),)

    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The input, padded where the padding is not plain zeros."""
        x: Tensor = capture[0]
        x = x if x.dtype == dtype else x.to(dtype)
        return x if self.pad_mode is None else F.pad(x, self.pads, mode=self.pad_mode)

    def gradient(self, a: Tensor, g: Tensor) -> Params:
        """The library's own weight-gradient convolution."""
        _, weight, bias = torch.ops.aten.convolution_backward(
            g,
            a,
            a.new_empty(1).expand(self.weight_shape),
            [self.out_channels],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * self.dims,
            self.groups,
            [False, self.has_weight, self.has_bias],
        )
        return tuple(p for p, own in ((weight, self.has_weight), (bias, self.has_bias)) if own)

    def apply(self, a: Tensor, delta: Params) -> Tensor:
        """The convolution with the update as weights."""
        if not self.has_weight:
            size = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip(
                    a.shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True
                )
            ]
            bias = delta[0].view(1, -1, *([1] * self.dims))
            return bias.expand(a.shape[0], self.out_channels, *size)
        offset = delta[1] if self.has_bias else None
        return _APPLY[self.dims](
            a, delta[0], offset, self.stride, self.padding, self.dilation, self.groups
        )

    def patches(self, a: Tensor) -> Tensor:
        """Patches (B, groups, in / groups * kernel, L)."""
        if self.dims == 2:
            flat = F.unfold(
                a, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride
            )
            return flat.view(a.shape[0], self.groups, -1, flat.shape[-1])
        if any(self.padding):
            a = F.pad(a, self.pads)
        for i in range(self.dims):
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            a = a.unfold(2 + i, reach, self.stride[i])[..., :: self.dilation[i]]
        batch, _, *rest = a.shape
        order = (0, 1, *range(2 + self.dims, 2 + 2 * self.dims), *range(2, 2 + self.dims))
        locations = 1
        for n in rest[: self.dims]:
            locations *= n
        return a.permute(order).reshape(batch, self.groups, -1, locations)

    def sample_gradients(self, a: Tensor, g: Tensor) -> Params:
        """One weight-gradient convolution with every sample as a group of its own.

        On the CPU that is faster than the batch's own weight gradient, as nothing is added up
        across samples, and several times faster than products with patches; not so where weights
        are many beside locations, where writing them down is most of the work.
        """
        batch = g.shape[0]
        out: tuple[Tensor, ...] = ()
        if self.has_weight and math.prod(self.weight_shape) > MANY * g[0, 0].numel():
            signals = g.reshape(batch, self.groups, self.out_channels // self.groups, -1)
            out = ((signals @ self.patches(a).mT).view(batch, *self.weight_shape),)
        elif self.has_weight:
            shape = (batch * self.weight_shape[0], *self.weight_shape[1:])
            _, weight, _ = torch.ops.aten.convolution_backward(
                g.reshape(1, -1, *g.shape[2:]),
                a.reshape(1, -1, *a.shape[2:]),
                a.new_empty(1).expand(shape),
                None,
                self.stride,
                self.padding,
                self.dilation,
                False,
                [0] * self.dims,
                self.groups * batch,
                [False, True, False],
            )
            out = (weight.view(batch, *self.weight_shape),)
        return (*out, g.flatten(2).sum(-1)) if self.has_bias else out

    @property
    def row_key(self) -> tuple[Any, ...]:
        """The patches' geometry too."""
        geometry = (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        return (*super().row_key, *geometry)

    def rows(self, a: Tensor) -> Tensor:
        """(B, L, groups, in / groups * kernel [+ 1])."""
        return self.homogeneous(self.patches(a).permute(0, 3, 1, 2))

    def cols(self, g: Tensor) -> Tensor:
        """(B, L, groups, out / groups)."""
        return g.reshape(g.shape[0], self.groups, self.out_channels // self.groups, -1).permute(
            0, 3, 1, 2
        )
