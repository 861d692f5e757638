"""The affine parameters of LayerNorm, GroupNorm, RMSNorm and BatchNorm: ``h = w * xhat + b``.

The normalization itself belongs to the dynamics. Under batch statistics a sample's state is not
its own (a change of one sample moves all); back-propagation through the statistics is the batch's,
and the affine map alone is per sample.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocnopt.layers.base import Capture, Layer, Params


class AffineLayer(Layer):
    """An elementwise affine map; subclasses say how the input is normalized."""

    #: Whether the parameters sit on dimension 1 (channels) rather than on the last dimensions.
    channelwise = False

    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        """The input of the normalization."""
        x = args[0] if args else kwargs[next(iter(kwargs))]
        return (x.detach(), *self.settings(module))

    def settings(self, module: nn.Module) -> tuple[Any, ...]:
        """What else the normalization depends on at the time of the call."""
        return ()

    def prefers_samples(self, a: Tensor, g: Tensor) -> bool:
        """Always: a sample's gradient is never larger than its input."""
        return True

    def _wide(self, p: Tensor, dims: int) -> Tensor:
        if not self.channelwise:
            return p
        return p.view(1, -1, *([1] * (dims - 2)))

    def apply(self, a: Tensor, delta: Params) -> Tensor:
        """``dw * xhat + db``."""
        if not self.has_weight:
            return self._wide(delta[0], a.dim()).expand_as(a)
        h = a * self._wide(delta[0], a.dim())
        return h + self._wide(delta[1], a.dim()) if self.has_bias else h

    def sample_gradients(self, a: Tensor, g: Tensor) -> Params:
        """``sum over locations of g * xhat`` and of g."""
        if self.channelwise:
            dims = tuple(range(2, a.dim()))
        else:
            dims = tuple(range(1, a.dim() - len(self.shapes[0])))

        def total(t: Tensor) -> Tensor:
            return t.sum(dims) if dims else t

        out: tuple[Tensor, ...] = (total(g * a),) if self.has_weight else ()
        return (*out, total(g)) if self.has_bias else out

    def gradient(self, a: Tensor, g: Tensor) -> Params:
        """The per-sample gradients added up."""
        return tuple(p.sum(0) for p in self.sample_gradients(a, g))


class LayerNormLayer(AffineLayer):
    """Affine part of ``nn.LayerNorm``."""

    kind = "LayerNorm"

    def settings(self, module: nn.Module) -> tuple[Any, ...]:
        """Normalized shape and eps."""
        return module.normalized_shape, module.eps

    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The normalized input."""
        x, shape, eps = capture
        return F.layer_norm(x.to(dtype), shape, None, None, eps)


class RMSNormLayer(AffineLayer):
    """Affine part of ``nn.RMSNorm``."""

    kind = "RMSNorm"

    def settings(self, module: nn.Module) -> tuple[Any, ...]:
        """Normalized shape and eps."""
        return module.normalized_shape, module.eps

    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The normalized input."""
        x, shape, eps = capture
        return F.rms_norm(x.to(dtype), shape, None, eps)


class GroupNormLayer(AffineLayer):
    """Affine part of ``nn.GroupNorm``."""

    kind = "GroupNorm"
    channelwise = True

    def settings(self, module: nn.Module) -> tuple[Any, ...]:
        """Groups and eps."""
        return module.num_groups, module.eps

    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The normalized input."""
        x, groups, eps = capture
        return F.group_norm(x.to(dtype), groups, None, None, eps)


class BatchNormLayer(AffineLayer):
    """Affine part of ``nn.BatchNorm1d/2d/3d``; running statistics are never touched."""

    kind = "BatchNorm"
    channelwise = True

    def settings(self, module: nn.Module) -> tuple[Any, ...]:
        """The running statistics the call used, or None for the batch's own, and eps."""
        if module.training or module.running_mean is None:
            return None, None, module.eps
        assert isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor)
        return module.running_mean.clone(), module.running_var.clone(), module.eps

    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The normalized input."""
        x, mean, var, eps = capture
        if mean is None:
            return F.batch_norm(x.to(dtype), None, None, training=True, eps=eps)
        return F.batch_norm(x.to(dtype), mean.to(dtype), var.to(dtype), training=False, eps=eps)
