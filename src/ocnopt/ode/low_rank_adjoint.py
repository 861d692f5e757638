"""The second-order adjoint of a Neural ODE as columns (SNOpt, NeurIPS 2021).

Without running cost and with ``Phi_xx = sum_i y_i y_i^T``, i up to R, the five ODEs of
:mod:`ocnopt.ode.dense_adjoint` are solved at all times by

    Q_xx = sum_i q_i q_i^T      Q_xu = sum_i q_i p_i^T      Q_uu = sum_i p_i p_i^T

    -dq_i/dt = F_x^T q_i        q_i(t1) = y_i
    -dp_i/dt = F_u^T q_i        p_i(t1) = 0 .

With one column ``y = Phi_x`` q is the ordinary adjoint and p(t0) the gradient, hence
``Q_uu = g g^T`` of every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from ocnopt.errors import OptionError
from ocnopt.losses import hessian_factor
from ocnopt.ode.dense_adjoint import MAX_ENTRIES, Controls, Sweep
from ocnopt.ode.solve import Method

__all__ = [
    "AdjointError",
    "LowRank",
    "adjoint_errors",
    "gradient_column",
    "hessian_columns",
    "second_order_low_rank",
]

#: What counts as exact where errors are measured.
REFERENCE: Mapping[str, Any] = {"method": "dopri8", "rtol": 1e-12, "atol": 1e-12}

#: ``y_1 ... y_R`` as a function of the state at t1.
Columns: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LowRank:
    """Factors of Q_xx, Q_xu and Q_uu at t0: R columns, m states, n controls.

    A leading dimension B of samples is there where each has its own factors.

    Attributes:
        x1: The state at t1, shaped as the initial one.
        q: (B, R, m) or (R, m).
        p: (B, R, n) or (R, n); n in the order of ``named_parameters()``.
        drift: How far, at most, the state that was integrated back arrived from a state that the
            forward solution had there: a measure of the solver's error.
    """

    x1: Tensor
    q: Tensor
    p: Tensor
    drift: float

    @property
    def Q_xx(self) -> Tensor:
        """``sum_i q_i q_i^T``, (B, m, m) or (m, m)."""
        return self.q.mT @ self.q

    @property
    def Q_xu(self) -> Tensor:
        """``sum_i q_i p_i^T``, (B, m, n) or (m, n)."""
        return self.q.mT @ self.p

    @property
    def Q_uu(self) -> Tensor:
        """``sum_i p_i p_i^T``, (B, n, n) or (n, n); the batch's is the sum over its samples."""
        return self.p.mT @ self.p


