"""Samples with times of their own, solved together in a time that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ocnopt.errors import OptionError
from ocnopt.ode.listener import Field, Listener, Parts

__all__ = ["Warped", "solve_warped"]

Solve: TypeAlias = Callable[[nn.Module, Parts, Tensor], Parts]


class Warped(nn.Module):
    """``dx/ds = (t1 - t0) F(t0 + s (t1 - t0), x)`` for s from 0 to 1, per sample."""

    def __init__(self, func: nn.Module, start: Tensor, span: Tensor) -> None:
        super().__init__()
        self.func = func
        self.start = start
        self.span = span

    def forward(self, s: Tensor, x: Any) -> Any:
        """dx/ds."""
        value = self.func(self.start + s * self.span, x)
        if isinstance(value, Tensor):
            return self._scaled(value)
        return tuple(self._scaled(f) for f in value)

    def _scaled(self, f: Tensor) -> Tensor:
        return f * self.span.view(-1, *[1] * (f.dim() - 1))

    def heard_by(self, listeners: Sequence[Listener], func: Field) -> list[Listener]:
        """Listeners who are told of F in the samples' own times.

        Args:
            listeners: Who is told.
            func: F, as they are to evaluate it.
        """
        return [_Told(listener, func, self.start, self.span) for listener in listeners]


class _Told:
    """Tells a listener of a solve in shared time as of solves in the samples' times."""

    def __init__(self, listener: Listener, func: Field, start: Tensor, span: Tensor) -> None:
        self.listener = listener
        self.func = func
        self.start = start
        self.span = span

    @property
    def sample_step(self) -> float | None:
        """As a part of the longest span, so that no sample has fewer points than it should."""
        step, longest = self.listener.sample_step, float(self.span.abs().max())
        return step / longest if step is not None and longest > 0 else None

    def arrived(self, task: int, field: Field, end: Tensor, x: Parts, gradient: Parts) -> None:
        """At the samples' ends."""
        self.listener.arrived(task, self.func, self._time(end), x, gradient)

    def sample(self, field: Field, t: Tensor, x: Parts, a: Parts, duration: Any) -> None:
        """At the samples' times, for their durations."""
        self.listener.sample(self.func, self._time(t), x, a, duration * self.span.abs())

    def _time(self, s: Tensor) -> Tensor:
        return self.start + s * self.span


def solve_warped(solve: Solve, func: nn.Module, x: Parts, times: Tensor) -> Parts:
    """States at every sample's own times.

    Args:
        solve: ``solve(field, x, t)``.
        func: F, called with t (B,).
        x: The state at ``times[0]``.
        times: (T, B). A sample whose time stands still keeps its state.

    Returns:
        Shaped as x with a leading dimension of length T.

    Raises:
        OptionError: The times require a gradient.
    """
    if times.requires_grad:
        raise OptionError(
            "t: times of every sample are not differentiated; give times (T,) or detach them"
        )
    unit = times.new_tensor([0.0, 1.0])
    states = [x]
    for i in range(1, len(times)):
        field = Warped(func, times[i - 1], times[i] - times[i - 1])
        states.append(tuple(f[-1] for f in solve(field, states[-1], unit)))
    return tuple(torch.stack(part) for part in zip(*states, strict=True))
