"""What a model's forward does to the model while its game is looked for is undone."""

import contextlib
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
from torch import nn

import ocnopt
from ocnopt import GraphError
from ocnopt.control.game import find_game
from ocnopt.control.snapshot import Snapshot


class Log:
    """An object that is no module and collects what it is told."""

    def __init__(self):
        self.lines = []


class Net(nn.Module):
    """Three layers, a momentum copy of the first, and a forward that does what it is told."""

    def __init__(self, act, exported=False):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.momentum = nn.Linear(4, 4).requires_grad_(False)
        self.hidden = [nn.Linear(4, 4)]
        self.plain = torch.zeros(8)
        self.view = self.plain[:3]
        self.aux, self.named, self.nested = [], {"sums": []}, [([],)]
        self.seen, self.last, self.counts = {1}, deque([1], maxlen=2), Counter()
        self.log = Log()
        self.generator = torch.Generator().manual_seed(3)
        self.act, self.exported = act, exported

    def forward(self, x):
        if self.exported and x.shape[1] != 4:  # a question that torch.fx cannot answer
            return x
        y = self.act(self, self.a(x))
        return self.c(self.b(x if y is None else y))


def looked_at(net):
    """Look for the game with and without inputs, whether there is one or not."""
    for inputs in (None, ((torch.ones(2, 4),), {})):
        with contextlib.suppress(GraphError):
            find_game(net, inputs=inputs)


def collected(net, y):
    mean = y.mean()
    net.aux.append(mean)
    net.named["sums"].append(mean)
    net.named["last"] = mean
    net.nested[0][0].append(mean)
    net.seen.add(2)
    net.last.extend([2, 3])
    net.counts["calls"] += 1
    net.log.lines.append(mean)
    net.log.mean = mean
    net.late = mean


@pytest.mark.parametrize("exported", [False, True])
def test_nothing_stays_in_lists_and_dicts(exported):
    net = Net(collected, exported)
    net.aux.append("first")
    before = [net.aux, net.named, net.named["sums"], net.nested, net.seen, net.last, net.counts]
    looked_at(net)
    after = [net.aux, net.named, net.named["sums"], net.nested, net.seen, net.last, net.counts]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert after == [["first"], {"sums": []}, [], [([],)], {1}, deque([1]), Counter()]
    assert vars(net.log) == {"lines": []}
    assert not hasattr(net, "late")


@pytest.mark.parametrize("exported", [False, True])
def test_losses_that_a_model_collects_train_it(exported):
    """Not a stand-in among them, and the steps are those of a model that keeps no list."""

    def collects(net, y):
        net.aux.append(y.square().mean())

    ended = []
    for act in (collects, lambda net, y: None):
        torch.manual_seed(0)
        net, criterion = Net(act, exported), nn.CrossEntropyLoss()
        optimizer = ocnopt.DGNOpt(net, criterion, lr=0.1)
        x, y = torch.randn(8, 4), torch.arange(8) % 4
        for _ in range(3):
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            assert all(type(part) is torch.Tensor for part in net.aux)
            assert len(net.aux) == (act is collects)
            net.aux.clear()
            loss.backward()
            optimizer.step()
        ended.append([p.detach().clone() for p in net.a.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ended, strict=True))


def in_place(net, y):
    with torch.no_grad():
        for own, other in zip(net.momentum.parameters(), net.a.parameters(), strict=True):
            own.mul_(0.9).add_(other, alpha=0.1)


def through_data(net, y):
    for own in net.momentum.parameters():
        own.data.add_(1.0)


def assigned_data(net, y):
    for own, other in zip(net.momentum.parameters(), net.a.parameters(), strict=True):
        own.data = own.data * 0.9 + other.data * 0.1


def hidden(net, y):
    with torch.no_grad():
        net.hidden[0].weight.add_(1.0)


def plain_tensors(net, y):
    net.plain += 1
    net.view.mul_(2)


WRITES = [(act, False) for act in (in_place, through_data, assigned_data, hidden, plain_tensors)]
# Export refuses what goes through ``data``, before it runs.
WRITES += [(act, True) for act in (in_place, hidden, plain_tensors)]


