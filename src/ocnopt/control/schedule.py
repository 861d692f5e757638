"""From a traced graph to acts of players, and from their places to stages that can be run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from ocnopt.control.effects import Needs, find_needs, is_state, name_of
from ocnopt.control.placement import Act, Placement
from ocnopt.control.players import Player
from ocnopt.control.real_tensors import address_of
from ocnopt.control.tracing import Traced
from ocnopt.layers.norm import AffineLayer

__all__ = ["Program", "Schedule"]


class Program:
    """A traced graph and the acts of the players in it.

    Args:
        traced: The graph.
        players: Whose acts are looked for.
    """

    def __init__(self, traced: Traced, players: Sequence[Player]) -> None:
        self.traced = traced
        self.nodes: list[Node] = list(traced.graph.nodes)
        self.needs = find_needs(traced.graph, traced.modules, self._home)
        #: Nodes that depend on no input: parameters, and what is made of constants alone.
        self.fixed: set[Node] = set()
        self.state: dict[Node, bool] = {}
        self.acting: dict[Node, int] = {}
        self._find_players(players)
        self.acts = self._find_acts()

    def _home(self, node: Node) -> object:
        """Where the tensor is that a node reads from the model or the trace."""
        return address_of(self.traced.value(node, {})) or node.target

    def _find_players(self, players: Sequence[Player]) -> None:
        """Number the nodes at which players act; what uses them again needs those."""
        by_module = {id(player.module): player for player in players}
        by_param = {id(param): player for player in players for param in player.params}
        bound = {node for needs in self.needs.values() for node in needs.order}
        carried: dict[Node, set[Player]] = {}  # fixed nodes: whose parameters they are made of
        first: dict[Player, Node] = {}
        self._whose: list[tuple[Player, ...]] = []
        for node in self.nodes:
            needs = self.needs[node]
            self.state[node] = is_state(node, self.state)
            found: set[Player] = set()
            if node.op == "get_attr":
                owner = by_param.get(id(self.traced.value(node, {})))
                carried[node] = set() if owner is None else {owner}
                self.fixed.add(node)
                continue
            if node.op == "call_module":
                player = by_module.get(id(self.traced.modules[str(node.target)]))
                found = set() if player is None else {player}
            elif node.op.startswith("call"):
                found = set().union(*(carried.get(x, ()) for x in node.all_input_nodes))
                movable = not needs.order and node not in bound and needs.flow <= self.fixed
                # A parameter cast or transposed is not an act yet; a look-up in it is.
                if movable and not (found and "embedding" in name_of(node)):
                    carried[node] = found
                    self.fixed.add(node)
                    continue
            again = {first[player] for player in found if player in first}
            if again - needs.flow:
                self.needs[node] = Needs(needs.flow | again, needs.order - again)
            new = tuple(sorted(found - first.keys(), key=lambda player: player.index))
            if new:
                first.update(dict.fromkeys(new, node))
                self.acting[node] = len(self._whose)
                self._whose.append(new)

    def _find_acts(self) -> tuple[Act, ...]:
        """Which acts reach which, through all that lies between."""
        used = {node for node in self.nodes if node.op == "output"}
        for node in reversed(self.nodes):
            if node in used:
                used |= self.needs[node].flow | self.needs[node].order
        acts: list[Act] = []
        flow: dict[Node, frozenset[int]] = {}
        order: dict[Node, frozenset[int]] = {}
        for node in self.nodes:
            reach: set[int] = set()
            wait: set[int] = set()
            for d in self.needs[node].flow:
                reach |= flow[d]
                wait |= order[d]
            for d in self.needs[node].order:
                wait |= flow[d] | order[d]
            wait -= reach
            flow[node], order[node] = frozenset(reach), frozenset(wait)
            number = self.acting.get(node)
            if number is not None:
                players = self._whose[number]
                rides = all(isinstance(player.layer, AffineLayer) for player in players)
                acts.append(Act(players, rides, flow[node], order[node], node in used))
                flow[node], order[node] = frozenset({number}), frozenset()
        return tuple(acts)


class Schedule:
    """The nodes of a program by stage.

    Args:
        program: The program.
        stages: Stage of every act.

    Attributes:
        nodes: What each stage computes, in the program's order.
        carried: What each stage finds computed and reads, or leaves to a later one; one entry more
            than there are stages, the last for the output.
    """

    def __init__(self, program: Program, stages: Sequence[int]) -> None:
        self.program = program
        self.count = 1 + max(stages, default=0)
        stage = self._assign(stages)
        last = {
            node: max((stage[user] for user in node.users), default=-1) for node in program.nodes
        }
        self.nodes: list[list[Node]] = [[] for _ in range(self.count)]
        self.carried: list[list[Node]] = [[] for _ in range(self.count + 1)]
        for node in program.nodes:
            if node.op.startswith("call"):
                self.nodes[stage[node]].append(node)
            anew = program.traced.made_anew(node)
            if node.op != "get_attr" or anew:
                for t in range(0 if anew else stage[node] + 1, last[node] + 1):
                    self.carried[t].append(node)

    def _assign(self, stages: Sequence[int]) -> Mapping[Node, int]:
        """Acts where they are placed, the rest with the last act before it."""
        program = self.program
        stage: dict[Node, int] = {}
        for node in program.nodes:
            if node.op == "placeholder":
                stage[node] = -1
            elif node.op == "output":
                stage[node] = self.count
            elif node not in program.fixed:
                needs = program.needs[node]
                before = (stage[d] for d in needs.flow | needs.order if d in stage)
                act = program.acting.get(node)
                stage[node] = max((0, *before)) if act is None else stages[act]
        for node in reversed(program.nodes):  # what is fixed, where it is first needed
            if node in stage:
                for d in program.needs[node].flow & program.fixed:
                    stage[d] = min(stage.get(d, self.count), max(stage[node], 0))
            elif node in program.fixed:
                stage[node] = 0
        for node in program.fixed:
            stage[node] = min(stage[node], self.count - 1)
        return stage

    def alive(self, t: int) -> tuple[str, ...]:
        """Names of the tensors that make up the state at the start of stage t."""
        program = self.program
        return tuple(
            node.name
            for node in self.carried[t]
            if program.state[node] and node not in program.fixed
        )


def fine_stages(placement: Placement, places: Sequence[int]) -> list[int]:
    """Number the fine stages of a placement: that of every act."""
    keys = placement.fine(places)
    number = {key: i for i, key in enumerate(sorted(set(keys)))}
    return [number[key] for key in keys]
