"""What the game of a configured network is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocnopt.control.game import Game, find_game
from ocnopt.control.players import Player, Unowned, find_players
from ocnopt.errors import GraphError, OptionError
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.data.sets import SETS
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.own import told
from ocnopt.experiments.setup import build_network, load_data

__all__ = ["Inspection", "Reach", "inspect_network", "kind", "shapes"]

_SAMPLES = 2


@dataclass(frozen=True)
class Reach:
    """Where one player may act, in coarse stages.

    Attributes:
        place: Where it acts in the alignment that is shown.
        earliest: Where it acts at the earliest.
        latest: Where it acts at the latest.
    """

    place: int
    earliest: int
    latest: int


@dataclass(frozen=True)
class Inspection:
    """A network and its game.

    Attributes:
        dataset: What the network is for.
        network: Which it is.
        parameters: Number of trained parameters.
        game: Its game.
        alignment: The alignment that is shown.
        reach: Where players may act, by name.
        alive: Shapes of the tensors alive at every stage's start, without the batch dimension, by
            name.
        unowned: Parameters that no player owns.
    """

    dataset: str
    network: str
    parameters: int
    game: Game
    alignment: int
    reach: dict[str, Reach]
    alive: tuple[dict[str, tuple[int, ...]], ...]
    unowned: tuple[Unowned, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        game = self.game
        stages = [
            {
                "stage": stage.index,
                "players": [self._player(player) for player in stage.players],
                "alive": {name: list(shape) for name, shape in alive.items()},
            }
            for stage, alive in zip(game.stages(self.alignment), self.alive, strict=True)
        ]
        return {
            "dataset": self.dataset,
            "network": self.network,
            "parameters": self.parameters,
            "players": len(game.players),
            "alignment": self.alignment,
            "alignments": game.alignments,
            "placements": game.placements,
            "exact": game.exact,
            "stages": stages,
            "branches": [
                {
                    "players": [player.name for player in branch.players],
                    "earliest": list(branch.earliest),
                    "latest": list(branch.latest),
                    "placements": branch.placements,
                    "exact": branch.exact,
                }
                for branch in game.branches
            ],
            "idle": [player.name for player in game.idle],
            "unowned": [
                {"parameter": part.name, "kind": part.kind, "reason": part.reason}
                for part in self.unowned
            ],
        }

    def _player(self, player: Player) -> dict[str, Any]:
        reach = self.reach[player.name]
        return {
            "name": player.name,
            "kind": kind(player),
            "shapes": shapes(player),
            "place": reach.place,
            "earliest": reach.earliest,
            "latest": reach.latest,
        }


def inspect_network(config: TrainConfig, alignment: int = 0) -> Inspection:
    """Build a network and find its game.

    Args:
        config: Which network, for which data.
        alignment: What to show; -1 is the last.

    Raises:
        InputError: Data or network cannot be had or do not fit; the network cannot be traced; there
            is no such alignment.
    """
    config = config.resolved()
    data = _few_samples(config)
    torch.manual_seed(config.seed)
    model = build_network(config, data)
    x = data.train_x
    try:
        model(x)
    except Exception as error:  # whatever the user's own network raises
        raise InputError(
            f"network {config.network} cannot take inputs of shape {tuple(x.shape)}: {told(error)}"
        ) from error
    players, unowned = find_players(model)
    if not players:
        raise InputError(
            f"network {config.network} has no player: no layer of a kind that is known"
        )
    try:
        game = find_game(model, players, ((x,), {}))
        if alignment == -1:
            alignment = game.alignments - 1
        stages = game.stages(alignment)
    except (GraphError, OptionError) as error:
        raise InputError(str(error)) from error
    early, late, here = (game.places(k) for k in (0, game.alignments - 1, alignment))
    reach = {name: Reach(here[name], early[name], late[name]) for name in here}
    state = game.start(x, alignment=alignment)
    alive = []
    for _ in stages:
        alive.append({name: _shape(value) for name, value in state.tensors.items()})
        state = game.step(state)
    return Inspection(
        config.dataset,
        config.network,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        game,
        alignment,
        reach,
        tuple(alive),
        tuple(unowned),
    )


def kind(player: Player) -> str:
    """The class of a player's module."""
    return type(player.module).__name__


def shapes(player: Player) -> dict[str, list[int]]:
    """Shapes of a player's parameters, by name."""
    return {
        name: list(param.shape)
        for name, param in zip(player.layer.names, player.params, strict=True)
    }


def _few_samples(config: TrainConfig) -> Data:
    """A batch to trace with. Sets of ours are not read for it: their shapes are known."""
    if config.dataset in SETS:
        facts = SETS[config.dataset]  # type: ignore[index]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_SAMPLES, *facts.shape, generator=generator)
        y = torch.zeros(_SAMPLES, dtype=torch.long)
        return Data(x, y, x, y, facts.classes)
    data = load_data(replace(config, batch_size=None))
    few = slice(_SAMPLES)
    x, y = data.train_x[few], data.train_y[few]
    return Data(x, y, x, y, data.classes)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Tensor):
        return ()
    shape = tuple(value.shape)
    return shape[1:] if shape[:1] == (_SAMPLES,) else shape
