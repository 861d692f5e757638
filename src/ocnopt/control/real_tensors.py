"""What a forward does with real tensors while it is traced with stand-ins.

What it makes of no stand-in, ``torch.zeros(4)`` say, it makes in earnest, and the graph reads it as
a constant. Unless the forward had it before, every call makes it anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocnopt.control.snapshot import has_memory

__all__ = ["Address", "RealTensors", "address_of"]

#: Where the memory of a tensor, and of its views, begins.
Address = tuple[torch.device, int]


def address_of(value: object) -> Address | None:
    """Where a tensor's memory is; None where there is none."""
    if not isinstance(value, Tensor) or not has_memory(value):
        return None
    found = value.untyped_storage().data_ptr()
    return (value.device, found) if found else None


class RealTensors(TorchDispatchMode):
    """Knows which memory was made while it is on, and raises where the graph would miss something.

    The graph is told of what is done to a stand-in, and with one. It misses a real operation that
    overwrites what it has read already, or that reads what it is going to overwrite.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[Address] = set()
        self._read: set[Address] = set()
        self._overwritten: set[Address] = set()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = {address_of(x) for x in tree_leaves((args, kwargs))}
        stale = given & self._overwritten and not func.is_view
        if stale or _written(func, args, kwargs) & self._read:
            raise ValueError(
                f"forward calls {func} on a tensor that it has made and combined with results, "
                "which the trace would miss; use what that returned, or a new tensor"
            )
        result = func(*args, **kwargs)
        found = {address_of(x) for x in tree_leaves(result)} - {None}
        # torch.tensor(...) is filled out of sight, and its result is what it was given.
        fresh = found if func is torch.ops.aten.lift_fresh.default else found - given
        self._made |= {x for x in fresh if x is not None}
        return result

    def made(self, value: object) -> bool:
        """Whether a tensor was made since."""
        return address_of(value) in self._made

    def given_to_graph(self, value: object) -> None:
        """A node reads a tensor."""
        address = address_of(value)
        if address in self._made:
            self._read.add(address)

    def overwritten_by_graph(self, value: object) -> None:
        """A node writes into a tensor."""
        address = address_of(value)
        if address in self._made:
            self._overwritten.add(address)


def _written(
    func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> set[Address | None]:
    """The memory that an operation writes into."""
    arguments = func._schema.arguments
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | dict(kwargs)
    written = [given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
    return {address_of(x) for x in tree_leaves(written)} - {None}
