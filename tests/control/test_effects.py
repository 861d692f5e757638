"""What torch does not say of its operations: whether they return an argument, or write into it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ocnopt.control.game import find_game


class Net(nn.Module):
    """A path of three layers and one beside it, and a forward given as a function of them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c, self.side = (nn.Linear(4, 4) for _ in range(4))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def runs_right(net, x):
    """The number of alignments, every one of which computes what the model does."""
    with torch.no_grad():
        game = find_game(net, inputs=((x.clone(),), {}))
        for k in range(game.alignments):
            assert torch.equal(game.run(x.clone(), alignment=k), net(x.clone()))
    return game.alignments


def no_fx(*args):
    raise TypeError("not today")


@torch.fx.wrap
def sigmoid(x):
    """Has the name of an operation of torch, and is none."""
    return x


RETURNING = {
    "type_as": lambda x: x.type_as(x),
    "atleast_2d": torch.atleast_2d,
    "einsum": lambda x: torch.einsum("bi->bi", x),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x)[0],
    "sum_to_size": lambda x: x.sum_to_size(3, 4),
    "unsafe_split": lambda x: x.unsafe_split(2)[0],
    "an own function": lambda x: sigmoid(x),
}


def written_through(net, x, op):
    x = net.a(x)
    side = net.side(x)
    op(x).mul_(2.0)
    return net.c(net.b(x)) + side


@pytest.mark.parametrize("op", RETURNING)
def test_what_may_return_its_argument(op):
    """Schemas of operations that torch makes of others do not say that they do."""
    net, x = Net(lambda net, x: written_through(net, x, RETURNING[op])), torch.randn(3, 4)
    assert runs_right(net, x) == 1


@pytest.mark.parametrize("op", ["type_as", "atleast_2d", "broadcast_tensors"])
def test_what_may_return_its_argument_exported(op, monkeypatch):
    monkeypatch.setattr("ocnopt.control.tracing._symbolic", no_fx)
    net, x = Net(lambda net, x: written_through(net, x, RETURNING[op])), torch.randn(3, 4)
    assert runs_right(net, x) == 1


@pytest.mark.parametrize("exported", [False, True])
def test_lists_are_written_into(exported, monkeypatch):
    def forward(net, x):
        x = net.a(x)
        side = net.side(x)
        torch._foreach_mul_([x], 2.0)
        return net.c(net.b(x)) + side

    if exported:
        monkeypatch.setattr("ocnopt.control.tracing._symbolic", no_fx)
    assert runs_right(Net(forward), torch.randn(3, 4)) == 1


@pytest.mark.parametrize("exported", [False, True])
def test_what_is_known_to_be_new_restricts_nothing(exported, monkeypatch):
    """Torch makes these of others too, but what they return may be overwritten."""

    def forward(net, x):
        x = net.a(x)
        h = F.softmax(F.layer_norm(F.linear(x, net.b.weight), (4,)), -1).relu_()
        return net.c(h) + net.side(x)

    if exported:
        monkeypatch.setattr("ocnopt.control.tracing._symbolic", no_fx)
    assert runs_right(Net(forward), torch.randn(3, 4)) == 2
