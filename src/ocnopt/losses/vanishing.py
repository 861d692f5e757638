"""A regularizer that keeps the error signal from vanishing on its way back through the layers.

Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
Eq. 9 and 10. With plain SGD it is the baseline SGD-VGR of Liu et al. (ICLR 2021), Fig. 6.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.control.hooks import ModuleHook
from ocnopt.curvature.metric import to_float
from ocnopt.errors import GraphError, OptionError, RecordingError
from ocnopt.layers import MatrixLayer, kind_of
from ocnopt.real import is_real

__all__ = ["VanishingGradientRegularizer"]


@dataclass
class _State:
    """An input of a layer, or the model's output, as the forward pass saw it."""

    name: str
    label: str
    value: Tensor
    version: int
    params: list[nn.Parameter]


class VanishingGradientRegularizer:
    """``Omega = sum_k mean_i ( |J_k^T e_k+1| / |e_k+1| - 1 )^2``, in the ordinary loop.

    Here ``x_k`` is the input of the k-th linear or convolutional layer as far as the network
    computed it (the first layer's, data, has no term), the last ``x`` is the model's output,
    ``e_k = dE/dx_k`` the error signal and ``J_k = dx_k+1/dx_k``. Norms are taken per sample, and
    the terms averaged over the samples that have an error signal at ``x_k+1``.

    As in the paper, only the *immediate* derivative is followed: ``e_k+1`` and ``x_k`` are
    constants, and the k-th term changes the weights of the k-th layer alone. The tensor that a call
    returns has the value ``weight * Omega`` and that gradient; it cannot be differentiated twice.

    The layers must form a chain (shortcuts around them are allowed), each used once, and their
    operations must be twice differentiable, which those of a compiled model are not. Of several
    forward passes, the last one with gradients counts.

    Args:
        model: The model; hooks are put on it and on its linear and convolutional layers.
        weight: Factor of the regularizer; the attribute may be changed at any time.

    Attributes:
        ratios: ``|J_k^T e_k+1| / |e_k+1|`` of the last call by the name of the k-th layer, each
            (B,); NaN where a sample had no error signal.

    Raises:
        OptionError: Fewer than two such layers, or a weight that cannot be.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 3)
        ... )
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> regularizer = VanishingGradientRegularizer(model, weight=0.5)
        >>> loss = criterion(model(torch.randn(6, 4)), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> (loss + regularizer(loss)).backward()
        >>> optimizer.step()
        >>> list(regularizer.ratios)
        ['2']
        >>> regularizer.remove()
    """

    def __init__(self, model: nn.Module, weight: float = 1.0) -> None:
        if not is_real(weight) or not 0 <= weight < math.inf:
            raise OptionError(f"weight={weight!r}, but it must be a number, 0 or more")
        self.weight = float(weight)
        self.ratios: dict[str, Tensor] = {}
        self.active = True
        self._states: list[_State] = []
        self._complete = False
        self._layers = [
            (name, module) for name, module in model.named_modules() if _is_matrix(module)
        ]
        if len(self._layers) < 2:
            raise OptionError(
                f"the model has {len(self._layers)} linear or convolutional layers, but an error "
                "signal is passed on between two or more; leave the regularizer out"
            )
        me: Any = self
        handles: list[Any] = [
            model.register_forward_pre_hook(ModuleHook(me, "_begin"), with_kwargs=True),
            model.register_forward_hook(ModuleHook(me, "_end"), with_kwargs=True),
        ]
        for index, (_, module) in enumerate(self._layers):
            hook = ModuleHook(me, "_record", index)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def remove(self) -> None:
        """Take the hooks off the model; happens by itself when the regularizer is forgotten."""
        self.active = False
        self._finalizer()
        self._forget()

    def __call__(self, loss: Tensor) -> Tensor:
        """The regularizer of the last forward pass.

        Args:
            loss: What was computed from the model's output, a number; not yet back-propagated.

        Returns:
            ``weight * Omega``, to be added to the loss.

        Raises:
            RecordingError: There was no forward pass since the last call, the loss does not come
                from it, or a layer's input was overwritten.
            GraphError: The layers form no chain, or use a weight twice.
        """
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise RecordingError(
                "the regularizer needs the loss as a single number with its graph; pass what the "
                "criterion returned, before backward() and without item() or detach()"
            )
        if not self._complete:
            raise RecordingError(
                "the regularizer saw no forward pass since it was last called"
                + ("" if self.active else " (its hooks were removed)")
                + "; call the model itself, with gradients on, and then regularizer(loss) once"
            )
        states = self._states
        self._forget()
        samples = _samples(states)
        _require_immediate(states)
        signals = torch.autograd.grad(
            loss, [s.value for s in states], retain_graph=True, allow_unused=True
        )
        if all(signal is None for signal in signals):
            raise RecordingError(
                "the loss does not come from the model's last forward pass; call "
                "regularizer(loss) before the model is run again"
            )
        total: Tensor = torch.zeros((), dtype=to_float(loss.dtype), device=loss.device)
        self.ratios = {}
        for state, after, signal in zip(states, states[1:], signals[1:], strict=False):
            total = total + self._term(state, after, signal, samples)
        return total * self.weight

    def _term(self, state: _State, after: _State, signal: Tensor | None, samples: int) -> Tensor:
        """One layer's term, with the immediate derivative as its gradient."""
        product: Tensor | None = None
        if signal is not None:
            unit, alive = _unit(signal, samples)
            (product,) = torch.autograd.grad(
                after.value, state.value, unit, create_graph=True, allow_unused=True
            )
        if product is None:
            raise GraphError(
                f"the layers form no chain: either {after.label} does not depend on {state.label}, "
                f"or the loss not on {after.label}. Build a regularizer on each part of the model "
                "that is one"
            )
        flat = product.reshape(samples, -1)
        ratio = torch.linalg.vector_norm(flat.to(to_float(flat.dtype)), dim=1)
        self.ratios[state.name] = ratio.detach().where(alive, math.nan)
        term = ((ratio - 1).square() * alive).sum() / alive.sum().clamp_min(1)
        params = [p for p in state.params if p.requires_grad]
        value: Tensor = term.detach()
        if not params or not term.requires_grad:
            return value
        # The immediate derivative, as x_k does not depend on this layer's weights.
        found = torch.autograd.grad(term, params, retain_graph=True, allow_unused=True)
        for p, gradient in zip(params, found, strict=True):
            if gradient is not None:
                # Zero in value; its derivative is the gradient.
                value = value + (gradient * (p - p.detach())).sum()
        return value

    # hooks

    def _begin(self, _: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self._forget()

    def _record(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        x = args[0] if args else kwargs["input"]
        if x.grad_fn is None:
            return  # data
        name = self._layers[index][0]
        # Parameters below the layer as well: those of a parametrized weight.
        self._states.append(
            _State(name, f"the input of layer {name!r}", x, x._version, list(module.parameters()))
        )

    def _end(
        self, _: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        if not isinstance(output, Tensor):
            self._forget()
            raise RecordingError(
                f"the model returned a {type(output).__name__}; VanishingGradientRegularizer "
                "follows the error signal from a single tensor. Build it on the part of the model "
                "that returns one"
            )
        self._states.append(_State("", "the model's output", output, output._version, []))
        self._complete = True

    def _forget(self) -> None:
        self._states = []
        self._complete = False


def _is_matrix(module: nn.Module) -> bool:
    """Whether the module is a linear or convolutional layer."""
    kind = kind_of(module)
    return isinstance(kind, type) and issubclass(kind, MatrixLayer)


def _samples(states: list[_State]) -> int:
    """B: the smallest first dimension; where there are more rows, consecutive ones are a sample."""
    values = [s.value for s in states]
    samples = min(len(v) if v.dim() else 0 for v in values)
    features = all(v.dim() > 1 for v in values[:-1])
    if not samples or not features or any(len(v) % samples for v in values):
        shapes = ", ".join(f"{s.label} {tuple(s.value.shape)}" for s in states)
        raise GraphError(
            "VanishingGradientRegularizer cannot tell samples apart by the first dimension of "
            f"{shapes}; put the samples first, and compute the loss outside the model"
        )
    return samples


def _require_immediate(states: list[_State]) -> None:
    """Raise unless every input is what was seen, and was computed without its layer's weights."""
    visited: set[Any] = set()
    before: set[int] = set()
    for state in states:
        if state.value._version != state.version:
            raise RecordingError(
                f"{state.label} was changed in place after the forward pass saw it; use an "
                "out-of-place operation there"
            )
        before.update(_leaves(state.value.grad_fn, visited))
        if any(id(p) in before for p in state.params):
            raise GraphError(
                f"{state.label} depends on that layer's weights, which the network uses more than "
                "once; VanishingGradientRegularizer needs layers with weights of their own"
            )


def _leaves(node: Any, visited: set[Any]) -> set[int]:
    """Ids of the tensors that a node of the graph was computed from, by nodes not visited yet."""
    found: set[int] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node.name().endswith("AccumulateGrad"):
            found.add(id(node.variable))
        stack.extend(following for following, _ in node.next_functions)
    return found


def _unit(signal: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Error signals of length one per sample, and which samples have one.

    They are what vanishes: the largest entry is divided by first, as squares would underflow.
    """
    flat = signal.reshape(samples, -1)
    largest = flat.abs().amax(1, keepdim=True)
    alive = largest > 0
    flat = torch.where(alive, flat / largest, torch.zeros_like(flat))
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    flat = torch.where(alive, flat / length, torch.zeros_like(flat))
    return flat.reshape(signal.shape), alive.squeeze(1)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
