"""Who has a turn together: a network's stages, as far as their players take part in a step."""

from __future__ import annotations

from collections.abc import Sequence

from ocnopt.control.batch import Batch
from ocnopt.control.cooperation import Known
from ocnopt.control.party import parties
from ocnopt.control.players import Player
from ocnopt.control.turns import Group, Turn

__all__ = ["Grouping", "with_strays"]


class Grouping:
    """Makes groups of a step's turns, and keeps what joint solutions carry from step to step.

    Attributes:
        known: Couplings of players who solve jointly, by their names.
        alone: Why who acts by itself at a stage with others, or out of its stage, in the last step.
    """

    def __init__(self) -> None:
        self.known: Known = {}
        self.alone: dict[Player, str] = {}

    def groups(
        self,
        stages: Sequence[Sequence[str]],
        turns: list[Turn],
        batches: list[Batch],
        jointly: bool,
    ) -> list[Group]:
        """The turns by stage.

        Args:
            stages: Names of the network's players, by stage.
            turns: Those who take part, in the order of their first calls.
            batches: Recorded samples.
            jointly: Whether players of a stage solve jointly where they can.
        """
        here = {turn.player.name: turn for turn in turns}
        found = [[here.pop(name) for name in stage if name in here] for stage in stages]
        found = [stage for stage in found if stage]
        self.alone = {}
        if here:
            found = self._with_strays(found, turns, list(here))
        groups = []
        for stage in found:
            group = Group(stage)
            if jointly and len(stage) > 1:
                together, alone = parties(stage, batches, self.known)
                group.parties = list(together)
                self.alone.update(alone)
            groups.append(group)
        # Factors move on while another alignment is played: what was made of them is stale then.
        played = {
            tuple(turn.player.name for turn in party.turns)
            for group in groups
            for party in group.parties
        }
        for names in self.known.keys() - played:
            del self.known[names]
        return groups

    def _with_strays(
        self, stages: list[list[Turn]], turns: list[Turn], strays: list[str]
    ) -> list[list[Turn]]:
        """Stages with what the model did not call when its game was found, and why who is alone."""
        found = with_strays(stages, turns)
        together = [set(map(id, stage)) for stage in found]
        parted = {id(t) for stage in stages if set(map(id, stage)) not in together for t in stage}
        for stage in found:
            turn = stage[0]
            if turn.player.name in strays:
                why = "it was not called when the game was found"
            elif len(stage) == 1 and id(turn) in parted:
                why = f"{', '.join(map(repr, strays))} not in the game, called before its stage"
            else:
                continue
            self.alone[turn.player] = f"acts alone: {why}"
        return found


def with_strays(stages: list[list[Turn]], turns: list[Turn]) -> list[list[Turn]]:
    """Stages, with turns that have none put between them by the order of their calls.

    Whoever was called before such a turn acts before it, in a stage of its own if its place was
    later; whoever was called after it acts after it.

    Args:
        stages: Turns by stage.
        turns: All turns, in the order of their first calls.
    """
    called = {id(turn): place for place, turn in enumerate(turns)}
    placed = [list(stage) for stage in stages]
    known = {id(turn) for stage in stages for turn in stage}
    for turn in turns:
        if id(turn) in known:
            continue
        now = called[id(turn)]
        follows = [any(called[id(t)] > now for t in stage) for stage in placed]
        place = follows.index(True) if True in follows else len(placed)
        earlier = [t for stage in placed[place:] for t in stage if called[id(t)] < now]
        rest = [[t for t in stage if called[id(t)] > now] for stage in placed[place:]]
        placed[place:] = [[t] for t in (*earlier, turn)] + [stage for stage in rest if stage]
    return placed
