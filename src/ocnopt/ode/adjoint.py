"""Gradients of a solve by the adjoint equation, with nothing kept of the solver's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ocnopt.finite import all_finite
from ocnopt.ode.listener import Field, Listener, Parts
from ocnopt.ode.sampling import Sampler, pull_back
from ocnopt.ode.solve import Method, solve

__all__ = ["Problem", "adjoint_solve"]


@dataclass(frozen=True)
class Problem:
    """What is solved, forward and backward.

    Attributes:
        field: ``field(t, x)``, counted by its owner.
        back: The same, counted as part of a backward pass.
        sampling: The same, counted as part of the statistics.
        params: What the field is differentiated with respect to.
        forward: The forward solver.
        backward: The backward solver.
        seminorm: Whether the backward solver's error leaves the parameters' gradient out (Kidger
            et al. 2021: it is an integral and feeds back into nothing).
        listeners: Returns who follows a backward pass.
        where: What it is called in messages.
    """

    field: Field
    back: Field
    sampling: Field
    params: Parts
    forward: Method
    backward: Method
    seminorm: bool
    listeners: Callable[[], list[Listener]]
    where: str


def adjoint_solve(problem: Problem, x0: Parts, t: Tensor) -> Parts:
    """States at every time, differentiable with respect to x0, t and the parameters.

    Args:
        problem: What is solved.
        x0: The state at ``t[0]``.
        t: Times (T,).

    Returns:
        Shaped as x0 with a leading dimension of length T.

    Raises:
        SolverError: Forward or backward.
    """
    out: Parts = _Adjoint.apply(problem, t, *x0, *problem.params)  # type: ignore[no-untyped-call]
    return out


class _Adjoint(torch.autograd.Function):
    """``-dQ_x/dt = F_x^T Q_x``, ``-dQ_u/dt = F_u^T Q_x`` (methods 4.2), one solve per interval."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, t: Tensor, *tensors: Tensor) -> Parts:
        x0 = tensors[: len(tensors) - len(problem.params)]
        found = solve(problem.field, x0, t, problem.forward, where=problem.where)
        ctx.problem = problem
        # The parameters only so that a change of them before the backward pass is noticed.
        ctx.save_for_backward(t, *found, *problem.params)
        ctx.count = len(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        count: int = ctx.count
        t, *states = ctx.saved_tensors[: 1 + count]
        if not all_finite(grads):
            # Passed on, as any layer does: a loss scaler skips such a step, an optimizer names it.
            inputs = (t, *(s[0] for s in states), *problem.params)
            return (None, *(torch.full_like(x, torch.nan) for x in inputs))
        listeners = problem.listeners()
        task = torch._C._current_graph_task_id()
        last = tuple(s[-1] for s in states)
        a = tuple(g[-1].clone() for g in grads)
        for listener in listeners:
            listener.arrived(task, problem.sampling, t[-1], last, a)
        sampling = [(x, x.sample_step) for x in listeners]
        wanted = t.requires_grad and ctx.needs_input_grad[1]
        time_grads = torch.zeros_like(t) if wanted else None
        gathered = tuple(torch.zeros_like(p) for p in problem.params)
        for i in range(len(t) - 1, 0, -1):
            if time_grads is not None:
                at_end = tuple(s[i] for s in states)
                time_grads[i] = _slope(problem, t[i], at_end, tuple(g[i] for g in grads))
            samplers = [
                Sampler(problem.sampling, float(t[i - 1]), float(t[i]), [who], step)
                for who, step in sampling
                if step is not None
            ]

            def on_step(t: Tensor, state: Any, dt: Tensor, samplers: Any = samplers) -> None:
                for sampler in samplers:
                    sampler.node(t, tuple(state[:count]), tuple(state[count : 2 * count]))

            found = solve(
                _Augmented(problem, count),
                (*(s[i] for s in states), *a, *gathered),
                t[i - 1 : i + 1].flip(0),
                _norm(problem, count),
                on_step if samplers else None,
                where=f"the adjoint of {problem.where}",
            )
            x, a, gathered = (
                tuple(part[-1] for part in found[k])
                for k in (slice(count), slice(count, 2 * count), slice(2 * count, None))
            )
            for sampler in samplers:
                sampler.node(t[i - 1], x, a)
            if time_grads is not None and i == 1:
                start = tuple(s[0] for s in states)
                time_grads[0] -= _slope(problem, t[0], start, a)
            a = tuple(part + g[i - 1] for part, g in zip(a, grads, strict=True))
        return (None, time_grads, *a, *gathered)


class _Augmented:
    """State, adjoint and gradient, each by its own equation."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.problem = problem
        self.count = count

    def __call__(self, t: Tensor, state: Sequence[Tensor]) -> Parts:
        with torch.enable_grad():
            x = tuple(part.detach().requires_grad_() for part in state[: self.count])
            outputs = self.problem.back(t.detach(), x)
            against = tuple(-part for part in state[self.count : 2 * self.count])
            grads = pull_back(outputs, (*x, *self.problem.params), against)
        return (*(f.detach() for f in outputs), *grads)


def _slope(problem: Problem, t: Tensor, x: Parts, a: Parts) -> Tensor:
    """``a^T F(t, x)``."""
    value = problem.back(t, x)
    return torch.stack([(f * part).sum() for f, part in zip(value, a, strict=True)]).sum()


def _norm(problem: Problem, count: int) -> Method:
    """The backward solver with the norm of its error."""
    method = problem.backward
    if not (problem.seminorm and method.adaptive):
        return method

    def norm(state: Parts) -> Tensor:
        return torch.stack([p.square().mean().sqrt() for p in state[: 2 * count]]).max()

    return replace(method, options={**method.options, "norm": norm})
