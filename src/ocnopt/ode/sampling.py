"""The adjoint on a grid of times, read off the steps that a solver takes anyway (methods 4.5).

The solver is not asked for the grid: its steps, and with them the gradient, stay what they are.
Between two of them state and adjoint are cubic Hermite interpolants, which need their slopes there.
One interval's ends are all that is held.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ocnopt.ode.listener import Field, Listener, Parts

__all__ = ["Sampler", "slopes"]


#: Times closer than this are the same.
TINY = 1e-9


class Sampler:
    """Hands the points of one backward solve, from its end to its start, to the listeners.

    With a step D there are ``N = round(|end - start| / D)`` points, at least one, evenly spaced;
    the end is not one of them, the start is.

    Args:
        field: What is solved.
        start: Time at which the forward solve began.
        end: Time at which it ended.
        listeners: Who is told, all with one ``sample_step``.
        step: D.
    """

    def __init__(
        self,
        field: Field,
        start: float,
        end: float,
        listeners: list[Listener],
        step: float,
    ) -> None:
        self.field = field
        self.listeners = listeners
        count = max(1, round(abs(end - start) / step))
        self.duration = abs(end - start) / count
        self.times = [end + (start - end) * j / count for j in range(1, count)] + [start]
        self.sign = 1 if end >= start else -1
        self.count = count
        self._next = 0
        self._last: _Node | None = None

    def node(self, t: Tensor, x: Parts, a: Parts) -> None:
        """A step of the backward solve begins, or the solve has ended, at (t, x, a)."""
        time = float(t)  # solvers keep time in double precision
        t = t.to(x[0].dtype)
        last, node = self._last, _Node(self, time, t, x, a)
        self._last = node
        while self._next < self.count and self.sign * (node.time - self.times[self._next]) <= TINY:
            time = self.times[self._next]
            self._next += 1
            if last is None or abs(time - node.time) <= TINY:
                self._emit(t, x, a)
            else:
                self._emit(t.new_tensor(time), *_between(last, node, time))

    def _emit(self, t: Tensor, x: Parts, a: Parts) -> None:
        for listener in self.listeners:
            listener.sample(self.field, t, x, a, self.duration)


class _Node:
    """State and adjoint where a step of the solver begins; their slopes once they are asked for."""

    def __init__(self, sampler: Sampler, time: float, t: Tensor, x: Parts, a: Parts) -> None:
        self.time = time
        self.values = (*x, *a)
        self.count = len(x)
        self._slopes: Parts | None = None
        self._ask = partial(slopes, sampler.field, t, x, a)

    @property
    def slopes(self) -> Parts:
        if self._slopes is None:
            dx, da = self._ask()
            self._slopes = (*dx, *da)
        return self._slopes


def _between(left: _Node, right: _Node, time: float) -> tuple[Parts, Parts]:
    """The cubic with the nodes' values and slopes."""
    length = right.time - left.time
    h = (time - left.time) / length
    weights = (
        (1 + 2 * h) * (1 - h) ** 2,
        h**2 * (3 - 2 * h),
        h * (1 - h) ** 2 * length,
        h**2 * (h - 1) * length,
    )
    nodes = zip(left.values, right.values, left.slopes, right.slopes, strict=True)
    values = tuple(sum(w * v for w, v in zip(weights, four, strict=True)) for four in nodes)
    return values[: left.count], values[left.count :]  # type: ignore[return-value]


def slopes(field: Field, t: Tensor, x: Parts, a: Parts) -> tuple[Parts, Parts]:
    """``dx/dt = F`` and ``da/dt = -F_x^T a`` at a point.

    Args:
        field: F.
        t: Time.
        x: The state.
        a: The adjoint.
    """
    with torch.enable_grad():
        leaves = tuple(part.detach().requires_grad_() for part in x)
        outputs = field(t, leaves)
        grads = pull_back(outputs, leaves, tuple(-part for part in a))
    return tuple(f.detach() for f in outputs), grads


def pull_back(outputs: Parts, inputs: Parts, cotangents: Parts) -> Parts:
    """Vector-Jacobian product; zeros where an output does not depend on an input."""
    pairs = [(f, v) for f, v in zip(outputs, cotangents, strict=True) if f.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    fs, vs = zip(*pairs, strict=True)
    grads = torch.autograd.grad(fs, inputs, vs, allow_unused=True)
    return tuple(
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
    )
