"""Where random numbers come from: states that are kept, put back, compared and seeded."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["RandomState", "beside_torch", "shared_states", "state_of"]


class RandomState:
    """The state of one source of random numbers, as it was when this was made.

    Args:
        get: Returns the state.
        put: Sets it to one that was returned.
        seed: Sets it to one that a number stands for.
    """

    def __init__(
        self,
        get: Callable[[], Any],
        put: Callable[[Any], object],
        seed: Callable[[int], object],
    ) -> None:
        self._get, self._put = get, put
        self.seed = seed
        self._kept = get()

    def restore(self) -> None:
        """Put it back."""
        self._put(self._kept)

    def moved(self) -> bool:
        """Whether it is another one now: numbers were drawn."""
        pairs = zip(tree_leaves(self._get()), tree_leaves(self._kept), strict=True)
        return not all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in pairs)


def shared_states() -> Iterator[RandomState]:
    """Those that all of a program draws from."""
    yield RandomState(torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed)
    cuda = torch.cuda
    if cuda.is_initialized():
        yield RandomState(cuda.get_rng_state_all, cuda.set_rng_state_all, cuda.manual_seed_all)
    yield from beside_torch()


def beside_torch() -> Iterator[RandomState]:
    """Python's own, and numpy's."""
    yield RandomState(random.getstate, random.setstate, random.seed)
    numpy = _numpy()
    if numpy is not None:
        yield RandomState(numpy.get_state, numpy.set_state, numpy.seed)


def state_of(value: Any) -> RandomState | None:
    """That of a generator of torch's, Python's or numpy's; None for anything else."""
    if isinstance(value, torch.Generator):
        return RandomState(value.get_state, value.set_state, value.manual_seed)
    if isinstance(value, random.Random):
        # What the system makes of its noise has no state.
        system = isinstance(value, random.SystemRandom)
        return None if system else RandomState(value.getstate, value.setstate, value.seed)
    numpy = _numpy()
    if numpy is None:
        return None
    if isinstance(value, numpy.RandomState):
        return RandomState(value.get_state, value.set_state, value.seed)
    if isinstance(value, numpy.Generator):
        bits: Any = value.bit_generator
        put = partial(setattr, bits, "state")
        return RandomState(lambda: bits.state, put, lambda n: put(type(bits)(n).state))
    return None


def _numpy() -> Any:
    """numpy.random; None where nobody has loaded it, and so nobody draws from it."""
    return sys.modules.get("numpy.random")
