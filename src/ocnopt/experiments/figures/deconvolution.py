"""Project a signal at a layer's input back to the network's input.

The deconvolutional network of Zeiler & Fergus, "Visualizing and understanding convolutional
networks", ECCV 2014, section 2.1, on any chain of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

from ocnopt.errors import GraphError, OptionError

__all__ = ["Rule", "differential_image", "to_image"]

#: What becomes of the signal at an activation.
Rule = Literal["deconvnet", "adjoint"]

_RELU = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_SMOOTH = {
    *(F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
    *(F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_),
}
# Affine in the state, so that autograd's backward is the exact adjoint; max-pooling's puts the
# signal where the largest input was, which is unpooling with switches.
_LINEAR = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.batch_norm, F.pad),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze),
    *(Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.squeeze, Tensor.unsqueeze),
    *(Tensor.unflatten, Tensor.contiguous, Tensor.permute, Tensor.transpose),
}
_KNOWN = "linear layers, convolutions, pooling, flattening, ReLU, tanh and sigmoid"


def to_image(
    model: nn.Module, layer: str, direction: Tensor, x: Tensor, *, rule: Rule = "deconvnet"
) -> Tensor:
    """Project a direction at a layer's input back to the network's input.

    Linear layers, convolutions and average pooling pass the signal on by their transpose,
    max-pooling to where the largest input of x was (the "switches"), flattening by reshaping. At a
    ReLU "deconvnet" rectifies the signal itself, as in the paper (features are not negative, so
    neither is what they are rebuilt from); at tanh and sigmoid, which the paper does not treat and
    whose inputs have both signs, it leaves the signal as it is. "adjoint" multiplies by the
    activation's derivative at x instead: the transposed Jacobian, an ordinary back-propagation.

    Args:
        model: A chain; run once on x in evaluation mode, unseen by an optimizer on it. A policy is
            of the weights before its step: project with those.
        layer: Name of the module at whose input the direction is, as in ``model.named_modules()``.
        direction: (B, n), n the elements of that input; or in its shape.
        x: The network's input, (B, *), floating point.
        rule: What becomes of the signal at an activation.

    Returns:
        The images, shaped as x; at the first layer the direction itself.

    Raises:
        OptionError: An unknown rule or layer, or a direction that does not fit.
        GraphError: What lies before the layer is no chain of operations with a rule.
    """
    if rule not in get_args(Rule):
        raise OptionError(f"rule={rule!r} is not known; choose one of {', '.join(get_args(Rule))}")
    module = dict(model.named_modules()).get(layer)
    if module is None:
        raise OptionError(f"layer={layer!r}: the model has no such module")
    watch = _Watch(layer, x)
    with torch.no_grad(), _evaluating(model), watch.until(module):
        model(watch.state)
    if watch.reached is None:
        raise GraphError(f"layer {layer!r} was not called")
    if direction.numel() != watch.reached.numel() or len(direction) != len(x):
        raise OptionError(
            f"the direction has shape {tuple(direction.shape)}, but the input of layer {layer!r} "
            f"has shape {tuple(watch.reached.shape)}"
        )
    signal = direction.detach().reshape(watch.reached.shape).to(watch.reached.dtype)
    for step in reversed(watch.steps):
        signal = step.back(signal, rule)
    return signal


def differential_image(model: nn.Module, layer: str, direction: Tensor, x: Tensor) -> Tensor:
    """Project a direction of both signs: ``(D(v) - D(-v)) / 2`` with D the deconvolutional network.

    D alone rectifies v itself where a ReLU made the layer's input, so that it shows what the
    direction adds and not what it takes away. Arguments are those of :func:`to_image`.
    """
    up, down = (to_image(model, layer, sign * direction, x) for sign in (1, -1))
    return (up - down) / 2


@dataclass
class _Step:
    """One operation of the chain, with what autograd kept of it."""

    function: Any
    before: Tensor
    after: Tensor

    def back(self, signal: Tensor, rule: Rule) -> Tensor:
        if rule == "deconvnet" and self.function in _RELU:
            return signal.clamp(min=0)
        if rule == "deconvnet" and self.function in _SMOOTH:
            return signal
        (found,) = torch.autograd.grad(self.after, self.before, signal)
        return found


class _Watch(TorchFunctionMode):
    """Records the operations on the state until a layer is called.

    Args:
        layer: The layer's name.
        x: The network's input.
    """

    def __init__(self, layer: str, x: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.state = x.detach()
        self.steps: list[_Step] = []
        self.reached: Tensor | None = None
        self._past: list[Tensor] = []  # kept, so that no id is given to another tensor

    @contextmanager
    def until(self, module: nn.Module) -> Iterator[None]:
        handle = module.register_forward_pre_hook(self._called, with_kwargs=True, prepend=True)
        try:
            with self:
                yield
        finally:
            handle.remove()

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.reached is not None:
            raise GraphError(f"layer {self.layer!r} is called more than once")
        flat, _ = tree_flatten((args, kwargs))
        if not any(x is self.state for x in flat):
            raise GraphError(
                f"layer {self.layer!r} does not read what the layer before it made: no chain"
            )
        self.reached = self.state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        if self.reached is not None or not any(isinstance(x, Tensor) for x in flat):
            return func(*args, **kwargs)
        if any(x is old for x in flat for old in self._past):
            raise GraphError(
                f"{_named(func)} before layer {self.layer!r} reads a tensor made earlier: no chain"
            )
        if not any(x is self.state for x in flat):
            return func(*args, **kwargs)
        before = self.state.detach().requires_grad_()
        with torch.enable_grad():
            given = before.clone()  # the operation may work in place
            args, kwargs = tree_map(lambda x: given if x is self.state else x, (args, kwargs))
            after = func(*args, **kwargs)
        if not isinstance(after, Tensor):
            return after  # a shape, a device: no part of the state
        if func not in _LINEAR | _RELU | _SMOOTH:
            raise GraphError(
                f"there is no rule for projecting back through {_named(func)}, before layer "
                f"{self.layer!r}; there is one for {_KNOWN}"
            )
        self._past.append(self.state)
        self.steps.append(_Step(func, before, after))
        self.state = after.detach()
        return self.state


def _named(func: Any) -> str:
    return repr(getattr(func, "__name__", None) or resolve_name(func) or str(func))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
