"""How much memory a piece of work takes, in tensors."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocnopt.errors import OcnoptError

__all__ = ["PeakMemory", "TookTooLong"]


class TookTooLong(OcnoptError):
    """A step was broken off."""


class PeakMemory(TorchDispatchMode):
    """Peak bytes of the tensor storage that was made under it and is alive.

    Seen after every operation, so that neither the allocator's caches nor the memory that an
    operation uses within itself count; what existed before, such as weights, does not either.

    Args:
        seconds: After so long the operation that is under way is the last one.

    Raises:
        TookTooLong: At the end of that operation.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._end = time.perf_counter() + seconds

    def start_over(self, seconds: float) -> None:
        """Forget the peak, not what is alive, and start the clock anew."""
        self.peak = 0
        self._end = time.perf_counter() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what the operation made, forget what has died."""
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if _counts(x)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if not _counts(x):
                continue
            storage = _storage(x)
            known = self._alive.get(storage._cdata)
            tracked = known is not None and not known[0].expired()
            if tracked or storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        if time.perf_counter() > self._end:
            raise TookTooLong("a step took too long")
        return result


def _counts(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_sparse


def _storage(x: Tensor) -> Any:
    return x.untyped_storage()
