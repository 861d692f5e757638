"""Tracing: what is overwritten in place, what cannot be traced, and that nothing is left behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from control.game_networks import Encoder, made, tokens
from torch import nn

from ocnopt import GraphError
from ocnopt.control.game import Game, find_game
from ocnopt.control.players import find_players


class Net(nn.Module):
    """Three layers, and a forward given as a function of them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.side = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def read_before_written(net, x):
    """The side layer must see x as it was: it cannot come after the activation."""
    x = net.a(x)
    side = net.side(x)
    return net.c(net.b(net.relu(x))) + side


def read_after_written(net, x):
    x = net.a(x)
    y = net.relu(x)
    return net.c(net.b(y)) + net.side(x)


def view_written(net, x):
    x = net.a(x)
    side = net.side(x)
    x.view(-1, 2).mul_(2.0)
    return net.c(net.b(x)) + side


def slice_written(net, x):
    x = net.a(x)
    side = net.side(x)
    x[:, :2] = 0.0
    return net.c(net.b(x)) + side


def augmented(net, x):
    x = net.a(x)
    y, side = x, net.side(x)
    y += 1.0
    return net.c(net.b(x)) + side


def functional(net, x):
    x = net.a(x)
    side = net.side(x)
    x = F.relu(x, True)
    return net.c(F.leaky_relu_(net.b(x))) + side


def through_dropout(net, x):
    """In evaluation dropout returns its very input."""
    x = net.a(x)
    side = net.side(x)
    net.drop(x).tanh_()
    return net.c(net.b(x)) + side


def out_argument(net, x):
    x = net.a(x)
    side = net.side(x)
    with torch.no_grad():
        torch.mul(x.detach(), 2.0, out=x.detach())
    return net.c(net.b(x)) + side


def result_reused(net, x):
    """The residual sum is written into the main path's result, which nobody else reads."""
    x = net.a(x)
    h = net.c(net.b(x))
    h += net.side(x)
    return net.relu(h)


FREE = {"result_reused": 2, "read_after_written": 2}
WRITES = [
    read_before_written,
    read_after_written,
    view_written,
    slice_written,
    augmented,
    functional,
    through_dropout,
    out_argument,
    result_reused,
]


@pytest.mark.parametrize("forward", WRITES)
def test_readers_see_what_they_saw(forward):
    """A write in place takes from the alignments those that it would spoil, and no others."""
    torch.manual_seed(0)
    net, x = Net(forward).eval(), torch.randn(3, 4)
    with torch.no_grad():
        expected = net(x.clone())
        game = find_game(net)
        assert game.alignments == FREE.get(forward.__name__, 1)
        for k in range(game.alignments):
            assert torch.equal(game.run(x.clone(), alignment=k), expected)


