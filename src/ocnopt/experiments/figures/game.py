"""A network as a game, drawn: stages across, players that act together one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Patch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

from ocnopt.control.game import Game
from ocnopt.control.players import Player
from ocnopt.errors import OptionError
from ocnopt.experiments.figures.game_layout import Layout, Line, Spot, lay_out, rides
from ocnopt.experiments.files import write_atomically

__all__ = ["save_game"]

_FIXED, _MOVES, _RIDES, _LINE = "#9ecae1", "#fdae6b", "#d9d9d9", "#636363"
_LANE, _TALL = 0.92, 0.62  # height of a lane and of a box
_SIGNS = {"add": "+", "iadd": "+", "add_": "+", "sub": "\u2212", "mul": "\u00d7", "mul_": "\u00d7"}
_SIGNS |= {"cat": "c", "concat": "c", "stack": "c", "matmul": "@", "bmm": "@"}
_INCH = 0.98  # of a unit


@rc_context({"text.parse_math": False})  # a name with dollar signs is a name
def save_game(
    path: Path, game: Game, alignment: int, title: str, alive: Mapping[int, int] | None = None
) -> None:
    """Draw a game.

    A box is a player, orange where it can be aligned, with dashed boxes where else it may act; grey
    strips are normalizations, which act right behind their layer. A circle brings results
    together; arcs are results that skip players.

    Args:
        path: The PNG file.
        game: The game; one that was described by hand has no picture.
        alignment: Which alignment to draw.
        title: Heading.
        alive: Number of tensors alive at the start of every stage; None takes those of the game.

    Raises:
        OptionError: The game was described by hand, or there is no such alignment.
    """
    if not game.wiring:
        raise OptionError("a game that was described by module names cannot be drawn")
    layout = lay_out(game, alignment)
    counts = alive or {s.index: len(s.alive) for s in game.stages(alignment)}
    top = max((_height(line) * 0.75 for line in layout.lines if line.way == "arc"), default=0.0)
    top = max(top + 0.1, 0.45)
    bottom = -(layout.lanes - 1) * _LANE - 0.5
    width, height = layout.width + 0.9, top - bottom + 0.62
    inch = min(_INCH, 60 / width)
    figure = Figure(figsize=(max(width * inch, 6.0), height * inch + 0.85))
    room = figure.get_size_inches()
    ax = figure.add_axes((0.0, 0.4 / room[1], 1.0, 1 - 0.85 / room[1]))
    ax.set_axis_off()
    ax.set_aspect("equal")
    ax.set_xlim(-0.48, layout.width + 0.42)
    ax.set_ylim(bottom - 0.5, top + 0.12)
    figure.suptitle(title, y=1 - 0.12 / room[1], va="top", fontsize=12)
    _columns(ax, layout, bottom, top, counts)
    for line in layout.lines:
        ax.add_patch(PathPatch(_curve(line), fc="none", ec=_LINE, lw=1.2, zorder=1))
    movable = {player for branch in game.branches for player in branch.players}
    for spot in layout.spots.values():
        _spot(ax, spot, movable)
    _ghosts(ax, game, layout, alignment)
    figure.legend(handles=_legend(game), loc="lower center", ncols=6, fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _y(lane: int) -> float:
    return -lane * _LANE


def _columns(
    ax: Axes, layout: Layout, bottom: float, top: float, counts: Mapping[int, int]
) -> None:
    """Shade what belongs to one coarse stage; number the stages below."""
    for t, (left, right) in enumerate(layout.columns):
        same = [
            c
            for c, place in zip(layout.columns, layout.places, strict=True)
            if place == layout.places[t]
        ]
        if layout.columns[t] == same[0]:
            shade = Rectangle(
                (same[0][0] - 0.08, bottom),
                same[-1][1] - same[0][0] + 0.16,
                top - bottom,
                fc="#f2f2f2",
                lw=0,
                zorder=0,
            )
            ax.add_patch(shade)
        x = (left + right) / 2
        ax.text(x, bottom - 0.14, str(t), ha="center", va="center", fontsize=9)
        ax.text(x, bottom - 0.36, str(counts[t]), ha="center", va="center", fontsize=7, color=_LINE)
    for y, word in ((-0.14, "stage"), (-0.36, "alive")):
        ax.text(-0.42, bottom + y, word, ha="left", va="center", fontsize=7, color=_LINE)


def _spot(ax: Axes, spot: Spot, movable: set[Player]) -> None:
    x, y, vertex = spot.x, _y(spot.lane), spot.vertex
    if vertex.kind in ("input", "output"):
        ax.add_patch(Circle((x, y), 0.06, fc=_LINE, lw=0, zorder=3))
        beside = -0.1 if vertex.kind == "input" else 0.1
        ax.text(
            x + beside,
            y + 0.14,
            vertex.name.replace("input_1", "x"),
            fontsize=7,
            ha="center",
            va="bottom",
            color=_LINE,
        )
    elif vertex.kind == "merge":
        ax.add_patch(Circle((x, y), 0.1, fc="white", ec=_LINE, lw=1.2, zorder=3))
        sign = _SIGNS.get(vertex.name, "\u2022")
        ax.text(x, y - 0.005, sign, ha="center", va="center_baseline", fontsize=8, zorder=4)
    else:
        player = vertex.players[0]
        strip = rides(player)
        colour = _RIDES if strip else _MOVES if player in movable else _FIXED
        ax.add_patch(_box(x, y, spot.half, fc=colour, ec="#555555", lw=0.8, zorder=2))
        _label(ax, x, y, player, strip)


def _box(x: float, y: float, half: float, **style: object) -> FancyBboxPatch:
    shape = "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch((x - half, y - _TALL / 2), 2 * half, _TALL, shape, **style)  # type: ignore[arg-type]


def _label(ax: Axes, x: float, y: float, player: Player, strip: bool) -> None:
    """A layer's name, the module it is in above and the shape of its weight below."""
    prefix, _, last = (player.name or type(player.module).__name__).rpartition(".")
    if strip:
        ax.text(x, y, _cut(last, 10), rotation=90, ha="center", va="center", fontsize=7, zorder=4)
        return
    shape = "\u00d7".join(map(str, player.params[0].shape))
    ax.text(x, y + 0.01, _cut(last, 12), ha="center", va="center", fontsize=9, zorder=4)
    small = {"ha": "center", "va": "center", "fontsize": 6.3, "color": "#333333", "zorder": 4}
    ax.text(x, y + 0.2, _cut(prefix, 17, left=True), **small)  # type: ignore[arg-type]
    ax.text(x, y - 0.2, shape, **small)  # type: ignore[arg-type]


