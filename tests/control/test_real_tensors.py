"""Tensors that a forward makes without its input: every run of the game has them anew."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ocnopt import GraphError
from ocnopt.control.game import find_game


class Net(nn.Module):
    """A path of three layers and one beside it, and a forward given as a function of them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c, self.side = (nn.Linear(4, 4) for _ in range(4))
        self.plain = torch.zeros(4)
        self.view = self.plain[:2]
        self.listed = [torch.zeros(4)]
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def added(net, x):
    total = torch.zeros(4)
    h = net.a(x)
    total.add_(h.sum(0))
    return net.c(net.b(h)) + net.side(x) + total


def augmented(net, x):
    total = torch.tensor([0.0, 1.0, 2.0, 3.0])
    h = net.a(x)
    total += h.sum(0)
    return net.c(net.b(h)) + net.side(x) + total


def given_out(net, x):
    total = torch.ones(3, 4)
    h = net.a(x)
    torch.add(total, h.detach(), out=total)
    return net.c(net.b(h)) + net.side(x) + total


def assigned(net, x):
    """What is not assigned is what the last run left, if it is not made anew."""
    rows = torch.zeros(3, 4)
    h = net.a(x)
    rows[:, :2] = h[:, :2]
    return net.c(F.relu_(rows + net.b(h))) + net.side(x) + rows.add_(h)


def activated(net, x):
    total = torch.ones(3, 4)
    h = net.a(x)
    total.mul_(h).add_(1.0)
    return net.c(net.b(h) * total) + net.side(x)


def filled_before(net, x):
    """Real operations before the first meeting are part of what is made."""
    total = torch.zeros(2, 4)
    total[0] += 1.0
    row = total[0].clone()
    h = net.a(x)
    return net.c(net.b(h)) + net.side(x) + total.add_(h.sum(0)).sum(0) + row


MADE = [added, augmented, given_out, assigned, activated, filled_before]


def runs_right(game, net):
    """Two runs under every alignment, and the model has never run before."""
    with torch.no_grad():
        for k in range(game.alignments):
            for _ in range(2):
                x = torch.randn(3, 4)
                assert torch.equal(game.run(x.clone(), alignment=k), net(x))


@pytest.mark.parametrize("inputs", [None, ((torch.ones(3, 4),), {})], ids=["alone", "inputs"])
@pytest.mark.parametrize("forward", MADE)
def test_what_forward_makes_and_overwrites_is_made_anew_for_every_run(forward, inputs):
    net = Net(forward)
    game = find_game(net, inputs=inputs)
    assert game.alignments > 1
    assert any(node.op == "get_attr" for node in game._found.nodes)  # not an exported game
    runs_right(game, net)
    net = copy.deepcopy(net)
    runs_right(copy.deepcopy(game), net)


def test_what_is_returned_is_the_callers():
    net = Net(lambda net, x: (net.c(net.b(net.a(x))), torch.zeros(4)))
    game = find_game(net)
    for _ in range(2):
        _, zeros = game.run(torch.ones(3, 4))
        assert not zeros.any()
        zeros.add_(1.0)


def test_states_of_two_runs_are_apart():
    net = Net(added)
    game = find_game(net)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    states = [game.start(x), game.start(y)]
    for _ in game.stages():
        states = [game.step(state) for state in states]
    for state, given in zip(states, (x, y), strict=True):
        assert torch.equal(game.finish(state), net(given))


def test_gradients_of_two_runs():
    """A tensor that was overwritten would take the first run's graph into the second."""
    net = Net(added)
    game = find_game(net)
    for _ in range(2):
        x = torch.randn(3, 4)
        found = torch.autograd.grad(game.run(x).sum(), list(net.parameters()))
        expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
        assert all(torch.allclose(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("kept", ["plain", "listed"])
def test_what_the_model_keeps_is_its_own(kept):
    """As every call of the model goes on with it, so does every run."""

    def forward(net, x):
        total = net.plain if kept == "plain" else net.listed[0]
        h = net.a(x)
        total.add_(h.detach().sum(0))
        return net.c(net.b(h)) + total

    net = Net(forward)
    game = find_game(net)
    twin = copy.deepcopy(net)
    for _ in range(2):
        x = torch.randn(3, 4)
        assert torch.equal(game.run(x), twin(x))
    assert torch.equal(net.plain, twin.plain) and torch.equal(net.listed[0], twin.listed[0])


def test_views_are_one_memory():
    """What the model keeps is read late, before it is overwritten through a view."""

    def forward(net, x):
        h = net.b(net.a(x)) * net.plain
        net.view.add_(x.sum(0)[:2])
        return net.c(h) + net.plain

    net = Net(forward)
    game = find_game(net)
    twin = copy.deepcopy(net)
    for _ in range(3):
        x = torch.randn(3, 4)
        assert torch.equal(game.run(x), twin(x))


def read_back(net, x):
    rows = torch.zeros(3, 4)
    rows[:, :2] = net.a(x)[:, :2]
    return net.c(net.b(2 * rows))


def read_through_a_view(net, x):
    rows = torch.zeros(2, 4)
    rows[0].add_(net.a(x).sum(0))
    rows[1].add_(x.sum(0))
    return net.c(net.b(rows.sum(0)))


def overwritten_after(net, x):
    ones = torch.ones(4)
    h = net.a(x) * ones
    ones += 1
    return net.c(net.b(h)) + ones


@pytest.mark.parametrize("forward", [read_back, read_through_a_view, overwritten_after])
def test_what_a_symbolic_trace_would_miss_is_seen(forward):
    """Without inputs it is an error; with inputs, exported."""
    net = Net(forward)
    with pytest.raises(GraphError, match=r"forward calls aten\..* which the trace would miss"):
        find_game(net)
    runs_right(find_game(net, inputs=((torch.ones(3, 4),), {})), net)
