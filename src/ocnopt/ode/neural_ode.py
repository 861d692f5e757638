"""A layer whose output is the solution of a differential equation."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.control.players import Solver
from ocnopt.errors import OptionError
from ocnopt.ode.adjoint import Problem, adjoint_solve
from ocnopt.ode.listener import Field, Listener, Parts
from ocnopt.ode.solve import Method, solve
from ocnopt.ode.unrolled import unrolled_solve
from ocnopt.ode.warped import Warped, solve_warped
from ocnopt.real import is_scalar

__all__ = ["Evaluations", "NeuralODE"]


class Evaluations(NamedTuple):
    """How often a field was evaluated.

    Attributes:
        forward: By forward solves.
        backward: By backward solves of the adjoint.
        sampling: For the statistics of an optimizer.
    """

    forward: int
    backward: int
    sampling: int


class NeuralODE(Solver):
    """``x(t1)`` where ``dx/dt = F(t, x)`` and ``x(t0)`` is the input (Chen et al. 2018).

    Solved by torchdiffeq. The gradient comes from the adjoint equation, which keeps nothing of the
    solver's steps, or (``adjoint=False``) from back-propagation through them.

    Args:
        func: F, any module called as ``func(t, x)``: t is a number (0-dimensional), x a tensor
            (B, ...) or a tuple of such; returns dx/dt, shaped as x. Only what is in ``x`` and in
            the parameters of ``func`` is differentiated.
        t0: Time of the input; a buffer.
        t1: Time of the output, before or after t0; a buffer, so that it may be trained.
        method: A solver of torchdiffeq: "dopri5", "dopri8", "bosh3", "fehlberg2" and
            "adaptive_heun" choose their steps by rtol and atol; "euler", "midpoint", "heun2",
            "heun3", "rk4", "explicit_adams" and "implicit_adams" take one step per interval
            between two times, or those of ``options={"step_size": ...}``.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
        adjoint: Whether gradients come from the adjoint equation.
        options: torchdiffeq's further options of the solver, for both directions.
        adjoint_rtol: Relative tolerance of the backward solve; None for the forward one's.
        adjoint_atol: Likewise.
        seminorm: Whether the backward solve's steps are chosen without regard to the parameters'
            gradient (Kidger et al. 2021), which needs fewer.

    Raises:
        OptionError: An option that cannot be; a field that is no function of (t, x).

    Example::

        model = nn.Sequential(encoder, NeuralODE(func), head)
    """

    def __init__(
        self,
        func: nn.Module,
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        method: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-3,
        adjoint: bool = True,
        options: Mapping[str, Any] | None = None,
        adjoint_rtol: float | None = None,
        adjoint_atol: float | None = None,
        seminorm: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(func, nn.Module):
            raise OptionError(
                f"func: expected an nn.Module that is called as func(t, x), got "
                f"{type(func).__name__}; wrap a function in a module with that forward"
            )
        for name, value in (("t0", t0), ("t1", t1)):
            if not (is_scalar(value) and math.isfinite(value)):
                raise OptionError(f"{name}={value!r}, but it must be a finite number")
        if float(t0) == float(t1):
            raise OptionError(f"t0 and t1 are both {float(t0):g}; nothing would be solved")
        self.func = func
        self.adjoint = adjoint
        self.seminorm = seminorm
        self.method = Method(method, rtol, atol, dict(options or {}))
        self.adjoint_method = replace(
            self.method,
            rtol=rtol if adjoint_rtol is None else adjoint_rtol,
            atol=atol if adjoint_atol is None else adjoint_atol,
            options={k: v for k, v in self.method.options.items() if k != "norm"},
        )
        self._given = {"t0": float(t0), "t1": float(t1)}
        for name, time in self._given.items():
            self.register_buffer(name, torch.tensor(time))
        self.t0: Tensor
        self.t1: Tensor
        self._counts = [0, 0, 0]
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        if adjoint:
            self._require_function()

    def forward(self, x: Any, t: Tensor | None = None) -> Any:
        """Solve.

        Args:
            x: The state at the first time: a tensor (B, ...), or a tuple of such.
            t: None for ``[t0, t1]`` and the last state alone; or times (T,), increasing or
                decreasing; or times of every sample (T, B), for which F is called with t (B,).

        Returns:
            The state at t1, shaped as x; or the states at every time, (T, ...) in front. Of an
            empty batch an empty one.

        Raises:
            SolverError: The solver fails; it says how and what to try.
            OptionError: Times or states that cannot be.
        """
        single = isinstance(x, Tensor)
        parts = _checked((x,) if isinstance(x, Tensor) else tuple(x))
        like = parts[0]
        real = like.dtype if like.dtype == torch.float64 else torch.float32
        if t is None:
            times = torch.stack([self.t0, self.t1]).to(like.device, real)
            states = self._solve(single, self.func, parts, times)
            # Not a view, so that what comes next may work in place.
            found = tuple(part[-1].clone() for part in states)
        else:
            times = torch.as_tensor(t).to(like.device, real)
            _require_times(times, like)
            if times.dim() == 2:
                found = solve_warped(partial(self._solve, single), self.func, parts, times)
            else:
                found = self._solve(single, self.func, parts, times)
        return found[0] if single else found

    def _solve(self, single: bool, field: nn.Module, x: Parts, t: Tensor) -> Parts:
        """States at every time.

        Args:
            single: Whether the field takes a tensor rather than a tuple of such.
            field: F, or F in another time.
            x: The state at ``t[0]``.
            t: Times (T,).
        """
        where = f"NeuralODE of {type(self.func).__name__}"
        tensors = _Tensors(field)
        forward, backward, sampling = (
            _Counted(field, tensors, single, self._counts, place) for place in range(3)
        )
        if not any(part.numel() for part in x):
            return _nothing(forward, x, t)
        method, back = (_for_parts(m, single) for m in (self.method, self.adjoint_method))
        if not torch.is_grad_enabled():
            return solve(forward, x, t, method, where=where)
        if not self.adjoint:
            return unrolled_solve(
                forward, sampling, x, t, method, self._heard(single, field), where
            )
        problem = Problem(
            forward,
            backward,
            sampling,
            tuple(p for p in field.parameters() if p.requires_grad),
            method,
            back,
            self.seminorm,
            partial(self._heard, single, field),
            where,
        )
        return adjoint_solve(problem, x, t)

    # who follows

    def follow(self, listener: Listener) -> None:
        """Tell a listener of every backward pass, for as long as it lives; copies are not told."""
        self._listeners.add(listener)

    def unfollow(self, listener: Listener) -> None:
        """Tell it no longer."""
        self._listeners.discard(listener)

    def _heard(self, single: bool, field: nn.Module) -> list[Listener]:
        """Who is told of a solve of that field."""
        listeners = list(self._listeners)
        if not isinstance(field, Warped):
            return listeners
        counted = _Counted(self.func, _Tensors(self.func), single, self._counts, 2)
        return field.heard_by(listeners, counted)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listeners": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_listeners": weakref.WeakSet()})  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeuralODE:
        """Move or cast; times are as given in double precision, and not rounded to half."""
        before = {name: self._buffers.get(name) for name in ("t0", "t1")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            now = self._buffers.get(name)
            if kept is None or now is None:
                continue
            if now.dtype.itemsize < 4:
                self._buffers[name] = kept.to(now.device)
            elif now.dtype.itemsize > kept.dtype.itemsize and self._is_given(name, kept):
                self._buffers[name] = torch.full_like(now, self._given[name])
        return self

    def _is_given(self, name: str, time: Tensor) -> bool:
        """Whether a time is the constructor's, rounded to its own precision."""
        given = vars(self).get("_given", {}).get(name)  # pickles of before have none
        return given is not None and not time.is_meta and bool(time == time.new_tensor(given))

    # counts

    @property
    def evaluations(self) -> Evaluations:
        """How often the field was evaluated since :meth:`reset_evaluations`."""
        return Evaluations(*self._counts)

    def reset_evaluations(self) -> None:
        """Count from zero again."""
        self._counts[:] = [0, 0, 0]

    # what is refused

    def _require_function(self) -> None:
        for name, module in self.func.named_modules():
            if _random(module) or _running(module):
                raise OptionError(
                    f"func: layer {name!r} is a {type(module).__name__}, so that func is no "
                    "function of (t, x) and its adjoint is wrong; put it outside, use GroupNorm "
                    "or LayerNorm, or take adjoint=False with a fixed-step solver"
                )

    def extra_repr(self) -> str:
        """Times and solver."""
        solver = f"method={self.method.name!r}"
        if self.method.adaptive:
            solver += f", rtol={self.method.rtol:g}, atol={self.method.atol:g}"
        return f"t0={float(self.t0):g}, t1={float(self.t1):g}, {solver}, adjoint={self.adjoint}"


