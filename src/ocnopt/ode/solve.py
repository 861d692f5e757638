"""The one place where an initial value problem is solved, and where a solver's failure is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from ocnopt.errors import OcnoptError, OptionError, SolverError
from ocnopt.finite import all_finite
from ocnopt.real import is_real

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
#: Steps of an adaptive solver from one time to the next, where ``options`` has no
#: ``max_num_steps``: a field that jumps is an error and not a program that never ends.
MAX_STEPS = 100_000


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
            if not (is_real(value) and 0 <= value < math.inf):
                raise OptionError(f"{option}={value!r}, but it must be finite and at least 0")
        step = self.options.get("step_size", 1.0)
        if not ((is_real(step) or isinstance(step, Tensor)) and 0 < float(step) < math.inf):
            raise OptionError(f"options: step_size={step!r}, but it must be finite and positive")
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
    options = dict(method.options)
    if method.adaptive:
        # Else the last step goes beyond the end, and what an interpolant says there is the result:
        # an error that no tolerance controls.
        options.setdefault("step_t", t[1:].detach())
        options.setdefault("max_num_steps", MAX_STEPS)
    watched = _Watched(func, on_step, method.adaptive)
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
        if not watched.finite:
            problem = _NOT_FINITE
        raise SolverError(_message(problem, method, watched, where)) from error
    ends = (found,) if isinstance(found, Tensor) else found
    if not all_finite(ends):
        raise SolverError(_message(_NOT_FINITE, method, watched, where))
    return found


class _Watched:
    """A field with what torchdiffeq tells of its steps.

    Args:
        func: The field.
        on_step: Told of every step that the solver keeps.
        adaptive: Whether the solver tries steps before it keeps them.
    """

    def __init__(
        self, func: Callable[[Tensor, Any], Any], on_step: OnStep | None, adaptive: bool
    ) -> None:
        self.func = func
        self.on_step = None if adaptive else on_step
        if adaptive and on_step is not None:
            self.callback_accept_step = on_step
        self.last: tuple[Tensor, Any, Tensor] | None = None

    def __call__(self, t: Tensor, y: Any) -> Any:
        return self.func(t, y)

    def callback_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        """A step begins."""
        self.last = t, y, dt
        if self.on_step is not None:
            self.on_step(t, y, dt)

    @property
    def finite(self) -> bool:
        """Whether the last step began with finite numbers; its length is 0 where it did not."""
        if self.last is None:
            return True
        _, y, dt = self.last
        parts = (y,) if isinstance(y, Tensor) else y
        return float(dt.detach()) != 0 and all_finite(parts)


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


def _message(problem: tuple[str, str], method: Method, watched: _Watched, where: str) -> str:
    what, advice = problem
    at = ""
    if watched.last is not None:
        t, dt = watched.last[0].detach(), watched.last[2].detach()
        at = f" at t={float(t):.6g} (step {float(dt):.2g})"
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
