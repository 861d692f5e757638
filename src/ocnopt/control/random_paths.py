"""Traces of a forward that draws random numbers: the same whatever the random states are.

Stochastic depth may be Python code, ``if torch.rand(()) < 0.5: return x``. A trace takes one path
and knows of no other. Where numbers are drawn, the forward is traced under fixed seeds, and what is
found under each of them has to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ocnopt.control.snapshot import Snapshot

if TYPE_CHECKING:
    from ocnopt.control.tracing import Traced

__all__ = ["RandomPathError", "steady"]

#: Enough that a layer which is left out every other time hardly ever is under all of them.
SEEDS = range(8)


class RandomPathError(Exception):
    """Random numbers decide what a trace finds."""


def steady(
    make: Callable[[], Traced], kind: Callable[[Traced], object], snapshot: Snapshot
) -> tuple[Traced | Exception, int | None]:
    """A trace that does not depend on random states.

    Args:
        make: Makes a trace, or raises.
        kind: What of a trace has to agree under all seeds.
        snapshot: Of the model and of random states; each trace begins and ends there.

    Returns:
        The trace, or the error; and the seed that it was made under, None where no random numbers
        were drawn.

    Raises:
        RandomPathError: Traces do not agree.
    """
    found, drawn = _attempt(make, snapshot, None)
    if not drawn:
        return found, None
    # That one is of no account any more: it depends on the states that there happen to be.
    found, _ = _attempt(make, snapshot, SEEDS[0])
    outcome = _outcome(found, kind)
    for seed in SEEDS[1:]:
        if _outcome(_attempt(make, snapshot, seed)[0], kind) != outcome:
            raise RandomPathError("random numbers decide which layers act")
    return found, SEEDS[0]


def _attempt(
    make: Callable[[], Traced], snapshot: Snapshot, seed: int | None
) -> tuple[Traced | Exception, bool]:
    """A trace or the error, and whether random numbers were drawn from the states as they are."""
    with snapshot:
        if seed is not None:
            snapshot.seed(seed)
        found: Traced | Exception
        try:
            found = make()
        except Exception as error:  # tracers raise whatever the model's code raises
            found = error
        return found, seed is None and snapshot.drawn()


def _outcome(found: Traced | Exception, kind: Callable[[Traced], object]) -> object:
    return type(found) if isinstance(found, Exception) else kind(found)
