"""Gradients by back-propagation through the solver's steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ocnopt.control.replay import autocast_as, autocast_now
from ocnopt.ode.listener import Field, Listener, Parts
from ocnopt.ode.solve import Method, solve

__all__ = ["unrolled_solve"]

Split: TypeAlias = Callable[[Tensor], Parts]


def unrolled_solve(
    field: Field,
    sampling: Field,
    x0: Parts,
    t: Tensor,
    method: Method,
    listeners: list[Listener],
    where: str,
) -> Parts:
    """States at every time, differentiable by autograd alone.

    The gradient with respect to a state that the solver stepped from is the adjoint there, so
    listeners are told of those: a trapezoidal rule on the solver's own steps instead of a grid.

    Args:
        field: F.
        sampling: F, counted for statistics.
        x0: The state at ``t[0]``.
        t: Times (T,).
        method: The solver.
        listeners: Who follows.
        where: What is being solved, for messages.

    Returns:
        Shaped as x0 with a leading dimension of length T.

    Raises:
        SolverError: The solver fails.
    """
    if not listeners:
        return solve(field, x0, t, method, where=where)
    wanting = [who for who in listeners if who.sample_step is not None]
    flat, split = _flattened(x0)
    if not flat.requires_grad:
        flat = flat.detach().requires_grad_()  # a gradient must come as far as this
    nodes: list[tuple[Tensor, Tensor]] = []
    found = solve(
        lambda t, x: torch.cat([f.reshape(-1) for f in field(t, split(x))]),
        flat,
        t,
        _norm_of_parts(method, split),
        (lambda at, x, _: nodes.append((at, x))) if wanting else None,
        where,
    )
    casts = autocast_now()

    def cast(t: Tensor, x: Parts) -> Parts:
        with autocast_as(casts):  # the backward pass runs outside of the loop's
            return sampling(t, x)

    times = [*(float(at.detach()) for at, _ in nodes), float(t[-1].detach())]
    halves = [abs(b - a) / 2 for a, b in pairwise(times)]
    end, last = t[-1].detach(), found[-1].detach()

    def arrived(grads: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        x, a = split(last), split(grads[-1].detach())
        for who in listeners:
            who.arrived(task, cast, end, x, a)
        for who in wanting:
            who.sample(cast, end, x, a, halves[-1])

    def passed(k: int, x: Tensor, a: Tensor) -> None:
        duration = halves[k] + (halves[k - 1] if k else 0.0)
        for who in wanting:
            who.sample(
                cast, nodes[k][0].detach().to(x.dtype), split(x), split(a.detach()), duration
            )

    found.register_hook(arrived)
    for k, (_, x) in enumerate(nodes):
        x.register_hook(partial(passed, k, x.detach()))
    pieces = found.split([part.numel() for part in x0], dim=1)
    return tuple(p.reshape(len(t), *part.shape) for p, part in zip(pieces, x0, strict=True))


def _flattened(x0: Parts) -> tuple[Tensor, Split]:
    """The state as one tensor, and how to take it apart."""
    sizes = [part.numel() for part in x0]
    shapes = [part.shape for part in x0]

    def split(x: Tensor) -> Parts:
        return tuple(p.view(s) for p, s in zip(x.split(sizes), shapes, strict=True))

    return torch.cat([part.reshape(-1) for part in x0]), split


def _norm_of_parts(method: Method, split: Split) -> Method:
    """The error's norm that torchdiffeq takes for a tuple: the largest of its parts'."""
    given: Any = method.options.get("norm")

    def largest(x: Tensor) -> Tensor:
        # One of them, so that no gradient reaches the others: a root's slope at zero is infinite.
        return max(
            (p.square().mean().sqrt() for p in split(x)), key=lambda size: float(size.detach())
        )

    def norm(x: Tensor) -> Any:
        return given(split(x))

    return replace(method, options={**method.options, "norm": norm if given else largest})
