"""A network as a dynamic game: stages, the players that act at each, and the state between.

At stage t the players whose layers act there choose their weights at once. The state x_t is every
tensor alive at the stage's start: produced before, read there or later. What has no parameters
belongs to the dynamics F_t of the last player before it. Where a branch is shorter than the one
beside it, its players may act at several stages; each choice is an *alignment*: the same function,
another game.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from torch import nn
from torch.fx import Node

from ocnopt.control.description import described_acts, suggest
from ocnopt.control.placement import Act, Branch, Placement
from ocnopt.control.players import Player, find_players
from ocnopt.control.schedule import Program, Schedule, fine_stages
from ocnopt.control.tracing import call_key, trace, unwrapped
from ocnopt.control.undisturbed import Inputs
from ocnopt.control.wiring import Vertex, wiring
from ocnopt.errors import GraphError, OptionError

__all__ = ["Branch", "Game", "Stage", "State", "Vertex", "find_game"]

#: Traces kept for other modes and input shapes than those the game was found in.
_KEPT = 8


@dataclass(frozen=True)
class Stage:
    """One time step of the game.

    Attributes:
        index: Its position, from 0.
        players: They act simultaneously.
        alive: Names of the tensors alive at its start: the state x_t. Empty where the game was
            described and not traced.
    """

    index: int
    players: tuple[Player, ...]
    alive: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """The state x_t of a run; see :meth:`Game.start`.

    Attributes:
        stage: t, the stage that is to come.
    """

    stage: int
    _values: Mapping[Node, Any]
    _schedule: Schedule

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors alive, by name."""
        alive = set(self._schedule.alive(self.stage))
        return {n.name: value for n, value in self._values.items() if n.name in alive}


