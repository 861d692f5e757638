"""What a person at a terminal sees of a game."""

from __future__ import annotations

from collections import Counter

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ocnopt.control.players import Player
from ocnopt.experiments.inspection.look import Inspection, kind

__all__ = ["print_inspection", "summary"]

_MOST = 12  # parameters without a player that are listed


def print_inspection(console: Console, seen: Inspection) -> None:
    """Print a row per stage, and what there is beside the stages.

    Args:
        console: Where to.
        seen: The network and its game.
    """
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    movable = bool(seen.game.branches)
    heads = ["stage", "player", "layer", *(["place"] if movable else []), "state at the start"]
    for head in heads:
        last = head == heads[-1]
        table.add_column(head, no_wrap=not last, overflow="fold")
    for stage, alive in zip(seen.game.stages(seen.alignment), seen.alive, strict=True):
        state = _state(list(alive.values()))
        for player in stage.players:
            first = player is stage.players[0]
            cells = [player.name or "(the model)", f"{kind(player)} {_weight(player)}"]
            if movable:
                cells.append(_place(seen, player))
            table.add_row(str(stage.index) if first else "", *cells, state if first else "")
    console.print(table, highlight=False, markup=False)
    for line in summary(seen):
        console.print(line, highlight=False, markup=False)


def summary(seen: Inspection) -> list[str]:
    """What is said of the game as a whole, line by line."""
    game = seen.game
    stages = game.stages(seen.alignment)
    lines = [
        f"{seen.network} on {seen.dataset}: {_count(len(game.players), 'player')} in "
        f"{_count(len(stages), 'stage')}, {seen.parameters:,} parameters"
    ]
    if game.alignments == 1:
        lines.append("one alignment: no player can act anywhere else")
    else:
        ways = f"{'' if game.exact else 'at least '}{game.placements:,} ways"
        branches = _count(len(game.branches), "branch", "branches")
        lines += [
            f"alignment {seen.alignment} of 0 to {game.alignments - 1}, earliest to latest; "
            f"{branches} can be aligned, each by itself in {ways} in all",
            "place: how many layers come before, and in brackets where else the player may act",
        ]
    if game.idle:
        lines.append(f"never used: {', '.join(player.name for player in game.idle)}")
    if seen.unowned:
        lines.append("no player owns, and the first-order rule trains:")
        lines += [f"  {part.name}: {part.reason}" for part in seen.unowned[:_MOST]]
        if len(seen.unowned) > _MOST:
            lines.append(f"  and {len(seen.unowned) - _MOST} more (--json lists all)")
    return lines


def _state(shapes: list[tuple[int, ...]]) -> str:
    """Shapes of the tensors alive, equal ones counted."""
    counted = Counter(_times(shape) for shape in shapes)
    return " + ".join(f"{n} of {shape}" if n > 1 else shape for shape, n in counted.items())


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _place(seen: Inspection, player: Player) -> str:
    reach = seen.reach[player.name]
    if reach.earliest == reach.latest:
        return str(reach.place)
    return f"{reach.place} ({reach.earliest} to {reach.latest})"


def _weight(player: Player) -> str:
    return _times(tuple(player.params[0].shape))


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
