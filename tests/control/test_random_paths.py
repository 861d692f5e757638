"""Networks whose code draws random numbers: their game, and where it is looked for."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import ocnopt
from ocnopt import GraphError
from ocnopt.control import tracing
from ocnopt.control.game import Game, find_game

#: Whether a block is left out, by whose random numbers.
CHANCE = {
    "torch": lambda net: torch.rand(()).item() < 0.5,
    "a tensor of torch's": lambda net: torch.rand(1) < 0.5,
    "python": lambda net: random.random() < 0.5,
    "numpy": lambda net: np.random.rand() < 0.5,
    "its own of torch's": lambda net: bool(torch.rand((), generator=net.own[0]) < 0.5),
    "its own of python's": lambda net: net.own[1].random() < 0.5,
    "its own of numpy's": lambda net: net.own[2].random() < 0.5,
    "its own of old numpy's": lambda net: net.own[3].rand() < 0.5,
}


class Block(nn.Module):
    """Two layers and one beside them."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.skip = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        beside = self.skip(x)
        return torch.tanh(self.two(torch.tanh(self.one(x))) + beside)


class Deep(nn.Module):
    """Blocks of which some are left out in training."""

    def __init__(self, out, blocks=4):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.register_buffer("calls", torch.zeros(()))
        self.out = out
        self.reseed(0)

    def reseed(self, seed):
        generators = random.Random(seed), np.random.default_rng(seed), np.random.RandomState(seed)
        self.own = [torch.Generator().manual_seed(seed), *generators]

    def forward(self, x):
        self.calls += 1
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            if not (self.training and self.out(self)):
                x = block(x)
        return self.head(x)


def seeded(seed, net=None):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    if net is not None:
        net.reseed(seed)


def names(game):
    """Who acts, by stage, under every alignment."""
    every = (game.stages(k) for k in range(game.alignments))
    return [[[player.name for player in stage.players] for stage in stages] for stages in every]


X = torch.ones(2, 4)


@pytest.mark.parametrize("source", CHANCE)
@pytest.mark.parametrize("inputs", [None, ((X,), {})])
def test_the_game_holds_every_layer_whatever_the_random_state(source, inputs):
    full = find_game(Deep(lambda net: False))
    net = Deep(CHANCE[source])
    for seed in range(6):
        seeded(seed, net)
        game = find_game(net, inputs=inputs)
        assert game.idle == ()
        assert names(game) == names(full)
        assert [s.alive for s in game.stages()] == [s.alive for s in full.stages()]


def states(net):
    def plain(state):
        return state[1].tolist(), state[2:]

    shared = torch.get_rng_state().tolist(), random.getstate(), plain(np.random.get_state())
    first, second, third, fourth = net.own
    own = first.get_state().tolist(), second.getstate(), third.bit_generator.state
    return (*shared, *own, plain(fourth.get_state()))


@pytest.mark.parametrize("source", CHANCE)
@pytest.mark.parametrize("fails", [False, True])
def test_random_states_and_modes_and_buffers_are_left_as_they_were(source, fails):
    net = Deep(CHANCE[source])
    net.blocks[1].eval()
    if fails:  # in evaluation alone, where it is looked for in the end

        def broken(x):
            if not net.training:
                raise ValueError("not today")
            return x

        net.blocks[3].forward = broken
    seeded(3, net)
    before, modes = states(net), [module.training for module in net.modules()]
    for inputs in (None, ((X,), {})):
        try:
            find_game(net, inputs=inputs)
        except GraphError as error:
            assert fails
            assert "not today" in str(error)
        else:
            assert not fails
        assert states(net) == before
        assert [module.training for module in net.modules()] == modes
        assert net.calls == 0


