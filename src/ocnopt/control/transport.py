"""First and second derivatives of a stage, per sample, as maps between flattened states.

A transport is the Jacobian J (n', n) of every sample. Where all operations act on single elements
(activations, reshaping) it is a diagonal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ocnopt.control.chain import Link
from ocnopt.errors import GraphError
from ocnopt.layers.linear import LinearLayer

__all__ = ["Diagonal", "Matrix", "Same", "Transport", "bend", "layer_jacobian", "state_jacobian"]

#: Operations whose derivative is a diagonal: activations and changes of shape.
ELEMENTWISE = frozenset(
    f"{name}Backward{i}"
    for name in (
        *(
            "Abs",
            "Add",
            "Alias",
            "Clamp",
            "Clone",
            "Cos",
            "Div",
            "Elu",
            "Exp",
            "Gelu",
            "Hardsigmoid",
        ),
        *(
            "Hardswish",
            "Hardtanh",
            "LeakyRelu",
            "Log",
            "LogSigmoid",
            "Mish",
            "Mul",
            "NativeDropout",
        ),
        *(
            "Neg",
            "Pow",
            "Relu",
            "Reshape",
            "ReshapeAlias",
            "Rsub",
            "Sigmoid",
            "Silu",
            "Sin",
            "Softplus",
        ),
        *(
            "Sqrt",
            "Squeeze",
            "Sub",
            "Tanh",
            "ToCopy",
            "Threshold",
            "UnsafeView",
            "Unsqueeze",
            "View",
        ),
    )
    for i in (0, 1, 2, 3)
)


class Transport(ABC):
    """The Jacobian of every sample."""

    @abstractmethod
    def pull(self, v: Tensor) -> Tensor:
        """``J^T v``, (B, n') to (B, n)."""

    @abstractmethod
    def pull_columns(self, k: Tensor) -> Tensor:
        """``k J``, (B, *, n') to (B, *, n)."""

    @abstractmethod
    def push(self, dx: Tensor) -> Tensor:
        """``J dx``, (B, n) to (B, n')."""

    def pull_matrix(self, k: Tensor) -> Tensor:
        """``J^T K J``, (B, n', n') to (B, n, n)."""
        return self.pull_columns(self.pull_columns(k).transpose(1, 2))


class Diagonal(Transport):
    """``J = diag(d)``, d of shape (B, n)."""

    def __init__(self, d: Tensor) -> None:
        self.d = d

    def pull(self, v: Tensor) -> Tensor:
        """``d v``."""
        return self.d * v

    def pull_columns(self, k: Tensor) -> Tensor:
        """``k diag(d)``."""
        return k * self.d.unsqueeze(1)

    def push(self, dx: Tensor) -> Tensor:
        """``d dx``."""
        return self.d * dx


class Same(Transport):
    """``J = I``."""

    def pull(self, v: Tensor) -> Tensor:
        """The same."""
        return v

    def pull_columns(self, k: Tensor) -> Tensor:
        """The same."""
        return k

    def push(self, dx: Tensor) -> Tensor:
        """The same."""
        return dx


class Matrix(Transport):
    """J of shape (G, n', n), one for every B / G consecutive samples; (n', n) is one for all."""

    def __init__(self, j: Tensor) -> None:
        self.j = j

    def pull(self, v: Tensor) -> Tensor:
        """``J^T v``."""
        if self.j.dim() == 2:
            return v @ self.j
        return self._grouped(v, self.j)

    def pull_columns(self, k: Tensor) -> Tensor:
        """``k J``."""
        if self.j.dim() == 2 or self.j.shape[0] == k.shape[0]:
            return k @ self.j
        pulled: Tensor = self._grouped(k.flatten(0, 1), self.j).unflatten(0, k.shape[:2])
        return pulled

    def push(self, dx: Tensor) -> Tensor:
        """``J dx``."""
        if self.j.dim() == 2:
            return dx @ self.j.t()
        return self._grouped(dx, self.j.mT)

    def _grouped(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Rows times their samples' matrix."""
        grouped: Tensor = rows.unflatten(0, (matrices.shape[0], -1)) @ matrices
        return grouped.flatten(0, 1)


def state_jacobian(link: Link, samples: int, dtype: torch.dtype) -> Transport:
    """The Jacobian of ``s_t``: from the player's output to the next player's input.

    Args:
        link: The stage.
        samples: B.
        dtype: The dtype of values.

    Raises:
        GraphError: Samples depend on one another.
    """
    if link.parameter_free:
        return Same()
    with torch.enable_grad():
        h = link.h.detach().to(dtype).requires_grad_()
        y = link.s(h)
    return _jacobian(h, y, samples, link.player.name)


def layer_jacobian(link: Link, samples: int, dtype: torch.dtype) -> Transport:
    """The Jacobian ``g_x`` of the player's own layer.

    Raises:
        GraphError: Samples depend on one another.
    """
    weight = link.player.module._parameters.get("weight")
    linear = isinstance(link.player.layer, LinearLayer)
    if linear and link.x.dim() == 2 and link.x.shape[0] == samples:
        assert weight is not None
        return Matrix(weight.detach().to(dtype))
    with torch.enable_grad():
        x = link.x.detach().to(dtype).requires_grad_()
        params = tuple(p.detach().to(dtype) for p in link.player.params)
        y = link.g(x, params)
    return _jacobian(x, y, samples, link.player.name)


def _jacobian(x: Tensor, y: Tensor, samples: int, name: str) -> Transport:
    n = x.numel() // samples
    if not y.requires_grad:  # no derivative anywhere
        return Diagonal(x.new_zeros(samples, n))
    if _elementwise(x, y):
        (d,) = torch.autograd.grad(y, x, torch.ones_like(y), materialize_grads=True)
        return Diagonal(d.reshape(samples, n))
    _require_apart(x, y, samples, name)
    size = y.numel() // samples
    rows = _columns(x, y, size, samples)
    return Matrix(rows.reshape(size, samples, n).transpose(0, 1))


def bend(link: Link, v: Tensor) -> Tensor:
    """``V_x . s_hh``: the second derivative of ``v^T s(h)`` (Eq. 26).

    Args:
        link: The stage.
        v: Value gradient behind it, (B, n').

    Returns:
        (B, n) where it is a diagonal, else (B, n, n).
    """
    samples = v.shape[0]
    with torch.enable_grad():
        h = link.h.detach().to(v.dtype).requires_grad_()
        n = h.numel() // samples
        y = link.s(h)
        diagonal = _elementwise(h, y)
        if not y.requires_grad:
            return v.new_zeros(samples, n)
        (slope,) = torch.autograd.grad(
            y, h, v.reshape(y.shape), create_graph=True, materialize_grads=True
        )
    if not slope.requires_grad:  # piecewise linear
        return v.new_zeros(samples, n)
    if diagonal:
        (d,) = torch.autograd.grad(slope, h, torch.ones_like(slope), materialize_grads=True)
        return d.reshape(samples, n)
    return _columns(h, slope, n, samples).reshape(n, samples, n).transpose(0, 1)


def unit_columns(like: Tensor, size: int, samples: int) -> Tensor:
    """Every unit vector of a sample's ``size`` entries, for all samples: (size, *like)."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye.unsqueeze(1).expand(size, samples, size).reshape(size, *like.shape)


def _columns(x: Tensor, y: Tensor, size: int, samples: int) -> Tensor:
    """Vector products of y with every unit vector of a sample, (size, *x)."""
    (rows,) = torch.autograd.grad(
        y, x, unit_columns(y, size, samples), is_grads_batched=True, materialize_grads=True
    )
    return rows


def _elementwise(x: Tensor, y: Tensor) -> bool:
    """Whether y's graph is a single path of elementwise operations down to its leaf x."""
    if x.numel() != y.numel():
        return False
    node = y.grad_fn
    while node is not None:
        if node.name() == "torch::autograd::AccumulateGrad":
            return True
        below = [n for n, _ in node.next_functions if n is not None]
        if node.name() not in ELEMENTWISE or len(below) != 1:
            return False
        node = below[0]
    return False


def _require_apart(x: Tensor, y: Tensor, samples: int, name: str) -> None:
    """Raise where a sample's output depends on another sample's input."""
    if samples == 1:
        return
    probe = torch.zeros_like(y)
    half = probe.shape[0] // samples * (samples // 2)
    probe[:half] = 1
    (found,) = torch.autograd.grad(y, x, probe, retain_graph=True, materialize_grads=True)
    if bool(found[x.shape[0] // samples * (samples // 2) :].count_nonzero()):
        raise GraphError(
            f"at layer {name!r} or behind it the samples of a batch depend on one another (batch "
            "statistics?), so no sample has a value function of its own; use eval() for batch "
            "normalization, or GroupNorm (DDPNOpt with terminal='matched' and VanillaDDP with "
            "batch='joint' take such networks)"
        )
