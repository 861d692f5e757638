"""Options of the optimizers with feedback: which there are, and which exclude each other."""

from __future__ import annotations

import math

from torch import nn

from ocnopt.control.bellman import RECURSIONS
from ocnopt.errors import OptionError
from ocnopt.real import is_real

__all__ = ["ROLLOUTS", "require_feedback_options"]

ROLLOUTS = ("linear", "nonlinear", "off")


def require_feedback_options(
    criterion: object,
    *,
    bellman: str,
    rollout: str,
    terminal: str,
    reduction: str,
    measure_every: int,
    keep_grad: bool,
    curvature: str,
    value_reg: float,
    dynamics_order: int,
    keep_policy: bool,
) -> None:
    """Raise unless the options are known and go together; they are those of ``DDPNOpt``.

    Raises:
        OptionError: They do not.
    """
    if criterion is not None and not isinstance(criterion, nn.Module):
        raise OptionError(
            "criterion: expected the nn.Module that the loop calls, got "
            f"{type(criterion).__name__}; wrap a function as ocnopt.Criterion(function) and "
            "call that in the loop"
        )
    for name, value, choices in (
        ("bellman", bellman, RECURSIONS),
        ("rollout", rollout, ROLLOUTS),
        ("reduction", reduction, ("mean", "sum")),
        ("curvature", curvature, ("value", "gradient")),
    ):
        if value not in choices:
            raise OptionError(f"{name}={value!r} is not known; choose one of {choices}")
    if not keep_grad and bellman == rollout == "off":
        raise OptionError(
            "keep_grad=False, but with bellman='off' and rollout='off' the gradient is all "
            "that is needed; leave keep_grad=True"
        )
    if dynamics_order not in (1, 2):
        raise OptionError(f"dynamics_order={dynamics_order!r}, but it must be 1 or 2")
    if not (is_real(value_reg) and 0 <= value_reg < math.inf):
        raise OptionError(f"value_reg={value_reg!r}, but it must be finite and at least 0")
    if terminal != "full" and (value_reg or dynamics_order == 2):
        name = "value_reg" if value_reg else "dynamics_order=2"
        raise OptionError(
            f"{name} needs V_xx as a matrix per sample; use terminal='full', not {terminal!r}"
        )
    if terminal == "full" and not keep_grad:
        raise OptionError("keep_grad=False is not possible with terminal='full'")
    if keep_policy and bellman == rollout == "off":
        raise OptionError(
            "keep_policy=True, but with bellman='off' and rollout='off' there is no policy"
        )
    if not isinstance(measure_every, int) or measure_every < 0:
        raise OptionError(f"measure_every={measure_every!r}, but it must be at least 0")
    if measure_every and criterion is None:
        raise OptionError("measure_every needs the criterion, to evaluate the loss again")
