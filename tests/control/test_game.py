"""The game of a network: its stages composed are the network, bit for bit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from control.game_networks import (
    PER_SAMPLE,
    TRACED,
    Attention,
    Encoder,
    InceptionBlock,
    Residual,
    TwoInputs,
    inception,
    made,
    pre_activation,
    residual,
    tokens,
)
from torch import nn

from ocnopt import DDPNOpt
from ocnopt.control.game import find_game
from ocnopt.control.players import find_players
from ocnopt.control.tape import Tape
from ocnopt.layers.norm import AffineLayer


def names(stages):
    return [[player.name for player in stage.players] for stage in stages]


def settings(game):
    """Every alignment of a small game: shared ones, then all placements."""
    yield from range(game.alignments)
    parts = []
    for branch in game.branches:
        ranges = [range(a, b + 1) for a, b in zip(branch.earliest, branch.latest, strict=True)]
        keys = [player.name for player in branch.players]
        parts.append(
            [dict(zip(keys, places, strict=True)) for places in itertools.product(*ranges)]
        )
    for chosen in itertools.product(*parts):
        wished = {name: place for part in chosen for name, place in part.items()}
        try:
            game.places(wished)
        except ValueError:
            continue
        yield wished


@pytest.mark.parametrize("name", TRACED)
def test_row_23_stages_composed_are_the_network(name):
    """``F_{T-1}(.. F_0) ==`` the module's own forward, bitwise in evaluation."""
    model, x = made(name)
    game = find_game(model)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        for alignment in settings(game):
            assert torch.equal(game.run(x.clone(), alignment=alignment), expected), alignment


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_training_mode_and_gradients(name):
    model, x = made(name)
    game = find_game(model, inputs=((x,), {}))
    params = list(model.parameters())
    expected = model(x.clone())
    expected_grads = torch.autograd.grad(expected.square().sum(), params)
    for k in range(game.alignments):
        found = game.run(x.clone(), alignment=k)
        assert torch.equal(found, expected)
        grads = torch.autograd.grad(found.square().sum(), params)
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TRACED)
def test_every_player_acts_once_and_normalizations_right_behind(name):
    model, _ = made(name)
    players, _ = find_players(model)
    game = find_game(model, players)
    assert game.players == tuple(players) and game.idle == ()
    for k in range(game.alignments):
        stages = game.stages(k)
        assert all(stage.players for stage in stages)
        assert [stage.index for stage in stages] == list(range(len(stages)))
        acting = [player for stage in stages for player in stage.players]
        assert sorted(p.index for p in acting) == list(range(len(players)))
        places = game.places(k)
        assert game.stages(places) == stages
        coarse = {
            place
            for player, place in ((p, places[p.name]) for p in players)
            if not isinstance(player.layer, AffineLayer)
        }
        assert coarse == set(range(max(coarse) + 1)) or name.startswith("dense")


@pytest.mark.parametrize("name", TRACED)
def test_the_state_is_what_is_alive(name):
    """What a step hands on has the names that the stage has, and is all that is needed."""
    model, x = made(name)
    model.eval()
    game = find_game(model)
    for k in range(game.alignments):
        state = game.start(x.clone(), alignment=k)
        for stage in game.stages(k):
            assert state.stage == stage.index
            assert tuple(state.tensors) == stage.alive
            assert all(isinstance(tensor, torch.Tensor) for tensor in state.tensors.values())
            assert len({id(tensor) for tensor in state.tensors.values()}) == len(stage.alive)
            state = game.step(state)
        assert torch.equal(game.finish(state), model(x.clone()))


def test_a_chain_has_one_player_a_stage():
    game = find_game(made("mlp")[0])
    assert names(game.stages()) == [["0"], ["2"], ["4"]]
    assert (game.alignments, game.placements, game.branches) == (1, 1, ())
    assert [len(stage.alive) for stage in game.stages()] == [1, 1, 1]