class Encoder(nn.Module):
    """Layers that export alone can follow, of which some are left out in training."""

    def __init__(self, out):
        super().__init__()
        self.embed, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True) for _ in range(3)
        )
        self.out = out

    def forward(self, x):
        x = self.embed(x.reshape(-1, 2, 2))
        for layer in self.layers:
            if not (self.training and self.out(self)):
                x = layer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_a_path_that_export_follows_does_not_depend_on_random_numbers_either(source):
    expected = names(find_game(Encoder(None).eval(), inputs=((X,), {})))
    net = Encoder(CHANCE[source])
    for seed in range(3):
        seeded(seed)
        with pytest.raises(GraphError, match="no example inputs"):
            find_game(net)
        assert names(find_game(net, inputs=((X,), {}))) == expected
        assert net.training
        assert net.layers[0].self_attn.training


def test_without_fx_an_exported_path_that_python_draws_is_noticed(monkeypatch):
    def no_fx(*args):
        raise TypeError("not today")

    expected = names(find_game(Deep(lambda net: False, 2)))
    monkeypatch.setattr(tracing, "_symbolic", no_fx)
    for seed in range(2):
        seeded(seed)
        assert names(find_game(Deep(CHANCE["python"], 2), inputs=((X,), {}))) == expected


class Noisy(nn.Module):
    """Random numbers that decide about no layer, and a head that only training has."""

    def __init__(self, noise):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 4), Block(), nn.Linear(4, 3)
        self.aux = nn.Linear(4, 3)
        self.noise = noise

    def forward(self, x):
        z = torch.tanh(self.noise(self.stem(x)))
        y = self.head(self.block(z))
        return y + self.aux(z) if self.training else y


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: x + torch.randn_like(x),
        lambda x: x * (torch.rand(4) < 0.5),
        lambda x: x * random.random(),
        lambda x: x * (1 + torch.rand(()).item()),
        lambda x: torch.nn.functional.dropout(x),
        lambda x: x.flip(1) if np.random.rand() < 0.5 else x,
    ],
)
def test_numbers_that_decide_about_no_layer_change_nothing(noise):
    """What training alone has stays in the game."""
    expected = names(find_game(Noisy(lambda x: x)))
    assert any("aux" in stage for stage in expected[0])
    for seed in range(4):
        for inputs in (None, ((X,), {})):
            seeded(seed)
            assert names(find_game(Noisy(noise), inputs=inputs)) == expected


def test_who_draws_nothing_is_traced_once_and_who_draws_a_few_times(monkeypatch):
    calls, plain = [], tracing._symbolic
    monkeypatch.setattr(tracing, "_symbolic", lambda *args: calls.append(0) or plain(*args))
    find_game(Deep(lambda net: False))
    assert len(calls) == 1
    find_game(Noisy(lambda x: x + torch.rand(4)))
    assert len(calls) <= 10


