"""The picture of a game: every player has its box, and no two boxes share a place."""

import pytest
import torch
from control.game_networks import TRACED, Encoder, TwoInputs, made, tokens

from ocnopt import OptionError
from ocnopt.control.game import Game, find_game
from ocnopt.experiments.figures.game import save_game
from ocnopt.experiments.figures.game_layout import lay_out


def found(name):
    torch.manual_seed(0)
    if name == "encoder":
        return find_game(Encoder(), inputs=((tokens(),), {}))
    return find_game(TwoInputs() if name == "two inputs" else made(name)[0])


@pytest.mark.parametrize("name", [*TRACED, "two inputs", "encoder"])
def test_boxes(name):
    game = found(name)
    for k in range(game.alignments):
        layout = lay_out(game, k)
        spots = [spot for spot in layout.spots.values() if spot.vertex.kind == "players"]
        drawn = [player for spot in spots for player in spot.vertex.players]
        acting = [player for stage in game.stages(k) for player in stage.players]
        assert sorted(p.index for p in drawn) == sorted(p.index for p in acting)
        assert len({(spot.stage, spot.lane) for spot in spots}) == len(spots)
        assert all(0 <= spot.lane < layout.lanes for spot in layout.spots.values())
        for spot in spots:
            left, right = layout.columns[spot.stage]
            assert left <= spot.x - spot.half + 1e-9 and spot.x + spot.half <= right + 1e-9
        edges = [edge for column in layout.columns for edge in column]
        assert edges == sorted(edges)
        for line in layout.lines:
            assert line.start.x < line.end.x
            if line.way == "straight":  # it runs through no box
                between = [s for s in spots if s.lane == line.start.lane]
                assert not any(line.start.x < s.x < line.end.x for s in between)


def test_the_longest_path_is_the_uppermost():
    game = found("inception")
    for k in range(3):
        lane = {
            player.name: spot.lane
            for spot in lay_out(game, k).spots.values()
            for player in spot.vertex.players
        }
        assert {lane[f"1.three{i}"] for i in (1, 2, 3)} == {0}
        assert lane["1.two1"] == lane["1.two2"] > 0
        assert len({lane["1.one"], lane["1.two1"], lane["1.pooled"]}) == 3


def test_a_skip_is_an_arc():
    lines = lay_out(found("residual identity none"), 0).lines
    arcs = [line for line in lines if line.way == "arc"]
    assert [line.end.vertex.kind for line in arcs] == ["merge", "merge"]


@pytest.mark.parametrize("name", ["residual projection batch", "inception"])
def test_a_file(name, tmp_path):
    game = found(name)
    save_game(tmp_path / "game.png", game, game.alignments - 1, "a title")
    assert (tmp_path / "game.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="give 0 to"):
        save_game(tmp_path / "game.png", game, 9, "a title")


def test_a_described_game_has_no_picture(tmp_path):
    game = Game.described(made("mlp")[0], [["0"], ["2"], ["4"]])
    with pytest.raises(OptionError, match="cannot be drawn"):
        save_game(tmp_path / "game.png", game, 0, "a title")