@pytest.mark.parametrize(("act", "exported"), WRITES)
def test_what_is_written_in_place_is_put_back(act, exported):
    """The same tensors, in the same memory, with the same bytes and version."""
    net = Net(act, exported)
    with torch.no_grad():
        net.plain[5], net.a.weight[0, 0] = float("nan"), -0.0
    tensors = [*net.parameters(), *net.hidden[0].parameters(), net.plain, net.view]
    before = [(t.detach().clone().numpy().tobytes(), t.data_ptr(), t._version) for t in tensors]
    kept = net.momentum.weight
    act(net, None)
    changed = [(t.detach().numpy().tobytes(), t.data_ptr(), t._version) for t in tensors]
    assert changed != before
    looked_at(net)
    after = [(t.detach().numpy().tobytes(), t.data_ptr(), t._version) for t in tensors]
    assert after == changed
    assert net.momentum.weight is kept


def test_a_recorded_graph_can_still_be_differentiated():
    """DGNOpt looks for the game between a loop's passes."""
    net = Net(in_place)
    loss = (net(torch.ones(2, 4)) + net.momentum(torch.ones(2, 4).requires_grad_())).sum()
    find_game(net)
    loss.backward()


def drawn(net, y):
    random.random()
    np.random.rand()
    torch.rand(3)
    torch.rand(3, generator=net.generator)
    return y + torch.rand(4)


@pytest.mark.parametrize("exported", [False, True])
def test_random_states_are_put_back(exported):
    def states():
        ours = net.generator.get_state().tolist()
        theirs = np.random.get_state()[1].tolist(), np.random.get_state()[2]
        return torch.get_rng_state().tolist(), ours, random.getstate(), theirs

    net = Net(drawn, exported)
    before = states()
    looked_at(net)
    assert states() == before


def drawn_from_its_own(net, y):
    net.dice.random()
    net.dice.gauss(0, 1)
    net.system.random()
    net.modern.random()
    net.legacy.randn()


@pytest.mark.parametrize("exported", [False, True])
def test_generators_of_python_and_numpy_that_a_model_holds_are_put_back(exported):
    def states():
        legacy = net.legacy.get_state()
        return (
            net.dice.getstate(),
            net.modern.bit_generator.state,
            (legacy[1].tolist(), *legacy[2:]),
        )

    net = Net(drawn_from_its_own, exported)
    net.dice, net.system = random.Random(1), random.SystemRandom()
    net.modern, net.legacy = np.random.default_rng(1), np.random.RandomState(1)
    before = states()
    looked_at(net)
    assert states() == before


@pytest.mark.filterwarnings("ignore")  # it cannot be looked into, and scripting has had its day
def test_a_scripted_part():
    """The model trains with it, and hooks before and behind it stay."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    net = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 2))
    seen = []
    for place in (0, 2):
        net[place].register_forward_hook(lambda *args, place=place: seen.append(place))
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DGNOpt(net, criterion, lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    for steps in (1, 2):
        optimizer.zero_grad()
        criterion(net(torch.randn(8, 4)), torch.arange(8) % 2).backward()
        optimizer.step()
        assert seen == [0, 2] * steps
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_statistics_are_kept():
    net = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.BatchNorm1d(4)))
    snapshot, before = Snapshot(net), [b.clone() for b in net.buffers()]
    with snapshot:
        net(torch.randn(3, 4))
        assert not torch.equal(net[1].running_mean, before[0])
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


class Stubborn(list):
    def clear(self):
        raise TypeError("never cleared")


class Odd(Net):
    """What cannot be put back is the first and the last of its attributes."""

    def __init__(self):
        object.__setattr__(self, "first", Stubborn())
        super().__init__(collected)
        self.end = Stubborn()

    def forward(self, x):
        self.first.append(x)
        self.end.append(x)
        return super().forward(x)


def test_one_thing_that_cannot_be_put_back_keeps_no_other_from_it():
    net = Odd()
    hooks = net.a._forward_hooks
    with pytest.raises(GraphError, match="never cleared"):
        find_game(net)
    assert (net.aux, net.named, net.last) == ([], {"sums": []}, deque([1]))
    assert not hasattr(net, "late")
    assert net.a._forward_hooks is hooks


def test_a_snapshot_serves_again():
    net = Net(in_place)
    snapshot, before = Snapshot(net), net.momentum.weight.clone()
    for _ in range(2):
        with snapshot:
            net(torch.ones(2, 4))
            assert not torch.equal(net.momentum.weight, before)
        assert torch.equal(net.momentum.weight, before)


@pytest.mark.filterwarnings("ignore")  # torch's own, on its prototypes
def test_tensors_without_memory_of_their_own():
    """They are passed over, as are odd ones; lazy layers, for one, have none yet."""
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2, device="meta"))
    net.index = torch.eye(3).to_sparse()
    net.ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    net.coarse = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with torch.inference_mode():
        net.inferred = torch.ones(3)
    with Snapshot(net):
        pass