def _random(module: nn.Module) -> bool:
    """Whether two calls on the same input differ."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RReLU) or (
        isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    )


def _running(module: nn.Module) -> bool:
    """Whether a call leaves statistics behind."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats


class _Tensors:
    """What a field computed with when it was solved.

    ``torch.func.functional_call`` lends it others for one call of the model, and takes them back
    before the backward pass.

    Args:
        field: F.
    """

    def __init__(self, field: nn.Module) -> None:
        self._slots = [
            (store, key, f"{name}.{key}" if name else key, tensor)
            for name, module in field.named_modules()
            for store in (module._parameters, module._buffers)
            for key, tensor in store.items()
            if tensor is not None
        ]

    @property
    def in_place(self) -> bool:
        """Whether the field has them still."""
        return all(store.get(key) is tensor for store, key, _, tensor in self._slots)

    @property
    def by_name(self) -> dict[str, Tensor]:
        """They, for ``functional_call``."""
        return {name: tensor for _, _, name, tensor in self._slots}


class _Counted:
    """A field on a tuple of tensors that counts its evaluations."""

    def __init__(
        self, field: nn.Module, tensors: _Tensors, single: bool, counts: list[int], place: int
    ) -> None:
        self.field = field
        self.tensors = tensors
        self.single = single
        self.counts = counts
        self.place = place

    def __call__(self, t: Tensor, x: Parts) -> Parts:
        self.counts[self.place] += 1
        state = x[0] if self.single else x
        if self.tensors.in_place:
            value = self.field(t, state)
        else:
            value = torch.func.functional_call(self.field, self.tensors.by_name, (t, state))
        found = (value,) if isinstance(value, Tensor) else tuple(value)
        if [f.shape for f in found] != [part.shape for part in x]:
            shapes = [tuple(f.shape) for f in found], [tuple(part.shape) for part in x]
            raise OptionError(
                f"func: {type(self.field).__name__} returned {shapes[0]} for a state of "
                f"{shapes[1]}; dx/dt must be shaped as x"
            )
        return found


