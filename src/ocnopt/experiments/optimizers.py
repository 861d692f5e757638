"""Build an optimizer from its command-line name and keyword options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import OptimizerName

# What the training run itself provides.
_PROVIDED = frozenset({"self", "model", "criterion", "params", "lr"})


def build(
    name: OptimizerName,
    model: nn.Module,
    criterion: nn.Module,
    lr: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Build an optimizer.

    Args:
        name: Its command-line name.
        model: The model to train.
        criterion: The loss that the training loop calls.
        lr: Learning rate.
        options: Keyword options of the optimizer's class.

    Returns:
        The optimizer, ready for the ordinary loop.

    Raises:
        InputError: If the class has no such option, or refuses a value.
    """
    kind = _class(name)
    valid = valid_options(kind)
    for option in options:
        if option not in valid:
            raise InputError(f"{name} has no option {option!r}; its options are {', '.join(valid)}")
    if name == "ddpnopt":
        arguments: tuple[Any, ...] = (model, criterion)
    elif kind.__module__.startswith("torch."):
        arguments = (model.parameters(),)
    else:
        arguments = (model,)
    try:
        return kind(*arguments, lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} refused its options: {error}") from error


def valid_options(kind: Callable[..., Any]) -> list[str]:
    """List the keyword options of an optimizer's class that a run may set."""
    parameters = inspect.signature(kind).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.name not in _PROVIDED and p.kind not in variadic]


def _class(name: OptimizerName) -> Callable[..., torch.optim.Optimizer]:
    # Looked up only when asked for: a plain run of torch's own needs nothing of the library.
    if name == "sgd":
        return torch.optim.SGD
    if name == "rmsprop":
        return torch.optim.RMSprop
    if name == "adam":
        return torch.optim.Adam
    import ocnopt

    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "ddpnopt": ocnopt.DDPNOpt,
        "kfac": ocnopt.KFAC,
        "ekfac": ocnopt.EKFAC,
    }
    return kinds[name]
