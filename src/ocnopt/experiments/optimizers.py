"""Build an optimizer from its command-line name and keyword options.

Every optimizer has one option that is not its class's: ``rest_lr`` lets it train a network's Neural
ODEs alone, and Adam, at this learning rate, all that lies outside of them. That is how the authors
of SNOpt train their time-series networks, whichever optimizer the Neural ODE has (methods 4.11).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.own import find
from ocnopt.experiments.problems import OptimizerName
from ocnopt.experiments.split import build_apart

#: The option of all optimizers.
REST_LR = "rest_lr"
# What the training run itself provides.
_PROVIDED = frozenset({"self", "model", "criterion", "params", "lr"})

# The library's, by their names on the command line.
_OURS = {
    "ddpnopt": "DDPNOpt",
    "dgnopt": "DGNOpt",
    "kfac": "KFAC",
    "ekfac": "EKFAC",
    "vanilla-ddp": "VanillaDDP",
    "emsa": "EMSA",
    "snopt": "SNOpt",
    "ocnopt": "OCNOpt",
}


def build(
    name: OptimizerName | str,
    model: nn.Module,
    criterion: nn.Module,
    lr: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Build an optimizer.

    Args:
        name: Its command-line name, or `package.module:Class`.
        model: The model to train.
        criterion: The loss that the training loop calls.
        lr: Learning rate.
        options: Keyword options of the optimizer's class, and `rest_lr`.

    Returns:
        The optimizer, ready for the ordinary loop.

    Raises:
        InputError: If the class has no such option, refuses a value, or cannot be used in a run.
    """
    kind = _class(name)
    valid = valid_options(kind)
    for option in options:
        if option not in (*valid, REST_LR):
            raise InputError(f"{name} has no option {option!r}; its options are {', '.join(valid)}")
    own = {option: value for option, value in options.items() if option != REST_LR}
    first = list(inspect.signature(kind).parameters)[:2]
    arguments: tuple[Any, ...] = (model.parameters(),)
    if first[:1] == ["model"]:
        arguments = (model, criterion) if "criterion" in first else (model,)
    try:
        if REST_LR in options:
            return build_apart(kind, model, criterion, lr, own, options[REST_LR])
        return kind(*arguments, lr=lr, **own)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} refused its options: {error}") from error


def valid_options(kind: Callable[..., Any]) -> list[str]:
    """List the keyword options of an optimizer's class that a run may set.

    A class that hands ``**options`` on has those of the next constructor, too.
    """
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found: dict[str, None] = {}
    for part in getattr(kind, "__mro__", (kind,)):
        if part is not kind and "__init__" not in vars(part):
            continue
        parameters = inspect.signature(part).parameters.values()
        found.update(dict.fromkeys(p.name for p in parameters if p.kind not in variadic))
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return [name for name in found if name not in _PROVIDED]


def runs_batches(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step takes the batch itself, as in `loss = optimizer.step(x, y)`."""
    from ocnopt.optim.batchwise import BatchOptimizer

    return isinstance(optimizer, BatchOptimizer)


def _class(name: OptimizerName | str) -> Callable[..., torch.optim.Optimizer]:
    # Looked up only when asked for: a plain run of torch's own needs nothing of the library.
    if name == "sgd":
        return torch.optim.SGD
    if name == "rmsprop":
        return torch.optim.RMSprop
    if name == "adam":
        return torch.optim.Adam
    if ":" not in name:
        import ocnopt

        own: Callable[..., torch.optim.Optimizer] = getattr(ocnopt, _OURS[name])
        return own
    kind: Callable[..., torch.optim.Optimizer] = find(name, "optimizer")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(f"optimizer {name} is no torch.optim.Optimizer")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"optimizer {name} needs a closure in its step; a run gives it none")
    return kind
