"""A network's Neural ODEs trained by one rule, what lies outside of them by Adam's (methods 4.11).

Torch's optimizers have one rule for all of their parameters, so two of them share the work.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ocnopt.experiments.errors import InputError
from ocnopt.real import is_real

__all__ = ["Split", "build_apart"]


class Split(torch.optim.Optimizer):
    """Optimizers of different parameters that step together.

    Args:
        parts: The optimizers. Their parameter groups are this one's, for schedulers to change.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let every part take a step.

        Args:
            closure: Runs the model again and returns the loss (optional, as in torch).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the parts.

        Raises:
            ValueError: The state is that of something else.
        """
        kept = state_dict.get("parts", [])
        if len(kept) != len(self.parts):
            raise ValueError(f"the state is not one of {len(self.parts)} optimizers")
        for part, state in zip(self.parts, kept, strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()  # loading has replaced the parts' groups


def build_apart(
    kind: Callable[..., torch.optim.Optimizer],
    model: nn.Module,
    criterion: nn.Module,
    lr: float,
    options: Mapping[str, Any],
    rest_lr: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer that trains a network's Neural ODEs, and Adam for the rest.

    An optimizer of the library has a parameter group with ``preconditioner="adam"``, which is
    Adam's rule but for the feedback that some have; any other shares the work with torch's Adam.
    Neither momentum nor weight decay reach the rest.

    Args:
        kind: Its class.
        model: The network.
        criterion: The loss that the training loop calls.
        lr: Learning rate of the Neural ODEs.
        options: Keyword options of the class.
        rest_lr: Learning rate of the rest.

    Raises:
        InputError: The rate is no positive number, nothing is to be parted, or the optimizer
            cannot part it.
    """
    if not (is_real(rest_lr) and math.isfinite(rest_lr) and rest_lr > 0):
        raise InputError(f"rest_lr must be a positive number, not {rest_lr!r}")
    from ocnopt.optim.feedback import FeedbackOptimizer

    inside, outside = _parted(model)
    taken = inspect.signature(kind).parameters
    if next(iter(taken)) != "model":
        return Split([kind(inside, lr=lr, **options), torch.optim.Adam(outside, lr=rest_lr)])
    ours = isinstance(kind, type) and issubclass(kind, FeedbackOptimizer)
    if not (ours and "params" in taken):
        raise InputError("it trains all parameters by one rule; leave out rest_lr")
    plain = {"preconditioner": "adam", "lr": rest_lr, "momentum": 0.0, "weight_decay": 0.0}
    arguments = (model, criterion) if "criterion" in taken else (model,)
    return kind(*arguments, lr=lr, **options, params=[{"params": outside, **plain}])


def _parted(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters inside and outside of Neural ODEs."""
    from ocnopt.ode import NeuralODE

    odes = [module for module in model.modules() if isinstance(module, NeuralODE)]
    owned = {id(p) for ode in odes for p in ode.parameters()}
    inside = [p for p in model.parameters() if id(p) in owned]
    outside = [p for p in model.parameters() if id(p) not in owned]
    if not inside or not outside:
        where = "inside" if inside else "outside"
        raise InputError(
            "rest_lr is for what lies outside of a network's Neural ODEs, but all of this one lies "
            f"{where}; leave it out"
        )
    return inside, outside
