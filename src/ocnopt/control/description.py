"""The stages of a game as a user describes them: lists of modules' names, first to last."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from ocnopt.control.placement import Act
from ocnopt.control.players import Player, Unowned
from ocnopt.errors import OptionError

__all__ = ["described_acts", "suggest"]


def described_acts(
    stages: object, players: Sequence[Player], unowned: Sequence[Unowned]
) -> list[Act]:
    """The acts of a game whose stages are given by hand, each after all of the stage before it.

    Args:
        stages: Names of the modules that act at each stage; every player once.
        players: Who is to act.
        unowned: What is no player, and why.

    Raises:
        OptionError: Stages are no lists of names; a name is no player, or is given twice; a player
            is left out.
    """
    by_name = {player.name: player for player in players}
    listed = _lists_of_names(stages)
    for name, count in Counter(name for stage in listed for name in stage).items():
        if name not in by_name:
            reasons = {u.module: u.reason for u in unowned}
            why = reasons.get(name) or suggest(name, by_name)
            raise OptionError(f"stages name {name!r}, which is no player: {why}")
        if count > 1:
            raise OptionError(f"stages name player {name!r} {count} times; name it once")
    left_out = by_name.keys() - {name for stage in listed for name in stage}
    if left_out:
        missing = ", ".join(repr(p.name) for p in players if p.name in left_out)
        raise OptionError(f"stages leave out the players {missing}; give each its place")
    acts: list[Act] = []
    before: frozenset[int] = frozenset()
    for stage in filter(None, listed):
        first = len(acts)
        acts += [Act((by_name[name],), False, before, frozenset(), True) for name in stage]
        before = frozenset(range(first, len(acts)))
    return acts


def suggest(name: object, known: Iterable[str]) -> str:
    """Which name may have been meant.

    Args:
        name: What was given.
        known: What there is.
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, 1) if isinstance(name, str) else []
    if close:
        return f"did you mean {close[0]!r}?"
    return f"players are {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}"


def _lists_of_names(stages: object) -> list[list[str]]:
    """Stages as they are to be described, or an error that says how."""
    example = "give stages as lists of names, such as [['stem'], ['conv1', 'shortcut'], ['head']]"
    if isinstance(stages, str) or not isinstance(stages, Iterable):
        raise OptionError(f"stages={stages!r}; {example}")
    listed = []
    for t, stage in enumerate(stages):
        if isinstance(stage, (str, nn.Module)) or not isinstance(stage, Iterable):
            raise OptionError(f"stage {t} is {_brief(stage)}, not a list; {example}")
        listed.append(list(stage))
        for name in listed[-1]:
            if not isinstance(name, str):
                raise OptionError(f"stage {t} holds {_brief(name)}, not a name; {example}")
    return listed


def _brief(thing: object) -> str:
    """What it is, in a word: modules are long."""
    return f"a {type(thing).__name__} module" if isinstance(thing, nn.Module) else repr(thing)
