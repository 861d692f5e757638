"""Identity and diagonal preconditioners: SGD, RMSprop and Adam where feedback vanishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocnopt.curvature.base import Observation, Preconditioner, State
from ocnopt.curvature.metric import Diagonal, Metric, Rates
from ocnopt.layers.base import Params
from ocnopt.real import is_scalar


class RootMeanSquare(Diagonal):
    """``M = diag(sqrt(s / correction) + eps)``, which is computed where it is asked for.

    Kept, it would take as much memory as all parameters from the Bellman pass to the update.

    Args:
        rates: Learning rate of every parameter.
        squares: Second moments s, one tensor per parameter.
        eps: Added to the root.
        corrections: What every second moment is divided by.
    """

    def __init__(
        self, rates: Rates, squares: Params, eps: float, corrections: Sequence[float] | None = None
    ) -> None:
        super().__init__(rates, squares)
        self.squares = squares
        self.eps = eps
        self.corrections = corrections

    @property
    def scales(self) -> Params:
        """New tensors."""
        return tuple(self._root(i, square) for i, square in enumerate(self.squares))

    def solve(self, params: Params) -> Params:
        """Elementwise division; real and imaginary parts have an M of their own."""
        return tuple(_like(p, _real(p) / s) for p, s in zip(params, self.scales, strict=True))

    def solve_(self, params: Params) -> Params:
        """The same in place."""
        for p, s in zip(params, self.scales, strict=True):
            _real(p).div_(s)
        return params

    def scale_rows(self, index: Tensor) -> Tensor:
        """Of the rows alone."""
        return self._root(0, self.squares[0][index])

    def _root(self, i: int, square: Tensor) -> Tensor:
        root = square.sqrt()
        if self.corrections is not None:
            root.div_(self.corrections[i] ** 0.5)
        return root.add_(self.eps)


@dataclass(frozen=True)
class Identity(Preconditioner):
    """``M = I``; reduces to ``torch.optim.SGD``."""

    name: ClassVar[str] = "identity"

    def observe(self, seen: Observation) -> Metric:
        """Nothing to observe."""
        return Metric(seen.rates)


@dataclass(frozen=True)
class RMSprop(Preconditioner):
    """``M = diag(sqrt(s) + eps)`` with s the running mean of ``E[Q_u]^2`` (Table 2).

    Reduces to ``torch.optim.RMSprop(alpha=decay, eps=eps)``.

    Args:
        decay: Smoothing of the running mean, in [0, 1).
        eps: Added to the square root.

    Raises:
        OptionError: An option out of range.
    """

    decay: float = 0.99
    eps: float = 1e-8

    name: ClassVar[str] = "rmsprop"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_number("decay", lambda x: 0 <= x < 1, "in [0, 1)")
        self.check_number("eps", lambda x: x > 0, "above 0")

    def observe(self, seen: Observation) -> Metric:
        """Update the running mean."""
        mean = [_real(q) for q in seen.mean()]
        for state, q in zip(seen.states, mean, strict=True):
            if "square_avg" not in state:
                state["square_avg"] = torch.zeros_like(q)
        squares = torch._foreach_mul([s["square_avg"] for s in seen.states], self.decay)
        torch._foreach_addcmul_(squares, mean, mean, value=1 - self.decay)
        for state, square in zip(seen.states, squares, strict=True):
            state["square_avg"] = square
        return RootMeanSquare(seen.rates, tuple(squares), self.eps)


@dataclass(frozen=True)
class Adam(Preconditioner):
    """``M = diag(sqrt(v / (1 - beta2^t)) + eps)`` with v from ``E[Q_u]^2``; momentum from d.

    Reduces to ``torch.optim.Adam``. The first moment smooths the direction with its feedback.

    Args:
        betas: Smoothing of the first and second moment, each in [0, 1).
        eps: Added to the square root.

    Raises:
        OptionError: An option out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    name: ClassVar[str] = "adam"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(
            "betas",
            isinstance(self.betas, Sequence)
            and len(self.betas) == 2
            and all(is_scalar(b) and 0 <= b < 1 for b in self.betas),
            "it must be two numbers in [0, 1)",
        )
        self.check_number("eps", lambda x: x > 0, "above 0")

    def observe(self, seen: Observation) -> Metric:
        """Update the second moment and the step count."""
        mean = [_real(q) for q in seen.mean()]
        beta = self.betas[1]
        squares, corrections = [], []
        for state, q in zip(seen.states, mean, strict=True):
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(q)
                state["exp_avg"] = torch.zeros_like(q)
                state["step"] = 0
            state["step"] += 1
            square = torch.mul(state["exp_avg_sq"], beta).addcmul_(q, q, value=1 - beta)
            state["exp_avg_sq"] = square
            squares.append(square)
            corrections.append(float(1 - beta ** state["step"]))
        return RootMeanSquare(seen.rates, tuple(squares), self.eps, corrections)

    def direction(
        self, metric: Metric, states: Sequence[State], d: Params, own: bool = False
    ) -> Params:
        """``M^-1`` of the bias-corrected first moment."""
        beta = self.betas[0]
        out = []
        assert isinstance(metric, Diagonal)
        for state, part, scale in zip(states, d, metric.scales, strict=True):
            average = state["exp_avg"] = torch.lerp(state["exp_avg"], _real(part), 1 - beta)
            out.append(_like(part, (average / scale).mul_(1 / (1 - beta ** state["step"]))))
        return tuple(out)


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as one of pairs of real numbers, which is how torch's optimizers see it."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(tensor: Tensor, real: Tensor) -> Tensor:
    """The inverse, where the tensor is complex."""
    return torch.view_as_complex(real) if tensor.is_complex() else real