def test_buffers_are_written_when_it_runs_and_not_when_it_is_traced():
    def forward(net, x):
        net.calls += 1
        net.calls.add_(1)
        return net.a(x) * net.calls

    net, x = Net(forward), torch.randn(2, 4)
    game = find_game(net)
    assert net.calls == 0
    twin = copy.deepcopy(net)
    for _ in range(2):
        assert torch.equal(game.run(x), twin(x))
    assert net.calls == twin.calls == 4


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", ["residual projection batch", "attention", "encoder"])
def test_the_model_is_left_as_it_was(name, mode):
    model, x = (Encoder(), tokens()) if name == "encoder" else made(name)
    model.train(mode)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: seen.append(args))
        module.register_forward_pre_hook(lambda *args: seen.append(args))
    before = {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "keys": [set(vars(m)) for m in model.modules()],
        "hooks": [(id(m._forward_hooks), len(m._forward_hooks)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "versions": [t._version for t in model.parameters()],
        "random": torch.get_rng_state(),
        "gradients": torch.is_grad_enabled(),
    }
    find_game(model, inputs=((x,), {}))
    assert not seen
    assert all(torch.equal(v, before["state"][k]) for k, v in model.state_dict().items())
    assert [set(vars(m)) for m in model.modules()] == before["keys"]
    hooks = [(id(m._forward_hooks), len(m._forward_hooks)) for m in model.modules()]
    assert hooks == before["hooks"]
    assert [m.training for m in model.modules()] == before["modes"]
    assert [t._version for t in model.parameters()] == before["versions"]
    assert torch.equal(torch.get_rng_state(), before["random"])
    assert torch.is_grad_enabled() == before["gradients"]
    assert all(p.grad is None for p in model.parameters())


def test_what_a_forward_stores_is_not_a_stand_in():
    def forward(net, x):
        net.last = net.a(x)
        return net.b(net.last)

    net, x = Net(forward), torch.randn(2, 4)
    game = find_game(net)
    assert not hasattr(net, "last")
    assert torch.equal(game.run(x), net(x))
    kept = net.last
    find_game(net, inputs=((x,), {}))
    assert net.last is kept


def test_constants_made_on_the_way():
    def forward(net, x):
        return net.a(x) + torch.tensor([1.0, 2.0, 3.0, 4.0])

    net, x = Net(forward), torch.randn(2, 4)
    game = find_game(net)
    assert not any(name.startswith("_tensor") for name in vars(net))
    assert torch.equal(game.run(x), net(x))


def test_the_mode_is_that_of_the_run():
    """A functional dropout has the mode written into the trace; a run asks for another trace."""

    def forward(net, x):
        return net.b(F.dropout(net.a(x), 0.5, net.training))

    net, x = Net(forward), torch.randn(5, 4)
    game = find_game(net)
    net.eval()
    assert torch.equal(game.run(x), net(x))
    net.train()
    torch.manual_seed(1)
    expected = net(x)
    torch.manual_seed(1)
    assert torch.equal(game.run(x), expected)


def test_dropout_is_compared_on_the_same_random_numbers():
    def forward(net, x):
        return net.b(net.drop(net.a(x))) + net.drop(net.side(x))

    net, x = Net(forward), torch.randn(5, 4)
    game = find_game(net, inputs=((x,), {}))
    assert [len(stage.players) for stage in game.stages()] == [2, 1]


def test_another_network_in_evaluation_is_refused():
    def forward(net, x):
        return net.b(net.a(x)) + net.c(x) if net.training else net.a(x)

    net = Net(forward)
    game = find_game(net)
    net.eval()
    with pytest.raises(GraphError, match="another one in this mode"):
        game.run(torch.zeros(2, 4))


def test_control_flow_on_shapes_is_exported():
    """Only what the inputs take is in the game."""

    def forward(net, x):
        return net.b(net.a(x)) if x.shape[1] == 4 and len(x) else net.c(x)

    net, x = Net(forward), torch.randn(3, 4)
    game = find_game(net, inputs=((x,), {}))
    assert [[p.name for p in stage.players] for stage in game.stages()] == [["a"], ["b"]]
    assert torch.equal(game.run(x), net(x))
    assert torch.equal(game.run(x[:2]), net(x[:2]))


def test_a_wrong_turn_is_noticed():
    """Symbolic tracing takes the branch for what is no tensor, and does not notice."""

    def forward(net, x):
        return net.b(net.a(x)) if isinstance(x, torch.Tensor) else net.b(x)

    net, x = Net(forward), torch.randn(3, 4)
    game = find_game(net, inputs=((x,), {}))
    assert [[p.name for p in stage.players] for stage in game.stages()] == [["a"], ["b"]]


def test_what_cannot_be_traced_says_so():
    def forward(net, x):
        return net.b(net.a(x)) if x.sum() > 0 else net.c(x)

    net = Net(forward)
    with pytest.raises(GraphError, match=r"no example inputs.*Game\.described"):
        find_game(net)
    with pytest.raises(GraphError, match=r"torch\.fx: .*torch\.export: .*Game\.described"):
        find_game(net, inputs=((torch.ones(2, 4),), {}))


def test_a_run_stage_by_stage_ends_where_the_stages_do():
    model, x = made("mlp")
    game = find_game(model)
    state = game.start(x)
    for t in range(3):
        with pytest.raises(GraphError, match=f"stage {t}.* take the {3 - t} that are left"):
            game.finish(state)
        state = game.step(state)
    with pytest.raises(GraphError, match=r"all 3 stages have been taken; finish\(state\)"):
        game.step(state)
    assert torch.equal(game.finish(state), model(x))


def test_a_layer_whose_weight_is_used_without_a_call():
    def forward(net, x):
        return F.linear(net.a(x), net.b.weight.t(), net.b.bias) + net.side(x)

    net, x = Net(forward), torch.randn(2, 4)
    game = find_game(net)
    assert [[p.name for p in stage.players] for stage in game.stages(0)] == [["a", "side"], ["b"]]
    assert [p.name for p in game.idle] == ["c"]
    assert torch.equal(game.run(x), net(x))


def test_the_model_itself_may_be_the_player():
    layer = nn.Linear(3, 2)
    game = find_game(layer)
    assert [[p.name for p in stage.players] for stage in game.stages()] == [[""]]
    x = torch.randn(2, 3)
    assert torch.equal(game.run(x), layer(x))


def test_a_compiled_model_has_the_game_of_the_model():
    model, x = made("residual projection group")
    compiled = torch.compile(model, backend="eager")
    game = find_game(compiled, find_players(compiled)[0])
    assert game.alignments == 2
    assert game.players[0].name == "_orig_mod.0"
    assert torch.equal(game.run(x), model(x))


@pytest.mark.parametrize("name", ["residual projection batch", "encoder"])
def test_a_copy_is_the_game_of_the_copied_model(name):
    model, x = (Encoder(), tokens()) if name == "encoder" else made(name)
    model.eval()
    game = find_game(model, inputs=((x,), {}))
    twin, other = copy.deepcopy((model, game))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert other.players[0].module is not game.players[0].module
    assert [s.alive for s in other.stages()] == [s.alive for s in game.stages()]
    assert other.placements == game.placements
    for k in range(other.alignments):
        assert torch.equal(other.run(x, alignment=k), twin(x))
    plain = made("mlp")[0]
    described = copy.deepcopy(Game.described(plain, [["0"], ["2"], ["4"]]))
    assert [p.name for s in described.stages() for p in s.players] == ["0", "2", "4"]
    assert described.players[0].module is not plain[0]
    assert described.stages()[0].players[0] is described.players[0]


def test_bfloat16_and_double():
    for dtype in (torch.bfloat16, torch.float64):
        model, x = made("residual projection batch")
        model, x = model.to(dtype).eval(), x.to(dtype)
        game = find_game(model, inputs=((x,), {}))
        assert torch.equal(game.run(x, alignment=1), model(x))


@pytest.mark.parametrize("name", ["inception", "dense", "u-net"])
def test_export_finds_the_same_game(name, monkeypatch):
    """Both ways of tracing agree on stages and branches."""
    model, x = made(name)
    expected = find_game(model)

    def no_fx(*args):
        raise TypeError("not today")

    monkeypatch.setattr("ocnopt.control.tracing._symbolic", no_fx)
    game = find_game(model, inputs=((x,), {}))

    def places(g):
        return [[[p.name for p in s.players] for s in g.stages(k)] for k in range(g.alignments)]

    assert places(game) == places(expected)
    assert game.placements == expected.placements
    model.eval()
    for k in range(game.alignments):
        assert torch.equal(game.run(x, alignment=k), model(x))
