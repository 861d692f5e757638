"""The time up to which a Neural ODE is solved, optimized along with its weights (methods 4.8)."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.control.hooks import GradHook
from ocnopt.control.sampled import sample_of, thrown_away
from ocnopt.errors import NonFiniteError, OptionError
from ocnopt.ode.listener import Field, Parts
from ocnopt.ode.neural_ode import NeuralODE
from ocnopt.optim.parallel import mean_over, processes
from ocnopt.real import is_scalar

__all__ = ["Change", "IntegrationTime"]

RULES = ("feedback", "first-order")
CURVATURES = ("sample", "batch")


class Change(NamedTuple):
    """One change of the integration time.

    Attributes:
        time: t1 afterwards.
        open_loop: The part that answers the cost's derivative.
        feedback: The part that answers the change of the weights.
        Q_T: Derivative of loss plus penalty with respect to t1, averaged.
        Q_TT: Its curvature, averaged; 1 for the first-order rule.
    """

    time: float
    open_loop: float
    feedback: float
    Q_T: float
    Q_TT: float


class IntegrationTime:
    """Optimizes ``t1`` of a Neural ODE for the loss plus ``penalty / 2 * (t1 - t0)^2``.

    With ``s = Phi_x^T F(t1, x(t1))``, the loss's derivative with respect to t1, and c the penalty,

        Q_T  = c (t1 - t0) + s,    Q_TT = c + E[s^2],    Q_Tu = s Q_u   (Gauss-Newton, rank one)
        t1 <- t1 - lr / Q_TT * (Q_T + Q_Tu^T dtheta)

    where ``dtheta`` is what the optimizer has just done to the weights: t1 answers it. A shorter
    time means fewer evaluations of the field. In the ordinary loop::

        horizon = IntegrationTime(model.ode, optimizer, penalty=1e-3)
        ...
        loss.backward()
        optimizer.step()
        horizon.step()

    Call :meth:`step` once per iteration. Losses are to reach ``backward`` unscaled.

    Args:
        ode: The block; its t1 must lie behind its t0.
        optimizer: The optimizer of its weights; the first-order rule does without.
        lr: Learning rate of the time, a pure number for "feedback" (a share of the Newton step),
            in units of time^2 per loss for "first-order".
        penalty: c, in units of the (mean) loss per time^2.
        rule: "feedback", or "first-order": ``t1 <- t1 - lr * Q_T``.
        every: Iterations between two changes of the time.
        minimum: Least ``t1 - t0``.
        decay: Smoothing of s and of its square over iterations, corrected for its start.
        curvature: "sample": ``E[s^2]`` over samples; "batch": the square of the batch's s, which
            vanishes with it.
        reduction: Whether the loss is the "mean" or the "sum" over samples.

    Raises:
        OptionError: An option out of range.
    """

    def __init__(
        self,
        ode: NeuralODE,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        lr: float = 0.1,
        penalty: float = 1e-3,
        rule: str = "feedback",
        every: int = 50,
        minimum: float = 0.1,
        decay: float = 0.99,
        curvature: str = "sample",
        reduction: str = "mean",
    ) -> None:
        if not isinstance(ode, NeuralODE):
            raise OptionError(
                f"ode: expected an ocnopt.ode.NeuralODE, got {type(ode).__name__}; pass the block "
                "rather than the model"
            )
        for name, value, choices in (
            ("rule", rule, RULES),
            ("curvature", curvature, CURVATURES),
            ("reduction", reduction, ("mean", "sum")),
        ):
            if value not in choices:
                raise OptionError(f"{name}={value!r} is not known; choose one of {choices}")
        for name, number, ok, wanted in (
            ("lr", lr, lambda x: 0 < x < math.inf, "finite and positive"),
            ("penalty", penalty, lambda x: 0 <= x < math.inf, "finite and at least 0"),
            ("every", every, lambda x: isinstance(x, int) and x >= 1, "a whole number above 0"),
            ("minimum", minimum, lambda x: 0 < x < math.inf, "finite and positive"),
            ("decay", decay, lambda x: 0 <= x < 1, "in [0, 1)"),
        ):
            if not (is_scalar(number) and ok(number)):
                raise OptionError(f"{name}={number!r}, but it must be {wanted}")
        if rule == "feedback" and optimizer is None:
            raise OptionError(
                "rule='feedback' answers what the optimizer does to the weights; pass it as the "
                "second argument, or take rule='first-order'"
            )
        if float(ode.t1) - float(ode.t0) < minimum:
            raise OptionError(
                f"t1 - t0 is {float(ode.t1) - float(ode.t0):g}, less than minimum={minimum:g}"
            )
        self.ode = ode
        self.lr = lr
        self.penalty = penalty
        self.rule = rule
        self.every = every
        self.minimum = minimum
        self.decay = decay
        self.curvature = curvature
        self.reduction = reduction
        self.last: Change | None = None
        self._iteration = 0
        self._weight = 0.0  # of what the averages have seen
        self._s = 0.0
        self._curve = 0.0
        #: Per backward pass: sums of s and of its square, and samples, of every solve.
        self._passes: dict[int, list[tuple[Tensor, Tensor, int]]] = {}
        self._counted: set[int] = set()
        self._samples: dict[Tensor, Tensor] = {}  # of the weights' gradients, as accumulated
        self._hooked: set[Tensor] = set()
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)
        self.active = True  # its hooks ask
        self._before: list[tuple[Tensor, Tensor]] | None = None
        self._hook = None if optimizer is None else optimizer.register_step_pre_hook(self._keep)
        ode.follow(self)

    def remove(self) -> None:
        """Follow block and optimizer no longer."""
        self.ode.unfollow(self)
        _remove(self._handles)
        self._hooked.clear()
        if self._hook is not None:
            self._hook.remove()

    # as a listener of the block

    @property
    def sample_step(self) -> None:
        """Nothing along the adjoint is wanted."""
        return None

    def arrived(self, task: int, field: Field, end: Tensor, x: Parts, gradient: Parts) -> None:
        """Take ``Phi_x^T F`` of every sample, from a solve that ended at t1."""
        if end.dim() or abs(float(end) - float(self.ode.t1)) > 1e-6 * abs(float(self.ode.t1)):
            return
        with torch.no_grad():
            slopes = field(end, x)
            rows = x[0].shape[0] if x[0].dim() else 1
            s = torch.stack(
                [
                    (f * a).reshape(rows, -1).sum(1).double()
                    for f, a in zip(slopes, gradient, strict=True)
                ]
            ).sum(0)
        self._begin(task)
        self._passes[task].append((s.sum(), s.square().sum(), rows))

    def _begin(self, task: int) -> None:
        """A backward pass: what earlier ones brought counts where weights have their gradients."""
        if task in self._passes:
            return
        trained = [p for p in self.ode.func.parameters() if p.requires_grad]
        for p in trained:
            if p not in self._hooked and p.is_leaf:
                self._hooked.add(p)
                self._handles.append(p.register_post_accumulate_grad_hook(GradHook(self, 0)))
        if trained and all(p.grad is None for p in trained):
            self._forget()
        elif trained:
            self._passes = {k: found for k, found in self._passes.items() if k in self._counted}
            if self._passes and thrown_away(self._samples, self._samples):
                self._forget()
        self._passes[task] = []

    def _forget(self) -> None:
        self._passes, self._counted, self._samples = {}, set(), {}

    def commit(self, index: int, param: Tensor) -> None:
        """A weight's gradient was accumulated in this backward pass."""
        self._samples[param] = sample_of(param)
        self._counted.add(torch._C._current_graph_task_id())

    def sample(self, field: Field, t: Tensor, x: Parts, a: Parts, duration: float) -> None:
        """Never called."""

    # the step

    @property
    def due(self) -> bool:
        """Whether the coming :meth:`step` changes the time."""
        return (self._iteration + 1) % self.every == 0

    def _keep(self, *args: Any) -> None:
        """The optimizer is about to step: note the weights where the change will be asked for."""
        if self.due and self.rule == "feedback":
            trained = [p for p in self.ode.func.parameters() if p.grad is not None]
            self._before = [(p, p.detach().clone()) for p in trained]

    def step(self) -> Change | None:
        """Take note of an iteration; every so often, change the time.

        Returns:
            What was changed, or None.

        Raises:
            NonFiniteError: The derivative is not finite; the time was left as it was.
        """
        s = self._observe()
        before, self._before = self._before, None
        due = self.due
        self._iteration += 1
        if not due or not self._weight:
            return None
        c, length = self.penalty, float(self.ode.t1) - float(self.ode.t0)
        Q_T = c * length + self._s / self._weight
        if self.rule == "first-order":
            open_loop, feedback, Q_TT = -self.lr * Q_T, 0.0, 1.0
        else:
            Q_TT = c + self._curve / self._weight
            moved = _moved(before or [])
            gain = self.lr / Q_TT if Q_TT > 0 else 0.0
            open_loop, feedback = -gain * Q_T, -gain * s * moved
        change = open_loop + feedback
        if not math.isfinite(change):
            raise NonFiniteError(
                f"the change of t1 is {change}; it stays at {float(self.ode.t1):g}. Lower lr, or "
                "raise penalty"
            )
        length = max(self.minimum, length + change)
        self.ode.t1.fill_(float(self.ode.t0) + length)
        self.last = Change(float(self.ode.t1), open_loop, feedback, Q_T, Q_TT)
        return self.last

    def _observe(self) -> float:
        """Average this iteration's s; returns it."""
        passes = [found for task, found in self._passes.items() if task in self._counted]
        solves = [solve for found in passes or self._passes.values() for solve in found]
        self._forget()
        if not solves:
            return 0.0
        sums, squares, counts = zip(*solves, strict=True)
        total, square, rows = (
            torch.stack(sums).sum(),
            torch.stack(squares).sum(),
            float(sum(counts)),
        )
        per_sample = rows if self.reduction == "mean" else 1.0
        curve = square * per_sample**2 / rows
        if processes() > 1:
            total, curve = mean_over((total, curve))
        s = float(total)
        if not math.isfinite(s):
            raise NonFiniteError(
                "the loss's derivative with respect to t1 is not finite; t1 stays at "
                f"{float(self.ode.t1):g}. Skip this batch, or lower the learning rate"
            )
        new = 1 - self.decay
        self._weight = self.decay * self._weight + new
        self._s = self.decay * self._s + new * s
        self._curve = self.decay * self._curve + new * (
            float(curve) if self.curvature == "sample" else s**2
        )
        return s

    # checkpoints; t1 itself is a buffer of the block

    def state_dict(self) -> dict[str, float]:
        """Averages and the number of iterations, as plain numbers."""
        return {
            "iteration": self._iteration,
            "weight": self._weight,
            "s": self._s,
            "curve": self._curve,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            OptionError: A number is missing.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise OptionError(f"state_dict: it lacks {sorted(missing)}")
        self._iteration = int(state["iteration"])
        self._weight, self._s, self._curve = state["weight"], state["s"], state["curve"]
        self._forget()
        self._before = None


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _moved(before: list[tuple[Tensor, Tensor]]) -> float:
    """``Q_u^T dtheta``: the weights' gradients times what the optimizer did to them."""
    total = 0.0
    for p, old in before:
        if p.grad is not None:
            total += float((p.grad * (p.detach() - old)).sum())
    return total
