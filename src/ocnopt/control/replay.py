"""Running a recorded forward pass again without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.control.random_states import RandomState, beside_torch

__all__ = [
    "Casts",
    "Setting",
    "as_seen",
    "autocast_as",
    "autocast_now",
    "capture_setting",
    "run_again",
    "without_autocast",
]

#: Autocast by kind of device: whether it is on, and its dtype.
Casts = tuple[tuple[str, bool, torch.dtype], ...]


@dataclass
class Setting:
    """What a second pass must restore to be the first one again."""

    cpu_random: Tensor
    device_random: list[tuple[torch.device, Tensor]]
    other_random: list[RandomState]
    autocast: Casts


def run_again(
    model: nn.Module,
    setting: Setting,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    watch: AbstractContextManager[Any] | None = None,
) -> Any:
    """Run the model's forward as it ran before, with buffers and random state guarded.

    Args:
        model: The model; its own hooks are not called.
        setting: Random state and autocast of the first run.
        inputs: Positional and keyword arguments.
        watch: Entered around the run alone.

    Returns:
        The model's output.
    """
    args, kwargs = inputs
    with guarded(model, setting), watch or nullcontext():
        return model.forward(*args, **kwargs)


def as_seen(seen: Tensor, result: Tensor | None, again: Any) -> Tensor | None:
    """A second output as the criterion saw the first, where that was it or a view of it.

    Args:
        seen: What the criterion was called on.
        result: The model's output of the first pass.
        again: Its output of the second.

    Returns:
        The same view of the second output; None where the loop did more than view it.
    """
    if result is None or not isinstance(again, Tensor) or again.stride() != result.stride():
        return None
    if seen.untyped_storage().data_ptr() != result.untyped_storage().data_ptr():
        return None
    if again.shape != result.shape or again.storage_offset() != result.storage_offset():
        return None
    return again.as_strided(seen.shape, seen.stride(), seen.storage_offset())


def capture_setting(model: nn.Module) -> Setting:
    """Random state and autocast as they are now."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return Setting(
        torch.get_rng_state(),
        [(d, torch.cuda.get_rng_state(d)) for d in devices],
        list(beside_torch()),
        autocast_now(),
    )


def autocast_now() -> Casts:
    """Autocast as it is now."""
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    )


@contextmanager
def autocast_as(casts: Casts) -> Iterator[None]:
    """Autocast as it was.

    Args:
        casts: What :func:`autocast_now` gave.
    """
    with ExitStack() as stack:
        for kind, on, dtype in casts:
            if on or torch.is_autocast_enabled(kind):
                # An autocast around this one keeps casts of weights as they were before a step.
                cast = torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False)
                stack.enter_context(cast)
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """No autocast, and no casts that it kept of weights that change inside."""
    casts = autocast_now()
    if not any(on for _, on, _ in casts):
        yield
        return
    try:
        with autocast_as(tuple((kind, False, dtype) for kind, _, dtype in casts)):
            yield
    finally:
        torch.clear_autocast_cache()


class guarded:
    """A second pass that leaves no trace: same random numbers, buffers put back."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.model = model
        self.setting = setting

    def __enter__(self) -> None:
        self.buffers = [(b, b.clone()) for b in self.model.buffers()]
        self.random = torch.get_rng_state()
        self.device_random = [
            (d, torch.cuda.get_rng_state(d)) for d, _ in self.setting.device_random
        ]
        self.other_random = list(beside_torch())
        for kept in self.setting.other_random:
            kept.restore()
        torch.set_rng_state(self.setting.cpu_random)
        for device, state in self.setting.device_random:
            torch.cuda.set_rng_state(state, device)
        self.casts = autocast_as(self.setting.autocast)
        self.casts.__enter__()

    def __exit__(self, *exc: object) -> None:
        self.casts.__exit__(None, None, None)
        torch.set_rng_state(self.random)
        for other in self.other_random:
            other.restore()
        for device, state in self.device_random:
            torch.cuda.set_rng_state(state, device)
        for buffer, kept in self.buffers:
            buffer.copy_(kept)
