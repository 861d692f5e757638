"""What needs the model's forward pass a second time: the nonlinear rollout, the actual decrease."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ocnopt.control.passes import Pass
from ocnopt.control.players import Player
from ocnopt.control.replay import as_seen, run_again, without_autocast
from ocnopt.control.sweep import Sweep
from ocnopt.control.turns import Group
from ocnopt.errors import GraphError

__all__ = ["actual_decrease", "nonlinear_rollout"]


def nonlinear_rollout(
    model: nn.Module,
    sweep: Sweep,
    recorded: Pass,
    advice: Callable[[Sequence[Player]], str],
) -> None:
    """Lines 14 to 18 of Algorithm 3: a second forward pass that applies updates on its way.

    The weights are put back at its end: the updates are applied for good together with all others,
    once they are known to be finite.

    Args:
        model: The model.
        sweep: After its backward pass; its turns' changes are filled in.
        recorded: The pass that is run again.
        advice: What to do where the stages have another order than these players' calls.

    Raises:
        GraphError: The model calls layers in another order than the game's stages have.
    """
    tape = recorded.tape
    assert tape is not None and recorded.inputs is not None
    assert recorded.setting is not None
    group_of = {turn.player: group for group in sweep.groups for turn in group.turns}
    acted: set[int] = set()
    passed: set[Player] = set()
    starts = {player: i for i, player in enumerate(tape.starts)}
    backup = [(p, p.clone()) for turn in sweep.turns for p in turn.player.params]

    def on_start(player: Player) -> None:
        group = group_of.get(player)
        if group is None:
            return
        if id(group) not in acted:
            late = _still_to_act(sweep, group, passed)
            if late is not None:
                called = [p for p in tape.starts if p in group_of]
                raise GraphError(
                    f"rollout='nonlinear' follows the order of calls, but the model calls layer "
                    f"{player.name!r} before {late.name!r}, which acts at an earlier stage; "
                    f"{advice(called)}"
                )
            acted.add(id(group))
            with without_autocast():  # the forward pass may have one
                sweep.act(group, [tape.rho(starts[player], sweep.batches[0])])
                for turn in group.turns:
                    torch._foreach_add_(list(turn.player.params), list(turn.delta))
                sweep.follow(group)
        passed.add(player)

    try:
        run_again(model, recorded.setting, recorded.inputs, tape.second_pass(on_start))
    finally:
        for p, kept in backup:
            p.copy_(kept)


def _still_to_act(sweep: Sweep, group: Group, passed: set[Player]) -> Player | None:
    """Who of the stages before this one has not been called, so that its state cannot be seen."""
    for before in sweep.groups:
        if before is group:
            break
        for turn in before.turns:
            if turn.player not in passed:
                return turn.player
    return None


def actual_decrease(model: nn.Module, criterion: nn.Module, passes: Sequence[Pass]) -> float | None:
    """By how much the loop's loss fell on the step's own batches, run with the new weights.

    What counts is what ``backward`` was called on: every call of the criterion with the factor by
    which the loop multiplied it, and none that took no part.

    Args:
        model: The model.
        criterion: The criterion.
        passes: What the step was made of.

    Returns:
        The decrease, a sum over the passes; None where the loop did more to the model's output
        than view it before it called the criterion.
    """
    fall = 0.0
    for recorded in passes:
        if recorded.setting is None or recorded.inputs is None or recorded.forwards != 1:
            return None
        output = run_again(model, recorded.setting, recorded.inputs)
        for call in recorded.calls:
            if call.scale is None:
                continue
            seen = as_seen(call.output, recorded.result, output)
            if seen is None:
                return None
            value = criterion.forward(seen, *call.args, **call.kwargs)
            fall += float((call.scale * (call.loss - value)).sum())
    return fall
