"""The one place where an initial value problem is solved, and where a solver's failure is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ocnopt.errors import OcnoptError, OptionError, SolverError

__all__ = ["ADAPTIVE", "METHODS", "Method", "State", "solve"]

#: A state: one tensor, or several that are integrated together.
State = TypeVar("State", Tensor, tuple[Tensor, ...])
#: Told of a step's beginning: time, state there, length.
OnStep: TypeAlias = Callable[[Tensor, Any, Tensor], None]

#: torchdiffeq's solvers with steps of their own choosing ...
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
#: ... and on a given grid.
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
METHODS = (*ADAPTIVE, *FIXED)


@dataclass(frozen=True)
class Method:
    """How to solve.

    Attributes:
        name: One of :data:`METHODS`.
        rtol: Relative tolerance of an adaptive solver.
        atol: Absolute tolerance.
        options: torchdiffeq's options of that solver, such as ``step_size`` or ``max_num_steps``.

    Raises:
        OptionError: An unknown solver, or a tolerance that cannot be.
    """

    name: str = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise OptionError(f"method={self.name!r} is no solver; choose one of {METHODS}")
        for option in ("rtol", "atol"):
            value = getattr(self, option)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value < math.inf):
                raise OptionError(f"{option}={value!r}, but it must be finite and at least 0")
        if self.adaptive and not (self.rtol or self.atol):
            raise OptionError("rtol and atol are both 0, which no step can meet; set one of them")

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.name in ADAPTIVE


def solve(
    func: Callable[[Tensor, State], State],
    y0: State,
    t: Tensor,
    method: Method,
    on_step: OnStep | None = None,
    where: str = "",
) -> State:
    """States at every time, by torchdiffeq.

    Args:
        func: ``func(t, y)`` returns dy/dt, shaped as y.
        y0: The state at ``t[0]``.
        t: Times (T,), increasing or decreasing.
        method: The solver.
        on_step: Told of every step that the solver keeps, at its beginning.
        where: What is being solved, for messages.

    Returns:
        Shaped as y0 with a leading dimension of length T.

    Raises:
        SolverError: The step size underflows, steps run out, or a value is not finite.
        OptionError: torchdiffeq refuses the problem.
    """
    odeint = _torchdiffeq()
    last: list[tuple[Tensor, Tensor]] = []

    class Watched:
        def __call__(self, t: Tensor, y: Any) -> Any:
            return func(t, y)

        def callback_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
            last[:] = [(t, dt)]
            if on_step is not None and not method.adaptive:
                on_step(t, y, dt)

    options = dict(method.options)
    if method.adaptive:
        # Else the last step goes beyond the end, and what an interpolant says there is the result:
        # an error that no tolerance controls.
        options.setdefault("step_t", t[1:].detach())
    watched = Watched()
    if on_step is not None and method.adaptive:
        watched.callback_accept_step = on_step  # type: ignore[attr-defined]
    try:
        found: State = odeint(
            watched,
            y0,
            t,
            rtol=method.rtol,
            atol=method.atol,
            method=method.name,
            options=options,
        )
    except AssertionError as error:
        problem = _PROBLEMS.get(str(error).partition(" ")[0])
        if problem is None:
            raise
        raise SolverError(_message(problem, method, last, where)) from error
    ends = (found,) if isinstance(found, Tensor) else found
    if not all(bool(torch.isfinite(part).all()) for part in ends):
        raise SolverError(_message(_NOT_FINITE, method, last, where))
    return found


_NOT_FINITE = (
    "reached a value that is not finite",
    "Bound the field (tanh, weight decay, smaller initial weights), scale the inputs, lower the "
    "learning rate, or skip this batch",
)
#: By the first word of what torchdiffeq asserts.
_PROBLEMS = {
    "underflow": (
        "needs steps smaller than the numbers can tell apart",
        "The field is too steep: bound it (tanh, weight decay), loosen rtol and atol, or use "
        "float64; a field with dropout, batch statistics or jumps is no ODE",
    ),
    "non-finite": _NOT_FINITE,
    "max_num_steps": (
        "ran out of steps",
        "Raise options['max_num_steps'], loosen rtol and atol, or bound the field",
    ),
}


def _message(
    problem: tuple[str, str], method: Method, last: list[tuple[Tensor, Tensor]], where: str
) -> str:
    what, advice = problem
    at = f" at t={float(last[0][0]):.6g} (step {float(last[0][1]):.2g})" if last else ""
    tolerances = f" with rtol={method.rtol:g}, atol={method.atol:g}" if method.adaptive else ""
    subject = f"{where}: " if where else ""
    return f"{subject}{method.name}{tolerances} {what}{at}. {advice}"


def _torchdiffeq() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise OcnoptError("Neural ODEs need torchdiffeq; pip install 'ocnopt[ode]'") from None
    found: Callable[..., Any] = odeint
    return found