class Game:
    """Stages, players and alignments of a network. Made by :func:`find_game` or :meth:`described`.

    Attributes:
        players: All players, in the order of ``find_players``.
        idle: Those whose module the traced forward never uses; they are in no stage.
        alignments: Number of alignments with one index for all branches, at least 1. Index k puts
            every player that can be aligned k stages after its earliest, or at its latest: 0 is
            the earliest alignment, the last index the latest.
        placements: Number of all alignments: every branch for itself.
        exact: Whether placements is that number. False where counting would take too long: then
            there are at least as many.
        branches: Players that can be aligned, by groups that do not depend on one another.
    """

    def __init__(
        self,
        model: nn.Module,
        players: Sequence[Player],
        acts: Sequence[Act],
        program: Program | None = None,
        key: object = None,
    ) -> None:
        self._model = model
        self._placement = Placement(acts)
        self._programs: dict[object, Program] = {} if program is None else {key: program}
        self._found = program
        self._key = key
        acting = {player for act in acts for player in act.players}
        self.players = tuple(players)
        self.idle = tuple(player for player in players if player not in acting)
        self.alignments = 1 + max(self._placement.slack, default=0)
        self._stages: dict[object, tuple[Stage, ...]] = {}

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Players that can be aligned, by groups that do not depend on one another."""
        return self._placement.branches

    @property
    def placements(self) -> int:
        """Number of all alignments, the product over the branches; at least, if not exact."""
        return self._placement.placements

    @property
    def exact(self) -> bool:
        """Whether placements is the number of all alignments."""
        return self._placement.exact

    @property
    def wiring(self) -> tuple[Vertex, ...]:
        """How the players are connected; empty where the game was described."""
        return () if self._found is None else wiring(self._found)

    @classmethod
    def described(cls, model: nn.Module, stages: Iterable[Iterable[str]]) -> Game:
        """A game whose stages are given by hand, for networks that cannot be traced.

        Args:
            model: The model.
            stages: Names of the modules that act at each stage, first to last; every player once.

        Returns:
            A game with one alignment, without alive tensors, that cannot be run.

        Raises:
            OptionError: Stages are no lists of names; a name is no player, or is given twice; a
                player is left out.
        """
        players, unowned = find_players(model)
        return cls(model, players, described_acts(stages, players, unowned))

    def places(self, alignment: int | Mapping[str, int] = 0) -> dict[str, int]:
        """The coarse stage of every player that acts, by name.

        A coarse stage is one linear map, convolution or embedding deep; normalizations act in the
        coarse stage of what they follow. What is returned may be given back as an alignment.

        Args:
            alignment: As for :meth:`stages`.

        Raises:
            OptionError: There is no such alignment.
        """
        places = self._places(alignment)
        found = {
            player.name: place
            for act, place in zip(self._placement.acts, places, strict=True)
            for player in act.players
        }
        return {p.name: found[p.name] for p in self.players if p.name in found}

    def stages(self, alignment: int | Mapping[str, int] = 0) -> tuple[Stage, ...]:
        """The stages, first to last, each with at least one player.

        Args:
            alignment: A shared index in ``range(alignments)``; or coarse stages by player's name,
                where players that are not named act as early as the others allow.

        Raises:
            OptionError: There is no such alignment.
        """
        places = self._places(alignment)
        key = tuple(places)
        if key not in self._stages:
            acting = fine_stages(self._placement, places)
            schedule = None if self._found is None else Schedule(self._found, acting)
            members: list[list[Player]] = [[] for _ in range(1 + max(acting, default=-1))]
            for act, t in zip(self._placement.acts, acting, strict=True):
                members[t].extend(act.players)
            self._stages[key] = tuple(
                Stage(
                    t,
                    tuple(sorted(players, key=lambda player: player.index)),
                    () if schedule is None else schedule.alive(t),
                )
                for t, players in enumerate(members)
            )
        return self._stages[key]

    def run(self, *args: Any, alignment: int | Mapping[str, int] = 0, **kwargs: Any) -> Any:
        """Recompose the model's forward: ``F_{T-1}(... F_0(x_0))``.

        Bit for bit what the model computes, whatever the alignment; in training mode as far as
        that draws no random numbers. A game found by export computes what the model computes with
        gradients enabled: without them, evaluation may take another kernel. Forward hooks of
        modules that the trace keeps whole are called, those of others are not. Where random numbers
        decide which layers act in training, it computes what the model does in evaluation.

        Args:
            *args: Of the model.
            alignment: As for :meth:`stages`.
            **kwargs: Of the model.

        Raises:
            OptionError: There is no such alignment.
            GraphError: The game was described, or the model cannot be traced in this mode or on
                inputs of these shapes, or is another network then.
        """
        state = self.start(*args, alignment=alignment, **kwargs)
        while state.stage < state._schedule.count:
            state = self.step(state)
        return self.finish(state)

    def start(self, *args: Any, alignment: int | Mapping[str, int] = 0, **kwargs: Any) -> State:
        """The state x_0 of a run. Arguments and errors are those of :meth:`run`."""
        places = self._places(alignment)
        program = self._program(args, kwargs)
        schedule = Schedule(program, fine_stages(self._placement, places))
        given = program.traced.bind(args, kwargs)
        return State(0, {node: given[node] for node in schedule.carried[0]}, schedule)

    def step(self, state: State) -> State:
        """``F_t``: from the state at a stage's start to that of the next.

        Raises:
            GraphError: No stage is left.
        """
        schedule, t = state._schedule, state.stage
        if t >= schedule.count:
            raise GraphError(
                f"step: all {schedule.count} stages have been taken; finish(state) is the output"
            )
        values = dict(state._values)
        for node in schedule.nodes[t]:
            values[node] = schedule.program.traced.compute(node, values)
        return State(t + 1, {node: values[node] for node in schedule.carried[t + 1]}, schedule)

    def finish(self, state: State) -> Any:
        """The model's output, from the state behind the last stage.

        Raises:
            GraphError: A stage is still to come.
        """
        left = state._schedule.count - state.stage
        if left:
            raise GraphError(
                f"finish: the state is at the start of stage {state.stage}, and the output is only "
                f"known behind the last; take the {left} that are left by step(state)"
            )
        return state._schedule.program.traced.output(state._values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Game:
        """The game of the model's copy."""
        model, players = copy.deepcopy((self._model, list(self.players)), memo)
        if self._found is not None:
            program = Program(self._found.traced.copied(unwrapped(model)), players)
            return Game(model, players, program.acts, program, self._key)
        acts = [
            replace(act, players=tuple(copy.deepcopy(player, memo) for player in act.players))
            for act in self._placement.acts
        ]
        return Game(model, players, acts)

    def _places(self, alignment: int | Mapping[str, int]) -> list[int]:
        if isinstance(alignment, Mapping):
            return self._checked(alignment)
        if isinstance(alignment, bool) or not isinstance(alignment, int):
            raise OptionError(
                f"alignment={alignment!r}; give a number below {self.alignments}, or coarse "
                "stages by player's name"
            )
        if not 0 <= alignment < self.alignments:
            raise OptionError(
                f"alignment={alignment}, but this network has {self.alignments}: give 0 to "
                f"{self.alignments - 1}"
            )
        return self._placement.shared(alignment)

    def _checked(self, wished: Mapping[str, int]) -> list[int]:
        acts, placement = self._placement.acts, self._placement
        index = {player.name: v for v, act in enumerate(acts) for player in act.players}
        for name, place in wished.items():
            if name not in index:
                raise OptionError(f"alignment names {name!r}: {suggest(name, index)}")
            if not isinstance(place, Integral) or isinstance(place, bool):
                raise OptionError(
                    f"alignment puts {name!r} at {place!r}; give a coarse stage, a whole number "
                    "such as those of places()"
                )
        for name, place in wished.items():
            v = index[name]
            early, late = placement.earliest[v], placement.latest[v]
            if not acts[v].follows and not early <= place <= late:
                where = f"only at {early}" if early == late else f"at {early} to {late}"
                raise OptionError(f"alignment puts {name!r} at {place}, but it acts {where}")
        places = placement.chosen({index[name]: place for name, place in wished.items()})
        for name, place in wished.items():
            v = index[name]
            if places[v] != place:
                why = (
                    f"it follows the layer before it and acts at {places[v]}"
                    if acts[v].follows
                    else f"with the others as they are it acts at {places[v]} at the earliest"
                )
                raise OptionError(f"alignment puts {name!r} at {place}, but {why}")
        for act, place, late in zip(acts, places, placement.latest, strict=True):
            if place > late and not act.follows:
                raise OptionError(
                    f"alignment leaves no place for {act.name!r}: it must act by stage {late}, "
                    f"but could not before {place}"
                )
        return places

    def _program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
        """The trace for a call; a new one where mode, arguments or, exported, shapes are new."""
        if self._found is None:
            raise GraphError(
                "a game that was described by module names cannot be run; find_game(model) traces "
                "what can be"
            )
        key = call_key(self._model, (args, kwargs), shapes=self._found.traced.spec is not None)
        if key not in self._programs:
            players = list(self.players)
            program = _traced(self._model, players, (args, kwargs))
            if program.acts != self._placement.acts:
                raise GraphError(
                    "the network is another one in this mode or for these inputs; find its game "
                    "anew there"
                )
            if len(self._programs) >= _KEPT:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = program
        return self._programs[key]