class Fickle(nn.Module):
    """One of two layers, in evaluation as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x) if torch.rand(()) < 0.5 else self.b(x)))


def test_a_path_that_is_random_in_evaluation_too_has_no_game():
    net = Fickle()
    for given in (None, ((X,), {})):
        with pytest.raises(GraphError, match=r"\(torch\.fx: random numbers decide which layers"):
            find_game(net, inputs=given)
        with pytest.raises(GraphError, match=r"\(torch\.fx: random numbers decide which layers"):
            find_game(net.eval(), inputs=given)


def test_it_trains_in_the_order_of_calls_then_after_one_warning(recwarn):
    torch.manual_seed(0)
    net, criterion = Fickle(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DGNOpt(net, criterion, lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        criterion(net(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        optimizer.step()
    (warning,) = [w for w in recwarn if "game could not be found" in str(w.message)]
    assert "random numbers decide which layers act" in str(warning.message)


def test_a_run_in_training_computes_what_evaluation_does():
    net = Deep(CHANCE["torch"])
    game = find_game(net)
    first = game.run(X)
    assert torch.equal(game.run(X), first)
    assert torch.equal(net.eval()(X), first)
    assert torch.equal(game.run(X), first)


# Training.


def trained(optimizer, net, steps, start=0):
    """Steps of the ordinary loop, each with random numbers of its own; who was called in each."""
    criterion, called = optimizer.criterion, []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: called[-1].add(i))
        for i, block in enumerate(net.blocks)
    ]
    for i in range(start, start + steps):
        make = torch.Generator().manual_seed(i)
        x, y = torch.randn(8, 4, generator=make).double(), torch.randint(3, (8,), generator=make)
        called.append(set())
        seeded(i)
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return called


def built(seed=0, out=CHANCE["torch"], **options):
    torch.manual_seed(0)
    net = Deep(out).double()
    seeded(seed)
    options = {"lr": 0.1, "preconditioner": "kfac", "alignment": "early", **options}
    return net, ocnopt.DGNOpt(net, nn.CrossEntropyLoss(), **options)


def described(net):
    parts = (
        ([f"blocks.{i}.one", f"blocks.{i}.skip"], [f"blocks.{i}.two"])
        for i in range(len(net.blocks))
    )
    return Game.described(net, [["stem"], *(stage for part in parts for stage in part), ["head"]])


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


OPTIONS = [
    {},
    {"preconditioner": "ekfac", "momentum": 0.5},
    {"information": "feedback", "preconditioner": "adam", "lr": 0.01},
    {"rollout": "nonlinear", "measure_every": 1},
    {"information": "open-loop"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_blocks_left_out_at_random_take_no_part_in_the_step(seed, options):
    """As in the game that is described by hand."""
    net, optimizer = built(seed, **options)
    torch.manual_seed(0)
    other = Deep(CHANCE["torch"]).double()
    by_hand = ocnopt.DGNOpt(
        other,
        nn.CrossEntropyLoss(),
        game=described(other),
        **{"lr": 0.1, "preconditioner": "kfac", "alignment": "early", **options},
    )
    called = trained(optimizer, net, 12)
    assert trained(by_hand, other, 12) == called
    assert len({frozenset(blocks) for blocks in called}) > 3
    assert torch.equal(weights(net), weights(other))


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_that_of_the_network_that_was_called(seed):
    for i in range(8):
        net, optimizer = built(seed)
        (blocks,) = trained(optimizer, net, 1, start=i)
        torch.manual_seed(0)
        part = Deep(lambda net: False).double()
        part.blocks = nn.ModuleList(b for j, b in enumerate(part.blocks) if j in blocks)
        alone = ocnopt.DGNOpt(
            part, nn.CrossEntropyLoss(), lr=0.1, preconditioner="kfac", alignment="early"
        )
        trained(alone, part, 1, start=i)
        mine = dict(net.named_parameters())
        for place, j in enumerate(sorted(blocks)):
            for name, p in part.blocks[place].named_parameters():
                torch.testing.assert_close(mine[f"blocks.{j}.{name}"], p, rtol=1e-12, atol=1e-14)
        for layer in ("stem", "head"):
            torch.testing.assert_close(
                mine[f"{layer}.weight"], getattr(part, layer).weight, rtol=1e-12, atol=1e-14
            )
        start, _ = built()
        for j in set(range(4)) - blocks:
            for p, q in zip(net.blocks[j].parameters(), start.blocks[j].parameters(), strict=True):
                assert torch.equal(p, q)
    reasons = {row.reason for row in optimizer.coverage() if row.treatment == "player"}
    assert not any("when the game was found" in reason for reason in reasons)


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_a_second_pass_takes_the_same_path_and_leaves_random_states_as_they_were(source):
    drawn, chance = [], CHANCE[source]

    def out(net):
        drawn.append(bool(chance(net)))
        return drawn[-1]

    net, optimizer = built(0, out, rollout="nonlinear", measure_every=1)
    drawn.clear()
    for seed in range(6):
        seeded(seed)
        optimizer.zero_grad()
        optimizer.criterion(net(torch.ones(8, 4).double()), torch.arange(8) % 3).backward()
        before = states(net)
        optimizer.step()
        assert states(net) == before
        assert drawn == drawn[:4] * 3
        assert optimizer.diagnostics.total.actual_decrease > 0
        drawn.clear()
