"""Modules used twice, shared, never called, reparametrized, subclassed or frozen."""

import pytest
import torch
import torch.nn.functional as F
from promises.conformance import OPTIMIZERS, assert_feedback_active, batch, mlp, step
from torch import nn

import ocnopt

DDP = [name for name in OPTIMIZERS if name.startswith("DDPNOpt")]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.turn, self.write = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.read(x))
        for _ in range(3):
            h = torch.tanh(self.turn(h))
        return self.write(h)


class Tied(nn.Module):
    """A language model's tied input and output table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.mix(self.table(tokens))).mean(1))


class Lonely(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.never = nn.Linear(4, 4)

    def forward(self, x):
        return self.body(x)


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.used, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(F.linear(x, self.used.weight, self.used.bias)))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.Linear):
    """A subclass that keeps forward is its base."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_module_used_several_times(name):
    torch.manual_seed(0)
    model = Recurrent().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(r.treatment == "player" and not r.reason for r in optimizer.coverage())
    if name in DDP:
        assert_feedback_active(optimizer)


def test_a_module_used_twice_answers_for_both_uses():
    """Without feedback but with recording on, the weighted gradient is the ordinary one."""
    torch.manual_seed(0)
    model = Recurrent().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, bellman="off", rollout="linear")
    x, y = batch()
    criterion(model(x), y).backward()
    recorded = {use.player.name for p in optimizer.recorder.passes for use in p.received}
    count = sum(len(p.received) for p in optimizer.recorder.passes)
    assert recorded == {"read", "turn", "write"} and count == 5
    first = model.read.weight.detach() - 0.1 * model.read.weight.grad
    plain = model.turn.weight.detach() - 0.1 * model.turn.weight.grad
    optimizer.step()
    torch.testing.assert_close(model.read.weight.detach(), first, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(model.turn.weight, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tied_weights_fall_back_by_name(name):
    torch.manual_seed(0)
    model = Tied().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = torch.randint(7, (8, 4)), torch.randint(7, (8,))
    before = model.table.weight.detach().clone()
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.table.weight)
    assert model.out.weight is model.table.weight
    rows = {r.parameter: r for r in optimizer.coverage()}
    assert rows["table.weight"].treatment == "first-order"
    assert "out.weight" in rows["table.weight"].reason
    assert rows["mix.weight"].treatment == "player"
    assert rows["out.bias"].treatment == "player"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shared_module_is_one_player(name):
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 3)
    ).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    rows = {r.parameter: r for r in optimizer.coverage()}
    assert rows["2.weight"].treatment == "player", rows["2.weight"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_modules_never_called(name):
    torch.manual_seed(0)
    model = Lonely().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, weight_decay=0.1)
    before = model.never.weight.detach().clone()
    x, y = batch()
    step(model, optimizer, criterion, x, y)
    assert torch.equal(before, model.never.weight)
    row = next(r for r in optimizer.coverage() if r.parameter == "never.weight")
    assert row.treatment == "first-order" and "no gradient" in row.reason


@pytest.mark.parametrize("name", DDP)
def test_weight_used_without_calling_the_layer(name):
    torch.manual_seed(0)
    model = Functional().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    step(model, optimizer, criterion, x, y)
    rows = {r.parameter: r for r in optimizer.coverage()}
    assert rows["used.weight"].treatment == "first-order"
    assert "without calling" in rows["used.weight"].reason
    assert rows["first.weight"].treatment == "player"
    assert_feedback_active(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", [0, 2])
def test_reparametrized_layer(name, where):
    model = mlp()
    torch.nn.utils.parametrizations.weight_norm(model[where])
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = batch()
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    for n, p in model.named_parameters():
        assert not torch.equal(p, before[n]), n
    rows = {r.parameter: r for r in optimizer.coverage()}
    for i in (0, 1):
        row = rows[f"{where}.parametrizations.weight.original{i}"]
        assert row.treatment == "first-order" and row.reason


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_subclass_that_overrides_forward(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        Plain(5, 6), nn.Tanh(), Doubling(6, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    step(model, optimizer, criterion, x, y)
    rows = {r.parameter: r for r in optimizer.coverage()}
    assert rows["0.weight"].treatment == "player"
    assert rows["2.weight"].treatment == "first-order"
    assert "Doubling overrides" in rows["2.weight"].reason


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", ["0", "2", "4", "0.weight", "2.weight", "2.bias", "4.weight"])
def test_frozen_parts(name, frozen):
    model = mlp()
    for n, p in model.named_parameters():
        p.requires_grad_(not n.startswith(frozen))
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = batch()
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == n.startswith(frozen), n
    rows = {r.parameter: r for r in optimizer.coverage()}
    assert set(rows) == {n for n in before if not n.startswith(frozen)}
    assert all(r.treatment == "player" for r in rows.values())
    if name in DDP:
        assert_feedback_active(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_after_the_optimizer_was_built(name):
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    step(model, optimizer, criterion, x, y)
    model[2].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer, criterion, x, y)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == n.startswith("2"), n
    model[2].weight.requires_grad_(True)
    step(model, optimizer, criterion, x, y)
    assert not torch.equal(model[2].weight, before["2.weight"])
    assert torch.equal(model[2].bias, before["2.bias"])


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(7, 6, **options)
        self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.out(torch.tanh(self.mix(self.table(tokens))).mean(1))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 0}, {"max_norm": 1.0}, {"sparse": True}], ids=str
)
def test_embeddings(name, options):
    torch.manual_seed(0)
    model = Words(**options).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    before = model.table.weight.detach().clone()
    x, y = torch.randint(6, (8, 4)), torch.randint(3, (8,))
    x[0, :] = 0
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    if "padding_idx" in options:
        assert torch.equal(model.table.weight[0], before[0])
    assert torch.equal(model.table.weight[6], before[6]) or "max_norm" in options
    assert not torch.equal(model.table.weight[1], before[1])
    row = next(r for r in optimizer.coverage() if r.parameter == "table.weight")
    refused = [key for key in ("max_norm", "sparse") if key in options]
    assert row.treatment == ("first-order" if refused else "player")
    assert all(key in row.reason for key in refused)