def test_residual_blocks():
    """An identity shortcut is alive beside the main path; a projection is a second player."""
    model, _ = residual("projection", "none")
    game = find_game(model)
    assert names(game.stages(0)) == [
        ["0"],
        ["1.convs.0"],
        ["1.convs.1"],
        ["2.convs.0", "2.shortcut.0"],
        ["2.convs.1"],
        ["5"],
    ]
    assert names(game.stages(1))[3:5] == [["2.convs.0"], ["2.convs.1", "2.shortcut.0"]]
    assert [len(stage.alive) for stage in game.stages(0)] == [1, 1, 2, 1, 2, 1]


def test_normalizations_stay_behind_their_layer():
    model, _ = residual("projection", "batch")
    game = find_game(model)
    early, late = (names(game.stages(k)) for k in (0, 1))
    assert early[5:9] == [
        ["2.convs.0", "2.shortcut.0"],
        ["2.norms.0", "2.shortcut.1"],
        ["2.convs.1"],
        ["2.norms.1"],
    ]
    assert late[5:9] == [
        ["2.convs.0"],
        ["2.norms.0"],
        ["2.convs.1", "2.shortcut.0"],
        ["2.norms.1", "2.shortcut.1"],
    ]


def test_a_network_may_begin_with_a_normalization():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2))
    game = find_game(model)
    assert names(game.stages()) == [["0"], ["1"], ["2"], ["3"]]
    assert game.places() == {"0": 0, "1": 0, "2": 1, "3": 2}
    game = find_game(pre_activation("group")[0])
    assert game.alignments == 2
    model.eval()
    x = torch.randn(5, 4)
    assert torch.equal(find_game(model).run(x), model(x))


def test_queries_keys_and_values_act_together():
    model, x = Attention(), tokens()
    game = find_game(model)
    assert names(game.stages()) == [
        ["embed"],
        ["norm1"],
        ["q", "k", "v"],
        ["out"],
        ["norm2"],
        ["fc1"],
        ["fc2"],
        ["head"],
    ]
    assert torch.equal(game.run(x), model(x))


def test_a_module_used_again_acts_where_it_is_first_used():
    model, x = made("shared")
    game = find_game(model)
    assert names(game.stages(0)) == [["stem"], ["again", "aside"], ["head"]]
    assert [p.name for p in game.stages(0)[0].players] == ["stem"]
    assert torch.equal(game.run(x), model(x))


def test_several_inputs_and_outputs_unused_players_and_arguments():
    torch.manual_seed(0)
    model = TwoInputs().eval()
    game = find_game(model)
    assert game.alignments == 3
    assert game.places(2) == {"a1": 0, "a2": 1, "a3": 2, "b": 2, "norm": 2, "head": 3, "unused": 3}
    x, y, mask = torch.randn(3, 5), torch.randn(3, 4), torch.rand(3, 6)
    for k in range(game.alignments):
        for kwargs in ({}, {"mask": mask}, {"mask": None}):
            expected, found = model(x, y=y, **kwargs), game.run(x, y=y, alignment=k, **kwargs)
            assert torch.equal(found["out"], expected["out"])
            for a, b in zip(found["features"], expected["features"], strict=True):
                assert torch.equal(a, b)
    assert any("unused" in stage for stage in names(game.stages()))


def test_a_player_that_is_never_called_is_idle():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    game = find_game(Net())
    assert [p.name for p in game.idle] == ["spare"]
    assert names(game.stages()) == [["used"]]


def test_transformer_encoder_by_export():
    """Evaluation and training, and another batch size than the game was found with."""
    torch.manual_seed(0)
    model = Encoder()
    game = find_game(model, inputs=((tokens(),), {}))
    assert names(game.stages()) == [
        ["tokens", "positions"],
        ["encoder.layers.0.norm1"],
        ["encoder.layers.0.linear1"],
        ["encoder.layers.0.linear2"],
        ["encoder.layers.0.norm2"],
        ["encoder.layers.1.norm1"],
        ["encoder.layers.1.linear1"],
        ["encoder.layers.1.linear2"],
        ["encoder.layers.1.norm2"],
        ["head"],
    ]
    x = tokens()
    assert torch.equal(game.run(x), model(x))
    model.eval()
    assert torch.equal(game.run(x[:2]), model(x[:2]))
    with torch.no_grad():  # the weights are the model's own, not those it was traced with
        model.head.weight.mul_(2.0)
    assert torch.equal(game.run(x[:2]), model(x[:2]))


