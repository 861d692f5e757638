"""Who of a stage's players can solve jointly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ocnopt.control.batch import Batch
from ocnopt.control.cooperation import Cooperation, Known
from ocnopt.control.turns import Turn
from ocnopt.curvature.kronecker import Factored

__all__ = ["parties"]


def parties(
    turns: Sequence[Turn], batches: Sequence[Batch], known: Known
) -> tuple[list[Cooperation], dict[Any, str]]:
    """Who of a stage's players can solve jointly, and why the others act by themselves.

    Args:
        turns: The players of one stage.
        batches: Recorded samples.
        known: Where couplings are kept between steps.

    Returns:
        The parties, and a reason per player of a stage with several who is in none.
    """
    alone: dict[Any, str] = {}
    alike: dict[tuple[Any, ...], list[Turn]] = {}
    for turn in turns:
        reason = _lone(turn, batches)
        if reason:
            alone[turn.player] = reason
            continue
        alike.setdefault(tuple(_kind(turn, batches).values()), []).append(turn)
    found = []
    for members in alike.values():
        if len(members) > 1:
            found.append(Cooperation(members, known))
        else:
            others = [t for t in turns if t is not members[0] and not _lone(t, batches)]
            alone[members[0].player] = _unlike(members[0], others, batches)
    return found, alone if len(turns) > 1 else {}


def _lone(turn: Turn, batches: Sequence[Batch]) -> str:
    if not isinstance(turn.mover.preconditioner, Factored):
        return "acts alone: M has no blocks between players (only a Kronecker M has)"
    traces = [trace for batch in batches if (trace := batch.traces.get(turn.player)) is not None]
    if any(trace.calls > 1 for trace in traces):
        return "acts alone: it is called several times in a pass"
    return ""


def _unlike(turn: Turn, others: Sequence[Turn], batches: Sequence[Batch]) -> str:
    """Why a player has no partner among others."""
    mine = _kind(turn, batches)
    for other in others:
        theirs = _kind(other, batches)
        what = next(name for name, value in mine.items() if theirs[name] != value)
        if what == "locations":
            a, b = (_counted(kind[what]) for kind in (mine, theirs))
            return f"acts alone: {a} locations against {b} of {other.player.name!r}"
        return f"acts alone: {what} unlike that of {other.player.name!r}"
    return "acts alone: no other player of its stage can solve jointly"


def _counted(locations: tuple[int | None, ...]) -> str:
    return ", ".join("no" if n is None else str(n) for n in dict.fromkeys(locations))


def _kind(turn: Turn, batches: Sequence[Batch]) -> dict[str, Any]:
    """What members of one party have in common, by what it is called."""
    layer: Any = turn.player.layer
    traces = [batch.traces.get(turn.player) for batch in batches]
    param = turn.player.params[0]
    return {
        "locations": tuple(None if t is None else t.locations for t in traces),
        "a preconditioner": turn.mover.preconditioner,
        # A Kronecker M has one for all of a player's parameters.
        "a learning rate": turn.mover.rates[0],
        "a change of its gradient by the loop": turn.mover.scale,
        "a number of stacked networks": layer.networks,
        "a number of convolution groups": layer.groups,
        "a type or device of its parameters": (param.dtype, param.device),
    }
