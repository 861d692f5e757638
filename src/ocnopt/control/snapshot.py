"""What a model holds and what its random numbers come from, kept and put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ocnopt.control.random_states import RandomState, shared_states, state_of

__all__ = ["Snapshot", "has_memory"]

#: How far from a module things are kept: attributes are one step away, a dict in a list three.
_DEPTH = 4

Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]


class Snapshot:
    """A context whose end leaves a model, and random states, as they were when this was made.

    It may be entered as often as needed. Kept are the values of parameters, buffers and other
    tensors, at the price of one copy of their memory; attributes; and the contents of lists,
    dicts, sets and deques, those of the attributes' own objects included. What is put back stays
    the very object that it was, in the same memory, at the same version, since optimizers and
    graphs hold on to it; what did not change is not written.

    Args:
        model: Looked at now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._random = list(shared_states())
        self._undo: list[Callable[[], object]] = []
        memory: set[tuple[torch.device, int]] = set()
        for found in _reachable(model):
            if isinstance(found, RandomState):
                self._random.append(found)
            elif isinstance(found, Tensor):
                self._undo.append(_Identity(found).restore)
                address = found.device, found.untyped_storage().data_ptr()
                if address not in memory:
                    memory.add(address)
                    self._undo.append(_Memory(found).restore)
            else:
                self._undo.append(partial(_refill, found, _contents(found)))
        self._undo[:0] = [state.restore for state in self._random]

    def drawn(self) -> bool:
        """Whether a random state, of the program or of the model, is another one now."""
        return any(state.moved() for state in self._random)

    def seed(self, number: int) -> None:
        """Set the random states to what a number stands for, until this ends."""
        for state in self._random:
            state.seed(number)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put back; what cannot be put back keeps nothing else from it."""
        with ExitStack() as stack:
            for undo in self._undo:
                stack.callback(undo)


def _reachable(model: nn.Module) -> Iterator[Tensor | RandomState | Container]:
    """Tensors, random states and containers that the modules hold, each once, the nearest first."""
    seen: set[int] = set()
    # Scripted modules keep their tensors where they cannot be found among the attributes.
    roots = (*model.modules(), *model.parameters(), *model.buffers())
    waiting: deque[tuple[Any, int]] = deque((root, 0) for root in roots)
    while waiting:
        value, depth = waiting.popleft()
        if id(value) in seen or depth > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if has_memory(value):
                yield value
            continue
        state = state_of(value)
        if state is not None:
            yield state
        elif isinstance(value, dict | list | set | deque):
            yield value
        if isinstance(value, nn.Module):
            depth = 0  # one that a list hides from its parent counts as any other
        waiting.extend((part, depth + 1) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """What an object holds: its members or attributes."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    attributes = getattr(value, "__dict__", None)
    # Torch's own objects keep caches; a Python module leads everywhere. Classes have no dict here.
    own = type(value).__module__.startswith("torch.") and not isinstance(value, nn.Module)
    if isinstance(attributes, dict) and not own and not isinstance(value, ModuleType):
        yield attributes


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has memory that can be kept: none that wraps others, none without any."""
    if is_lazy(x) or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    odd = x.is_meta or x.is_nested or x.is_quantized
    return x.layout is torch.strided and not odd


class _Memory:
    """The bytes behind a tensor, of which others may be views."""

    def __init__(self, x: Tensor) -> None:
        everything = torch.empty(0, dtype=torch.uint8, device=x.device)
        everything.set_(x.untyped_storage())
        # Eight bytes at a time are compared sooner.
        self.bytes = everything.view(torch.int64) if len(everything) % 8 == 0 else everything
        self.kept = self.bytes.clone()

    def restore(self) -> None:
        """Write what has changed; reading comes first, for mapped files are copied on writing."""
        if not torch.equal(self.bytes, self.kept):
            self.bytes.copy_(self.kept)


class _Identity:
    """Where a tensor's values lie, which assigning to ``data`` changes, and their version."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x
        self.alias = x.detach()
        self.version = (
            nullcontext()
            if x.is_inference()
            else torch.autograd.grad_mode._unsafe_preserve_version_counter(x)
        )

    def restore(self) -> None:
        """Put back memory and shape; a graph recorded before may be differentiated after."""
        with self.version:
            if not self.tensor.is_set_to(self.alias):
                self.tensor.data = self.alias


def _contents(container: Container) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _refill(container: Container, kept: list[Any]) -> None:
    """Give a container the contents that it had, if they are others now."""
    found = _contents(container)
    pairs = isinstance(container, dict)
    if len(found) == len(kept) and all(
        a[0] is b[0] and a[1] is b[1] if pairs else a is b for a, b in zip(found, kept, strict=True)
    ):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(kept)
    else:
        container.extend(kept)