def test_row_24_residual_block_augmentation():
    """``J_z + J_r == dL/d(block input)``: a copy per use, each with a gradient of its own."""
    torch.manual_seed(0)
    block = Residual(4, 6, "projection", "none")
    head = nn.Linear(6, 3)
    x, y = torch.randn(3, 4, 8, 8, requires_grad=True), torch.tensor([0, 1, 2])

    def loss(z, r):
        h = block.convs[1](F.relu(block.convs[0](z))) + block.shortcut(r)
        return F.cross_entropy(head(F.relu(h).mean((2, 3))), y)

    z, r = x.view_as(x), x.view_as(x)
    grad_z, grad_r = torch.autograd.grad(loss(z, r), (z, r))
    (whole,) = torch.autograd.grad(F.cross_entropy(head(block(x).mean((2, 3))), y), x)
    torch.testing.assert_close(grad_z + grad_r, whole, rtol=0, atol=1e-6)
    assert min(float(grad_z.abs().max()), float(grad_r.abs().max())) > 1e-4

    # the tape of a recorded pass forks the same way
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(2, 4, 1), block, head

        def forward(self, images):
            self.entered = self.stem(images)
            return self.head(self.block(self.entered).mean((2, 3)))

    model = Net()
    tape = Tape(model, find_players(model)[0], columns=False)
    value = F.cross_entropy(model(torch.randn(3, 2, 8, 8)), y)
    (total,) = torch.autograd.grad(value, model.entered, retain_graph=True)
    for edge in tape.edges:
        edge.arrivals.grads.clear()
    value.backward()
    edges = [e for e in tape.edges if e.value.data_ptr() == model.entered.data_ptr()]
    assert len(edges) == 2  # the main path's and the shortcut's
    parts = [sum(grad for _, grad in edge.arrivals.grads) for edge in edges]
    torch.testing.assert_close(sum(parts), total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_row_25_projection_shortcut_is_a_second_player(depth, norm):
    """At every stage of a main path of d layers, and the forward is unchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Residual(4, 6, "projection", norm, depth)).eval()
    game = find_game(model)
    assert game.alignments == game.placements == depth
    x = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        expected = model(x)
        for k in range(depth):
            together = [s for s in names(game.stages(k)) if "1.shortcut.0" in s]
            assert together == [[f"1.convs.{k}", "1.shortcut.0"]]
            assert torch.equal(game.run(x, alignment=k), expected)


def test_row_26_inception_branches_are_players():
    """Branches of unequal depth act together; how they are padded changes no output."""
    torch.manual_seed(0)
    model = nn.Sequential(InceptionBlock(2)).eval()
    game = find_game(model)
    assert names(game.stages(0)) == [
        ["0.one", "0.two1", "0.three1", "0.pooled"],
        ["0.two2", "0.three2"],
        ["0.three3"],
    ]
    assert names(game.stages(game.alignments - 1)) == [
        ["0.three1"],
        ["0.two1", "0.three2"],
        ["0.one", "0.two2", "0.three3", "0.pooled"],
    ]
    x = torch.randn(2, 2, 8, 8)
    found = list(settings(game))
    assert len(found) == game.alignments + 3 * 3 * 3
    with torch.no_grad():
        expected = model(x)
        for alignment in found:
            assert torch.equal(game.run(x, alignment=alignment), expected)


def test_row_33_number_of_arms():
    """A projection beside d layers has d arms; a branch of p layers beside d has C(d, p)."""
    game = find_game(inception()[0])
    assert game.alignments == 3
    assert sorted(branch.placements for branch in game.branches) == [3] * 6
    assert game.placements == 3**6
    model, x = inception()
    model.eval()
    game = find_game(model)
    expected = model(x)
    assert all(torch.equal(game.run(x, alignment=k), expected) for k in range(game.alignments))


def test_an_optimizers_hooks_record_nothing_of_it():
    model, x = made("residual projection group")
    criterion = nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, criterion, lr=0.1)
    find_game(model, inputs=((x,), {}))
    assert not optimizer.recorder.passes and optimizer.recorder.current is None
    criterion(model(x), torch.tensor([0, 1, 2])).backward()
    find_game(model, inputs=((x,), {}))
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
