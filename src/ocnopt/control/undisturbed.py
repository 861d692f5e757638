"""Looking at a model, and running it, without leaving a trace in it."""

from __future__ import annotations

import io
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ocnopt.control.snapshot import Snapshot

__all__ = ["Inputs", "evaluation", "same_result", "silent", "unwatched"]

#: Positional and keyword arguments of a call.
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@contextmanager
def silent() -> Iterator[None]:
    """Swallow warnings, log lines and what tracers print: what fails ends in an error of ours."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Set forward hooks aside: they watch what is no training pass.

    Scripted modules are left alone: they take no hooks from outside.
    """
    kept = [
        (vars(module), name, vars(module)[name])
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name in ("_forward_hooks", "_forward_pre_hooks")
    ]
    for attributes, name, hooks in kept:
        own = [(key, hook) for key, hook in hooks.items() if _of_torch(hook)]
        attributes[name] = OrderedDict(own)
    try:
        yield
    finally:
        for attributes, name, hooks in kept:
            attributes[name] = hooks


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, without its ``eval``, which may do more than that."""
    kept = [
        module
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule) and module.training
    ]
    try:
        for module in kept:
            module.training = False
        yield
    finally:
        for module in kept:
            module.training = True


def _of_torch(hook: Any) -> bool:
    """Whether a hook computes a weight, as weight_norm does."""
    return type(hook).__module__.startswith("torch.nn.utils")


def same_result(
    model: nn.Module,
    replay: Callable[[tuple[Any, ...], Mapping[str, Any]], Any],
    inputs: Inputs,
    snapshot: Snapshot,
    seed: int | None = None,
) -> bool:
    """Whether something computes what the model computes, from the same state.

    Args:
        model: The model, in the mode that it is in.
        replay: Called with positional and keyword arguments.
        inputs: Those of a call.
        snapshot: Of the model and of random states; each run ends there.
        seed: What both draw their random numbers from; None for the states as they are.
    """

    def run(call: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]) -> tuple[list[Any], Any]:
        with snapshot:
            if seed is not None:
                snapshot.seed(seed)
            return tree_flatten(call(*_copied(inputs)))

    expected, shape = run(lambda args, kwargs: model(*args, **kwargs))
    found, other = run(replay)
    return shape == other and all(_close(a, b) for a, b in zip(expected, found, strict=True))


def _copied(inputs: Inputs) -> Inputs:
    """Copies, for a model may write into its inputs."""
    copied: Inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    return copied


def _close(a: Any, b: Any) -> bool:
    """Equal but for the order of sums, which may change from run to run on a device."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.detach().abs().nan_to_num().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-2, atol=1e-3 * scale, equal_nan=True)