def _nothing(field: Field, x: Parts, t: Tensor) -> Parts:
    """States of no samples at every time: a solver cannot measure them.

    The field is evaluated all the same, so that its weights have gradients (of zero), as those of
    any layer on an empty batch.
    """
    slopes = field(t[0], x)
    return tuple(
        torch.stack([part + (time - t[0]) * f.to(part.dtype) for time in t])
        for part, f in zip(x, slopes, strict=True)
    )


def _for_parts(method: Method, single: bool) -> Method:
    """The user's norm of a tensor as one of a tuple of one."""
    norm = method.options.get("norm")
    if norm is None or not single:
        return method
    return replace(method, options={**method.options, "norm": lambda parts: norm(parts[0])})


def _checked(x: Parts) -> Parts:
    if not x or not all(isinstance(part, Tensor) for part in x):
        raise OptionError("x: expected a tensor or a tuple of tensors")
    if not all(part.is_floating_point() for part in x):
        raise OptionError(f"x: expected floating-point numbers, got {x[0].dtype}")
    return x


def _require_times(t: Tensor, like: Tensor) -> None:
    if t.dim() not in (1, 2) or len(t) < 2:
        raise OptionError(f"t: expected at least two times (T,) or (T, B), got {tuple(t.shape)}")
    if t.dim() == 2 and t.shape[1] != len(like):
        raise OptionError(
            f"t: {tuple(t.shape)} holds times of {t.shape[1]} samples, but the state has "
            f"{len(like)}"
        )
    steps = t.detach().diff(dim=0)
    if not (bool((steps > 0).all()) or bool((steps < 0).all()) or t.dim() == 2):
        raise OptionError("t: times must be increasing or decreasing, no two of them equal")
