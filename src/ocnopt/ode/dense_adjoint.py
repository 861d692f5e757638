"""The second-order adjoint of a Neural ODE, as matrices (SNOpt, NeurIPS 2021).

``dx/dt = F(t, x, u)`` with controls ``u`` that do not change in time, and the cost to go

    Q(t, x, u) = Phi(x(t1)) + int_t^t1 l(tau, x, u) dtau .

Its derivatives along the solution obey, with the second derivatives of F left out,

    -dQ_x /dt = l_x  + F_x^T Q_x                    Q_x (t1) = Phi_x
    -dQ_u /dt = l_u  + F_u^T Q_x                    Q_u (t1) = 0
    -dQ_xx/dt = l_xx + F_x^T Q_xx + Q_xx F_x        Q_xx(t1) = Phi_xx
    -dQ_xu/dt = l_xu + F_x^T Q_xu + Q_xx F_u        Q_xu(t1) = 0
    -dQ_uu/dt = l_uu + F_u^T Q_xu + Q_xu^T F_u      Q_uu(t1) = 0 ,

so that ``Q_u(t0)`` is the gradient and, without l, ``Q_uu(t0) = J^T Phi_xx J`` with
``J = dx(t1)/du``: the Gauss-Newton matrix, which is the Hessian where F is affine in x and u.

For more than small problems see :mod:`ocnopt.ode.low_rank_adjoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from ocnopt.errors import OptionError
from ocnopt.ode.solve import Method, solve
from ocnopt.real import is_scalar

__all__ = ["MAX_ENTRIES", "Controls", "SecondOrder", "Sweep", "second_order"]

#: How many numbers the costates may have together. The solver keeps some ten copies of them:
#: about 300 MB in float64.
MAX_ENTRIES = 2**22

Terminal: TypeAlias = Callable[[Tensor], Tensor]
Running: TypeAlias = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
Rates: TypeAlias = Callable[..., Sequence[Tensor]]
Field: TypeAlias = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class SecondOrder:
    """Derivatives of the cost in the initial state and the controls; m states, n controls.

    Attributes:
        x1: The state at t1, shaped as the initial one.
        Q_x: (m,), the gradient in the initial state.
        Q_u: (n,), the gradient in the trained parameters, in the order of ``named_parameters()``.
        Q_xx: (m, m).
        Q_xu: (m, n).
        Q_uu: (n, n).
        drift: How far, at most, the state that was integrated back arrived from a state that the
            forward solution had there: a measure of the solver's error.
    """

    x1: Tensor
    Q_x: Tensor
    Q_u: Tensor
    Q_xx: Tensor
    Q_xu: Tensor
    Q_uu: Tensor
    drift: float


def second_order(
    func: nn.Module,
    x0: Tensor,
    terminal: Terminal,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    running: Running | None = None,
    method: str = "dopri5",
    rtol: float = 1e-8,
    atol: float = 1e-8,
    options: Mapping[str, Any] | None = None,
    checkpoints: int = 8,
    max_entries: int = MAX_ENTRIES,
) -> SecondOrder:
    """Q_x, Q_u, Q_xx, Q_xu and Q_uu at t0, from all five ODEs backward beside the state.

    Memory does not grow with the solver's steps: the state is integrated back too, and begins anew
    from the forward solution at ``checkpoints`` times, as what contracts forward explodes backward.

    Args:
        func: The field, called as ``func(t, x)``; its parameters that require a gradient are u.
        x0: The initial state, of any shape; a batch is one state of all its samples.
        terminal: ``Phi(x1)``, a number; twice differentiable.
        t0: Where x0 is.
        t1: Where the cost looks; it may lie before t0.
        running: ``l(t, x, u)``, a number, with u the trained parameters by their names in func.
        method: The solver, one of :data:`ocnopt.ode.solve.METHODS`.
        rtol: Its relative tolerance.
        atol: Its absolute tolerance.
        options: Further options of the solver, such as ``step_size``.
        checkpoints: States of the forward solution that are kept, at equal distances.
        max_entries: How many entries all matrices may have together.

    Returns:
        The derivatives, in x0's dtype and without a graph. Q_xx and Q_uu are exactly symmetric.

    Raises:
        OptionError: Arguments that do not fit together, or a problem that is too large.
        SolverError: The solver failed.

    Example:
        >>> import torch
        >>> class Growth(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.u = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        ...     def forward(self, t, x):
        ...         return self.u * x
        >>> x0 = torch.tensor([3.0], dtype=torch.float64)
        >>> found = second_order(Growth(), x0, lambda x1: x1.square().sum() / 2)
        >>> round(float(found.Q_uu), 6)  # (dx1/du)^2, where x1 = exp(u) x0
        9.0
    """
    u = Controls(func)
    sweep = Sweep(u, x0, t0, t1, Method(method, rtol, atol, dict(options or {})), checkpoints)
    m, n = x0.numel(), u.values.numel()
    entries = m + n + m * m + m * n + n * n
    if entries > max_entries:
        raise OptionError(
            f"Q_xx, Q_xu and Q_uu of {m} states and {n} parameters have {entries} entries, more "
            f"than max_entries={max_entries}; try second_order_low_rank, which needs a row of "
            "n per column of the terminal Hessian, or fewer samples or trained parameters"
        )
    kept = sweep.forward()
    shape = x0.shape
    x1 = kept[-1].reshape(-1)

    def phi(x: Tensor) -> Tensor:
        return _number("terminal", terminal(x.reshape(shape)))

    def rates(
        t: Tensor, x: Tensor, Q_x: Tensor, Q_u: Tensor, Q_xx: Tensor, Q_xu: Tensor, Q_uu: Tensor
    ) -> list[Tensor]:
        def f(x: Tensor, u_: Tensor) -> tuple[Tensor, Tensor]:
            out = u(t, x.reshape(shape), u_).reshape(-1)
            return out, out

        (F_x, F_u), F = jacrev(f, argnums=(0, 1), has_aux=True)(x, u.values)
        xx, uu = F_x.T @ Q_xx, F_u.T @ Q_xu
        found = [F_x.T @ Q_x, F_u.T @ Q_x, xx + xx.T, F_x.T @ Q_xu + Q_xx @ F_u, uu + uu.T]
        if running is not None:
            found = [a + b for a, b in zip(found, _running(running, u, t, x, shape), strict=True)]
        return [F, *found]

    Phi_x, Phi_xx = grad(phi)(x1), _symmetric(jacrev(grad(phi))(x1))
    empty = x0.new_zeros
    end = (Phi_x, empty(n), Phi_xx, empty(m, n), empty(n, n))
    (Q_x, Q_u, Q_xx, Q_xu, Q_uu), drift = sweep.backward(rates, kept.flatten(1), end)
    return SecondOrder(kept[-1], Q_x, Q_u, Q_xx, Q_xu, Q_uu, drift)


class Controls:
    """A field whose trained parameters are one row ``u``.

    Args:
        func: The field, called as ``func(t, x)``.

    Attributes:
        values: What they are now, (n,).

    Raises:
        OptionError: No module, or nothing to train.
    """

    def __init__(self, func: nn.Module) -> None:
        if not isinstance(func, nn.Module):
            raise OptionError(
                f"func: expected an nn.Module called as func(t, x), got {type(func).__name__}; "
                "its parameters are the controls"
            )
        trained = {k: p for k, p in func.named_parameters() if p.requires_grad}
        if not trained:
            raise OptionError(
                f"func: {type(func).__name__} has no parameter that requires a gradient, so there "
                "is nothing to differentiate in; check requires_grad"
            )
        self.func = func
        self._shapes = {k: p.shape for k, p in trained.items()}
        self.values = torch.cat([p.detach().reshape(-1) for p in trained.values()])

    def named(self, u: Tensor) -> dict[str, Tensor]:
        """A row as parameters by name."""
        pieces = u.split([shape.numel() for shape in self._shapes.values()])
        return {
            k: piece.view(shape)
            for (k, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def __call__(self, t: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """F(t, x, u), shaped as x."""
        found: Tensor = functional_call(self.func, self.named(u), (t, x))
        return found


@dataclass(frozen=True)
class Sweep:
    """The state forward, and costates backward beside it.

    Attributes:
        controls: The field.
        x0: The initial state.
        t0: Where it is.
        t1: Where the costates begin.
        method: The solver.
        checkpoints: How many states between t0 and t1 are kept.

    Raises:
        OptionError: Times, states or numbers that cannot be.
    """

    controls: Controls
    x0: Tensor
    t0: float
    t1: float
    method: Method
    checkpoints: int

    def __post_init__(self) -> None:
        if not (isinstance(self.x0, Tensor) and self.x0.is_floating_point() and self.x0.numel()):
            raise OptionError("x0: expected a tensor of floating point numbers, not an empty one")
        for name in ("t0", "t1"):
            value = getattr(self, name)
            if not (is_scalar(value) and math.isfinite(value)):
                raise OptionError(f"{name}={value!r}, but it must be a finite number")
        if self.t0 == self.t1:
            raise OptionError(f"t0 and t1 are both {self.t0}: there is nothing to integrate")
        count = self.checkpoints
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise OptionError(f"checkpoints={count!r}, but it must be a whole number, 0 or more")

    @property
    def times(self) -> Tensor:
        """t0, the checkpoints and t1."""
        x0, count = self.x0, self.checkpoints + 2
        ends = float(self.t0), float(self.t1)
        return torch.linspace(*ends, count, dtype=x0.dtype, device=x0.device)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The states at those times, (checkpoints + 2, *state)."""
        func, kept, times = self.controls.func, [self.x0.detach()], self.times
        rate = func(times[0], kept[0])
        if rate.shape != self.x0.shape:
            raise OptionError(
                f"func returns the shape {tuple(rate.shape)} for a state of "
                f"{tuple(self.x0.shape)}; dx/dt must be shaped as x"
            )
        for leg in times.unfold(0, 2, 1):
            kept += self._end(lambda t, y: (func(t, y[0]),), (kept[-1],), leg, "the state")
        return torch.stack(kept)

    @torch.no_grad()
    def backward(
        self, rates: Rates, kept: Tensor, costates: Sequence[Tensor]
    ) -> tuple[list[Tensor], float]:
        """Costates at t0.

        Args:
            rates: ``rates(t, x, *costates)``: F, and ``-d/dt`` of every costate.
            kept: What :meth:`forward` found, in the shape in which ``rates`` takes states.
            costates: Their values at t1.

        Returns:
            Their values at t0, and the largest entry of the difference between a state that was
            integrated back and the one that was kept.
        """

        def reverse(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            F, *minus = rates(t, *y)
            return (F, *(-rate for rate in minus))

        found, drift = list(costates), 0.0
        backward = self.times.flip(0).unfold(0, 2, 1)
        kept = kept.flip(0)
        for leg, x, arrival in zip(backward, kept[:-1], kept[1:], strict=True):
            x, *found = self._end(reverse, (x, *found), leg, "the second-order adjoint")
            drift = max(drift, float((x - arrival).abs().max()))
        return found, drift

    def _end(self, field: Field, y: tuple[Tensor, ...], leg: Tensor, where: str) -> list[Tensor]:
        """The states at the end of a leg."""
        return [part[-1] for part in solve(field, y, leg, self.method, where=where)]


def _running(
    running: Running, u: Controls, t: Tensor, x: Tensor, shape: torch.Size
) -> list[Tensor]:
    """l_x, l_u, l_xx, l_xu and l_uu."""
    m = x.numel()

    def cost(z: Tensor) -> Tensor:
        return _number("running", running(t, z[:m].reshape(shape), u.named(z[m:])))

    z = torch.cat([x, u.values])
    first, second = grad(cost)(z), _symmetric(jacrev(grad(cost))(z))
    return [first[:m], first[m:], second[:m, :m], second[:m, m:], second[m:, m:]]


def _number(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise OptionError(
            f"{name} must return one number for the whole state, but returned {shape}; sum or "
            "average over samples"
        )
    return value.reshape(())


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