def find_game(
    model: nn.Module, players: list[Player] | None = None, inputs: Inputs | None = None
) -> Game:
    """Find the game of a network from its code, in the mode it is in.

    It does not depend on random states. Where random numbers decide which layers act, as with
    stochastic depth in Python code, it is the game of evaluation mode.

    Args:
        model: The model; left as it was.
        players: Its players, as ``find_players(model)[0]`` has them; None finds them.
        inputs: Positional and keyword arguments of a call. They are needed by networks that only
            torch.export can trace, and let every trace be compared with the model.

    Returns:
        The game.

    Raises:
        GraphError: The network cannot be traced, random numbers decide which layers act in
            evaluation, too, or none of its players acts; see :meth:`Game.described`.
    """
    if players is None:
        players = find_players(model)[0]
    program = _traced(model, players, inputs)
    if players and not program.acts:
        raise GraphError(f"no player of {type(model).__name__} acts in its forward")
    key = call_key(model, inputs, shapes=program.traced.spec is not None)
    return Game(model, players, program.acts, program, key)


def _traced(model: nn.Module, players: list[Player], inputs: Inputs | None) -> Program:
    """The program of a model, whose acts depend on no random numbers."""
    traced = trace(model, players, inputs, lambda found: Program(found, players).acts)
    return Program(traced, players)
