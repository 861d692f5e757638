"""How players are connected: what each reads, with everything in between left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from ocnopt.control.effects import name_of
from ocnopt.control.players import Player
from ocnopt.control.schedule import Program

__all__ = ["Vertex", "wiring"]


@dataclass(frozen=True)
class Vertex:
    """An input, a player, an operation that brings several results together, or the output.

    Attributes:
        kind: Which of these.
        name: Of the input, the (first) player or the operation, such as "add" or "cat".
        players: Who acts there; empty elsewhere.
        sources: Vertices whose results reach it, by position.
    """

    kind: Literal["input", "players", "merge", "output"]
    name: str
    players: tuple[Player, ...]
    sources: tuple[int, ...]


def wiring(program: Program) -> tuple[Vertex, ...]:
    """Draw together a traced graph to its players, forks and merges.

    Args:
        program: The graph and its players.

    Returns:
        Vertices in the program's order.
    """
    vertices: list[Vertex] = []
    source: dict[Node, int | None] = {}  # the one vertex that a node's result comes from

    def add(vertex: Vertex) -> int:
        vertices.append(vertex)
        return len(vertices) - 1

    for node in program.nodes:
        if node in program.fixed or not program.state[node]:
            source[node] = None
            continue
        found = {source[d] for d in program.needs[node].flow} - {None}
        sources = tuple(sorted(x for x in found if x is not None))
        act = program.acting.get(node)
        if node.op == "placeholder":
            source[node] = add(Vertex("input", node.name, (), ())) if node.users else None
        elif node.op == "output":
            add(Vertex("output", "output", (), sources))
        elif act is not None:
            players = program.acts[act].players
            source[node] = add(Vertex("players", players[0].name, players, sources))
        elif len(sources) > 1:
            source[node] = add(Vertex("merge", name_of(node), (), sources))
        else:
            source[node] = sources[0] if sources else None
    return tuple(vertices)
