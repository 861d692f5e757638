"""Where the boxes and lines of a game's picture go: columns are stages, rows are lanes.

The longest path runs along lane 0. Every branch beside it is a chain of players in a lane of its
own, between where it forks off and where it merges; what skips players without a layer of its own
is an arc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ocnopt.control.game import Game, Vertex
from ocnopt.control.players import Player
from ocnopt.layers.norm import AffineLayer

__all__ = ["Layout", "Line", "Spot", "lay_out"]

_WIDE, _NARROW = 0.96, 0.28  # boxes of layers, strips of normalizations
_GAP, _MERGE = 0.4, 0.34  # between columns; what every merge adds to that
_RADIUS = 0.1  # of a merge


@dataclass
class Spot:
    """Where a vertex is drawn.

    Attributes:
        vertex: Input, players, merge or output.
        stage: Of its players; that of the last player before a merge; -1 for inputs.
        lane: Row, 0 the uppermost.
        x: Middle of it.
        half: Half its width.
    """

    vertex: Vertex
    stage: int
    lane: int = -1
    x: float = 0.0
    half: float = 0.0


@dataclass(frozen=True)
class Line:
    """A result on its way from one spot to another.

    Attributes:
        start: Where it comes from.
        end: Where it goes.
        way: Straight, or changing lanes at its start or end, or as an arc over what is between.
        level: Height of an arc, counted from 0.
    """

    start: Spot
    end: Spot
    way: Literal["straight", "at start", "at end", "arc"]
    level: int = 0


@dataclass
class Layout:
    """A picture's geometry.

    Attributes:
        spots: By position of the vertex; vertices drawn together with another are left out.
        lines: Between them.
        columns: Left and right edge of every stage.
        places: Coarse stage of every stage.
        lanes: Number of lanes.
        width: Of the whole.
    """

    spots: dict[int, Spot]
    lines: list[Line] = field(default_factory=list)
    columns: list[tuple[float, float]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    lanes: int = 1
    width: float = 0.0


def lay_out(game: Game, alignment: int) -> Layout:
    """Arrange a game under an alignment.

    Args:
        game: Not described by hand: it must know its wiring.
        alignment: A shared index.
    """
    stages = game.stages(alignment)
    stage_of = {player: stage.index for stage in stages for player in stage.players}
    spots: dict[int, Spot] = {}
    for i, vertex in enumerate(game.wiring):
        if vertex.kind == "input":
            stage = -1
        elif vertex.kind == "output":
            stage = len(stages)
        elif vertex.kind == "merge":
            stage = max(spots[s].stage for s in vertex.sources)
        else:
            stage = stage_of[vertex.players[0]]
        spots[i] = Spot(vertex, stage)
    sources = _without_double_merges(spots)
    movable = {player for branch in game.branches for player in branch.players}
    places = game.places(alignment)
    layout = Layout(spots, places=[places[stage.players[0].name] for stage in stages])
    _assign_lanes(layout, sources, movable)
    _assign_columns(layout, [stage.players for stage in stages])
    _draw_lines(layout, sources)
    return layout


def rides(player: Player) -> bool:
    """Whether a player is a normalization."""
    return isinstance(player.layer, AffineLayer)


def _without_double_merges(spots: dict[int, Spot]) -> dict[int, tuple[int, ...]]:
    """Draw a merge that only feeds another at the same stage as one with it."""
    sources = {i: spot.vertex.sources for i, spot in spots.items()}
    for i in list(spots):
        users = [j for j in sources if i in sources[j]]
        if spots[i].vertex.kind != "merge" or len(users) != 1:
            continue
        (user,) = users
        if spots[user].vertex.kind == "merge" and spots[user].stage == spots[i].stage:
            sources[user] = tuple(sorted({*sources[user], *sources.pop(i)} - {i}))
            del spots[i]
    return sources


def _assign_lanes(
    layout: Layout, sources: dict[int, tuple[int, ...]], movable: set[Player]
) -> None:
    spots = layout.spots
    users: dict[int, list[int]] = {i: [] for i in spots}
    for i, found in sources.items():
        for s in found:
            users[s].append(i)
    taken: set[tuple[int, int]] = set()

    def late(i: int) -> tuple[int, bool, int]:
        spot = spots[i]
        return spot.stage, not movable & set(spot.vertex.players), -i

    here: int | None = max(spots)  # the output, and back from there the latest source each time
    while here is not None:
        spot = spots[here]
        spot.lane = 0
        if spot.vertex.kind == "players":
            taken.add((spot.stage, 0))
        here = max(sources[here], key=late, default=None)
    for i, spot in spots.items():
        if spot.lane >= 0 or spot.vertex.kind != "players":
            continue
        chain = [i]
        while True:
            after = users[chain[-1]]
            if len(after) != 1 or sources[after[0]] != (chain[-1],) or spots[after[0]].lane >= 0:
                break
            if spots[after[0]].vertex.kind != "players":
                break
            chain.append(after[0])
        first = 1 + max((spots[s].stage for s in sources[i]), default=-1)
        ends = [spots[j].stage - (spots[j].vertex.kind != "merge") for j in users[chain[-1]]]
        last = max(min(ends, default=0), spots[chain[-1]].stage)
        lane = 1
        while any((t, lane) in taken for t in range(first, last + 1)):
            lane += 1
        taken |= {(t, lane) for t in range(first, last + 1)}
        for j in chain:
            spots[j].lane = lane
    for i, spot in spots.items():  # inputs and merges beside the main path
        if spot.lane < 0:
            near = sources[i] or [j for j in users[i] if spots[j].lane >= 0]
            spot.lane = min((spots[j].lane for j in near), default=0)
    layout.lanes = 1 + max(spot.lane for spot in spots.values())


def _assign_columns(layout: Layout, players: Sequence[Sequence[Player]]) -> None:
    spots = layout.spots
    merges: dict[int, list[Spot]] = {}
    for spot in spots.values():
        if spot.vertex.kind == "merge":
            merges.setdefault(spot.stage, []).append(spot)
        elif spot.vertex.kind == "input":
            spot.x, spot.half = 0.0, 0.06
    x = _between(merges.get(-1, []), 0.0)
    for t, acting in enumerate(players):
        width = _NARROW if all(map(rides, acting)) else _WIDE
        layout.columns.append((x, x + width))
        for spot in spots.values():
            if spot.vertex.kind == "players" and spot.stage == t:
                spot.x = x + width / 2
                spot.half = (_NARROW if rides(spot.vertex.players[0]) else _WIDE) / 2
        x = _between(merges.get(t, []), x + width)
    for spot in spots.values():
        if spot.vertex.kind == "output":
            spot.x, spot.half = x, 0.06
    layout.width = x


def _between(merges: list[Spot], x: float) -> float:
    """Put merges in a gap that begins at x; where the gap ends."""
    for number, spot in enumerate(merges):
        spot.x, spot.half = x + _GAP + number * _MERGE, _RADIUS
    return x + _GAP + (_MERGE * len(merges) + 0.06 if merges else 0.0)


def _draw_lines(layout: Layout, sources: dict[int, tuple[int, ...]]) -> None:
    spots = layout.spots
    ordered = list(spots.values())

    def clear(lane: int, left: float, right: float) -> bool:
        return not any(
            spot.lane == lane and left < spot.x < right and spot.vertex.kind != "input"
            for spot in ordered
        )

    arcs = []
    for i, found in sources.items():
        end = spots[i]
        for s in found:
            start = spots[s]
            if start.lane == end.lane:
                if clear(end.lane, start.x, end.x):
                    layout.lines.append(Line(start, end, "straight"))
                else:
                    arcs.append((start, end))
            elif clear(end.lane, start.x, end.x):
                layout.lines.append(Line(start, end, "at start"))
            elif clear(start.lane, start.x, end.x):
                layout.lines.append(Line(start, end, "at end"))
            else:
                arcs.append((start, end))
    levels: list[tuple[float, float, int]] = []
    for start, end in sorted(arcs, key=lambda arc: arc[1].x - arc[0].x):
        under = [n for a, b, n in levels if start.x < b and a < end.x]
        level = 1 + max(under, default=-1)
        levels.append((start.x, end.x, level))
        layout.lines.append(Line(start, end, "arc", level))
