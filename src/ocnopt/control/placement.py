"""Where players may act: earliest and latest coarse stage, alignments, how many there are.

An *act* is an operation at which a player acts (usually one). Linear maps, convolutions and
embeddings take one coarse stage each. The affine part of a normalization *rides*: it belongs to
the coarse stage of what is before it, and acts after that, in a fine stage of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ocnopt.control.players import Player

__all__ = ["Act", "Branch", "Placement"]

#: Work of counting one branch's placements, in places looked at: a second or so. The number of
#: states to count by grows exponentially with the layers that are side by side.
_WORK = 5_000_000


@dataclass(frozen=True)
class Act:
    """Where in the program one player acts, or several that cannot be told apart.

    Attributes:
        players: Who acts.
        rides: Whether they are normalizations.
        flow: Earlier acts whose result reaches this one.
        order: Earlier acts that must not come after this one: they read what is overwritten here.
        used: Whether the network's output depends on it, or it must come before what it does
            depend on.
    """

    players: tuple[Player, ...]
    rides: bool
    flow: frozenset[int]
    order: frozenset[int]
    used: bool

    @property
    def name(self) -> str:
        """Of the (first) player."""
        return self.players[0].name

    @property
    def follows(self) -> bool:
        """Whether it acts as soon as it can and has no place to choose."""
        return self.rides or not self.used


@dataclass(frozen=True)
class Branch:
    """Players that can be aligned, and whose places depend on one another's alone.

    Attributes:
        players: In the program's order; normalizations behind them go along and are not listed.
        earliest: First coarse stage of each.
        latest: Last coarse stage of each.
        placements: Number of ways to place them that keep their order.
        exact: Whether that is all of them. False where counting would take too long: then there
            are at least as many.
    """

    players: tuple[Player, ...]
    earliest: tuple[int, ...]
    latest: tuple[int, ...]
    placements: int
    exact: bool = True


class Placement:
    """Earliest and latest places of acts, and what lies between.

    Args:
        acts: In the program's order.
    """

    def __init__(self, acts: Sequence[Act]) -> None:
        self.acts = tuple(acts)
        # Coarse stages from an act to a later one. A rider stays where it follows; whatever else
        # comes after a result, or after a rider, takes the next stage.
        self._steps: list[dict[int, int]] = [
            {
                u: int(not act.rides and (u in act.flow or self.acts[u].rides))
                for u in sorted(act.flow | act.order)
            }
            for act in self.acts
        ]
        self.earliest = self._place([0] * len(self.acts))
        self.latest = self._latest()
        self.slack = [
            0 if act.follows else late - early
            for act, early, late in zip(self.acts, self.earliest, self.latest, strict=True)
        ]

    def _place(self, wished: Sequence[int]) -> list[int]:
        """The earliest place of every act, no earlier than wished; some only follow."""
        places: list[int] = []
        for act, steps, wish in zip(self.acts, self._steps, wished, strict=True):
            needed = max((places[u] + step for u, step in steps.items()), default=0)
            places.append(needed if act.follows else max(needed, wish))
        return places

    def _latest(self) -> list[int]:
        used = [early for act, early in zip(self.acts, self.earliest, strict=True) if act.used]
        latest = [max(used, default=0)] * len(self.acts)
        for v in reversed(range(len(self.acts))):
            if self.acts[v].used:  # nothing waits for what is not
                for u, step in self._steps[v].items():
                    latest[u] = min(latest[u], latest[v] - step)
        return latest

    def shared(self, index: int) -> list[int]:
        """Places where every act that can be aligned is ``index`` stages late, or at its latest.

        Valid: where v comes ``step`` after u, ``earliest[u] + step <= earliest[v]`` and
        ``latest[u] + step <= latest[v]``, hence the same for ``min(earliest + index, latest)``.
        """
        pairs = zip(self.earliest, self.latest, strict=True)
        return self._place([min(early + index, late) for early, late in pairs])

    def chosen(self, wished: Mapping[int, int]) -> list[int]:
        """Places where some acts are placed by wish and the others as early as that allows."""
        return self._place([wished.get(v, 0) for v in range(len(self.acts))])

    def fine(self, places: Sequence[int]) -> list[tuple[int, int]]:
        """Coarse stage and position within it: riders act after what they follow there."""
        found: list[tuple[int, int]] = []
        for v, act in enumerate(self.acts):
            here = [(u, found[u][1]) for u in self._steps[v] if places[u] == places[v]]
            depths = [depth + (u in act.flow) for u, depth in here] if act.rides else []
            found.append((places[v], max(depths, default=0)))
        return found

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """Groups of acts that can be aligned independently of one another."""
        binding = self._binding()
        group = {v: {v} for v, slack in enumerate(self.slack) if slack}
        for v, steps in binding.items():
            for u in steps:
                if group[u] is not group[v]:
                    group[u] |= group[v]
                    for w in group[v]:
                        group[w] = group[u]
        branches = []
        for v, members in group.items():
            if v == min(members):
                acts = sorted(members)
                branches.append(
                    Branch(
                        tuple(p for u in acts for p in self.acts[u].players),
                        tuple(self.earliest[u] for u in acts for _ in self.acts[u].players),
                        tuple(self.latest[u] for u in acts for _ in self.acts[u].players),
                        *self._count(acts, binding),
                    )
                )
        return tuple(branches)

    @property
    def placements(self) -> int:
        """Number of all placements that keep the order; at least, where it is not exact."""
        return math.prod(branch.placements for branch in self.branches)

    @property
    def exact(self) -> bool:
        """Whether placements are all that there are."""
        return all(branch.exact for branch in self.branches)

    def _binding(self) -> dict[int, dict[int, int]]:
        """For each act that can be aligned, those others that limit where it goes, with steps."""
        through: list[dict[int, int]] = []  # riders stand for what they follow
        for steps in self._steps:
            reached: dict[int, int] = {}
            for u, step in steps.items():
                before = dict.fromkeys(through[u], step) if self.acts[u].rides else {u: step}
                for w, s in before.items():
                    reached[w] = max(s, reached.get(w, 0))
            through.append(reached)
        return {
            v: {
                u: step
                for u, step in through[v].items()
                if self.slack[u] and self.latest[u] + step > self.earliest[v]
            }
            for v, slack in enumerate(self.slack)
            if slack
        }

    def _count(
        self, acts: Sequence[int], binding: Mapping[int, Mapping[int, int]]
    ) -> tuple[int, bool]:
        """Count the ways to place a group, and say whether those are all.

        Act by act; all that matters of those already placed is the earliest place that they leave
        to those that follow. Whatever the places so far, the rest can follow; so where this takes
        too long, the ways to place some of the acts are no more than those to place all.
        """
        position = {v: i for i, v in enumerate(acts)}
        after: list[list[tuple[int, int]]] = [[] for _ in acts]
        for v in acts:
            for u, step in binding[v].items():
                after[position[u]].append((position[v], step))
        states = {tuple(self.earliest[v] for v in acts): 1}
        work = 0
        for i, v in enumerate(acts):
            work += len(states) * (1 + self.slack[v]) * (len(acts) - i)
            if work > _WORK:
                return sum(states.values()), False
            following: dict[tuple[int, ...], int] = {}
            for bounds, ways in states.items():
                for place in range(bounds[0], self.latest[v] + 1):
                    new = list(bounds[1:])
                    for later, step in after[i]:
                        new[later - i - 1] = max(new[later - i - 1], place + step)
                    key = tuple(new)
                    following[key] = following.get(key, 0) + ways
            states = following
        return sum(states.values()), True