def second_order_low_rank(
    func: nn.Module,
    x0: Tensor,
    columns: Tensor | Columns,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    per_sample: bool = True,
    method: str = "dopri5",
    rtol: float = 1e-8,
    atol: float = 1e-8,
    options: Mapping[str, Any] | None = None,
    checkpoints: int = 8,
    max_entries: int = MAX_ENTRIES,
) -> LowRank:
    """q_i and p_i at t0, backward beside the state; no matrix is built.

    Memory does not grow with the solver's steps, as in
    :func:`ocnopt.ode.dense_adjoint.second_order`.

    Args:
        func: The field, called as ``func(t, x)``; its parameters that require a gradient are u.
        x0: The initial state: samples first, or of any shape with ``per_sample=False``.
        columns: ``y_i``, the factor of every sample's own terminal Hessian, (B, R, *state), or a
            function of x1 that returns it: :func:`gradient_column`, :func:`hessian_columns`.
            With ``per_sample=False`` (R, *x0.shape).
        t0: Where x0 is.
        t1: Where the cost looks; it may lie before t0.
        per_sample: Whether every sample has its own q_i and p_i. The field must then treat
            samples independently. Otherwise x0 is one state.
        method: The solver, one of :data:`ocnopt.ode.solve.METHODS`.
        rtol: Its relative tolerance.
        atol: Its absolute tolerance.
        options: Further options of the solver, such as ``step_size``.
        checkpoints: States of the forward solution that are kept, at equal distances.
        max_entries: How many entries q and p may have together.

    Returns:
        The factors, in x0's dtype and without a graph.

    Raises:
        OptionError: Arguments that do not fit together, a field that mixes samples, or a problem
            that is too large.
        SolverError: The solver failed.
    """
    u = Controls(func)
    sweep = Sweep(u, x0, t0, t1, Method(method, rtol, atol, dict(options or {})), checkpoints)
    kept = sweep.forward()
    x1 = kept[-1]
    if not per_sample:
        kept = kept.unsqueeze(1)
    elif not x0.dim():
        raise OptionError("x0 has no dimension of samples; pass per_sample=False")
    batch, state = kept.shape[1], kept.shape[2:]
    y = _columns(columns, x1, per_sample)
    rank, n = y.shape[1], u.values.numel()
    entries = batch * rank * (state.numel() + n)
    if entries > max_entries:
        raise OptionError(
            f"q and p of {batch} samples, {rank} columns and {n} parameters have {entries} "
            f"entries, more than max_entries={max_entries}; try fewer samples at a time, one "
            "column (gradient_column), or fewer trained parameters"
        )

    def one(t: Tensor, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F, F_x^T q and F_u^T q of a sample."""

        def f(x: Tensor, values: Tensor) -> Tensor:
            return u(t, x.unsqueeze(0), values).squeeze(0) if per_sample else u(t, x, values)

        F, pull = vjp(f, x, u.values)  # type: ignore[misc]
        return (F, *vmap(pull)(q))

    every = vmap(one, in_dims=(None, 0, 0))

    def rates(t: Tensor, x: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = every(t, x, q)
        return found

    p1 = y.new_zeros(batch, rank, n)
    if per_sample:
        end = sweep.times[-1]
        with torch.no_grad():
            _check_independent(func(end, x1), rates(end, x1, y, p1)[0])
    (q, p), drift = sweep.backward(rates, kept, (y, p1))
    q = q.flatten(2)
    return LowRank(x1, *((q, p) if per_sample else (q[0], p[0])), drift)


def gradient_column(terminal: Callable[[Tensor], Tensor], *, per_sample: bool = True) -> Columns:
    """The one column ``y = Phi_x``; ``Q_uu = g g^T`` with the gradient g.

    Args:
        terminal: The cost of x1, as a number or one per sample. The gradients are its own: those of
            a mean over B samples are B times smaller than the samples'.
        per_sample: One column per sample; otherwise one for the whole state.

    Returns:
        A function of x1 that returns y, (B, 1, *state) or (1, *x1.shape).
    """

    def column(x1: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x1.detach().requires_grad_()
            (y,) = torch.autograd.grad(terminal(x).sum(), x)
        return y.unsqueeze(1 if per_sample else 0)

    return column


def hessian_columns(criterion: nn.Module, target: Tensor, head: nn.Module | None = None) -> Columns:
    """Columns of the Hessian of every sample's own cost ``criterion(head(x1), target)``.

    Exact where the head is affine and the criterion convex; otherwise the head's second derivatives
    and the Hessian's negative part are left out.

    Args:
        criterion: The loss, as :func:`ocnopt.losses.hessian_factor` takes it.
        target: What it is called with besides.
        head: From the state to the criterion's input, each sample for itself; without it that
            input is the state.

    Returns:
        A function of x1 (B, *state) that returns y (B, R, *state), R the outputs per sample. A mean
        over samples counts as in ``hessian_factor``: the cost is the sample's own, without 1/B.
    """

    @torch.no_grad()
    def columns(x1: Tensor) -> Tensor:
        output, pull = vjp(nn.Identity() if head is None else head, x1.detach())  # type: ignore[misc]
        z = hessian_factor(criterion, output, target).mT
        (y,) = vmap(pull, in_dims=1, out_dims=1)(z.reshape(*z.shape[:2], *output.shape[1:]))
        found: Tensor = y
        return found

    return columns


@dataclass(frozen=True)
class AdjointError:
    """Relative errors at t0, in the Euclidean norm over all samples.

    Attributes:
        first: Of the columns p; with :func:`gradient_column` they are the gradients.
        second: Of Q_uu.
    """

    first: float
    second: float


def adjoint_errors(
    func: nn.Module,
    x0: Tensor,
    columns: Tensor | Columns,
    solvers: Mapping[str, Mapping[str, Any]],
    *,
    reference: Mapping[str, Any] = REFERENCE,
    **options: Any,
) -> dict[str, AdjointError]:
    """What solvers and tolerances cost in accuracy (SNOpt, NeurIPS 2021, Table 1).

    Meant for float64.

    Args:
        func: The field, as for :func:`second_order_low_rank`.
        x0: The initial state.
        columns: ``y_i``, as there; a function sees x1 as each solver finds it.
        solvers: By the names of the table's rows, further arguments of
            :func:`second_order_low_rank`: method, rtol, atol, options, checkpoints. There are no
            checkpoints where none are asked for, as in training.
        reference: The same for what counts as exact. The default needs a smooth field: across the
            kinks of a ReLU, steps shrink without end; a fixed grid that is fine enough does not.
        options: Further arguments of all.

    Returns:
        The errors by the same names.

    Raises:
        OptionError: As :func:`second_order_low_rank`.
        SolverError: A solver failed.
    """
    true = second_order_low_rank(func, x0, columns, **{**options, **reference}).p
    size_first, size_second = true.norm(), (true @ true.mT).norm()
    found = {}
    for name, solver in solvers.items():
        settings = {"checkpoints": 0, **options, **solver}
        p = second_order_low_rank(func, x0, columns, **settings).p
        second = _distance(p, true) / size_second
        found[name] = AdjointError(float((p - true).norm() / size_first), float(second))
    return found


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """``|a^T a - b^T b|``, from products that are small where a and b are close: d^T b + a^T d."""
    d = a - b
    dd = d @ d.mT
    square = dd * (a @ a.mT + b @ b.mT) + 2 * (d @ a.mT) * (d @ b.mT).mT
    return square.sum().clamp_min(0).sqrt()


def _columns(columns: Tensor | Columns, x1: Tensor, per_sample: bool) -> Tensor:
    """y, (B, R, *state); B = 1 where x1 is one state."""
    y = columns if isinstance(columns, Tensor) else columns(x1)
    samples = x1.shape[:1] if per_sample else ()
    state = x1.shape[len(samples) :]
    at = len(samples)
    shaped = y.dim() == x1.dim() + 1 and y.shape[:at] == samples and y.shape[at + 1 :] == state
    if not (shaped and y.shape[at]):
        expected = ", ".join(map(str, (*samples, "R", *state)))
        raise OptionError(
            f"columns have the shape {tuple(y.shape)}, but for states of {tuple(x1.shape)} with "
            f"per_sample={per_sample} it must be ({expected})"
        )
    y = y.detach().to(x1)
    return y if per_sample else y.unsqueeze(0)


def _check_independent(together: Tensor, alone: Tensor) -> None:
    """Refuse a field whose samples depend on each other."""
    allowed = torch.finfo(alone.dtype).eps ** 0.5 * max(1.0, float(together.abs().max()))
    if not float((together - alone).abs().max()) <= allowed:
        raise OptionError(
            "func gives a sample another dx/dt in its batch than alone, so there are no factors "
            "per sample; use it in eval mode (batch statistics, dropout), or pass per_sample=False"
        )