def _cut(text: str, most: int, left: bool = False) -> str:
    if len(text) <= most:
        return text
    return "\u2026" + text[1 - most :] if left else text[: most - 1] + "\u2026"


def _ghosts(ax: Axes, game: Game, layout: Layout, alignment: int) -> None:
    """Dashed boxes where players that can be aligned may act, too."""
    boxes = {
        (spot.stage, spot.lane) for spot in layout.spots.values() if spot.vertex.kind == "players"
    }
    wide: dict[int, int] = {}
    for t, place in enumerate(layout.places):
        wide.setdefault(place, t)  # the first stage of a coarse one
    lanes = {player: spot.lane for spot in layout.spots.values() for player in spot.vertex.players}
    for branch in game.branches:
        for player, early, late in zip(branch.players, branch.earliest, branch.latest, strict=True):
            for place in range(early, late + 1):
                t = wide[place]
                if (t, lanes[player]) not in boxes:
                    left, right = layout.columns[t]
                    ghost = _box(
                        (left + right) / 2,
                        _y(lanes[player]),
                        (right - left) / 2,
                        fc="none",
                        ec="#e6550d",
                        ls=(0, (3, 3)),
                        lw=0.8,
                        zorder=1,
                    )
                    ax.add_patch(ghost)


def _height(line: Line) -> float:
    return 1.0 + 0.3 * line.level


def _curve(line: Line) -> Curve:
    """The path of a line, from the right of its start to the left of its end."""
    start, end = line.start, line.end
    x1, y1, x2, y2 = start.x + start.half, _y(start.lane), end.x - end.half, _y(end.lane)
    if line.way == "straight":
        return Curve([(x1, y1), (x2, y2)])
    if line.way == "arc":
        if start.vertex.kind == "merge":
            x1 -= start.half
        if end.vertex.kind == "merge":
            x2 += end.half
        peak = _height(line)
        points = [(x1, y1), (x1, peak), (x2, peak), (x2, y2)]
        return Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    bend = min(0.36, x2 - x1)
    if line.way == "at start":
        turn, points = x1 + bend, [(x1, y1), (x1 + bend / 2, y1), (x1 + bend / 2, y2)]
        return Curve([*points, (turn, y2), (x2, y2)], [1, 4, 4, 4, 2])
    turn = x2 - bend
    points = [(x1, y1), (turn, y1), (turn + bend / 2, y1), (turn + bend / 2, y2), (x2, y2)]
    return Curve(points, [1, 2, 4, 4, 4])


def _legend(game: Game) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [Patch(fc=_FIXED, ec="#555555", label="player")]
    if game.branches:
        handles.append(Patch(fc=_MOVES, ec="#555555", label="player that can be aligned"))
        handles.append(Patch(fc="none", ec="#e6550d", ls="--", label="where else it may act"))
    if any(rides(player) for player in game.players):
        handles.append(Patch(fc=_RIDES, ec="#555555", label="normalization"))
    circle = Line2D([], [], marker="o", ls="", mfc="white", mec=_LINE, label="results merge")
    return [*handles, circle]
