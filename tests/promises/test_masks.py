"""Entries of a gradient that the loop or a hook sets to zero stay where they are."""

import games
import pytest
import torch
from promises.conformance import assert_updates_close, rule, weights
from torch import nn

import ocnopt
from ocnopt.control.sampled import SAMPLE, sample_of

WIDE = (24, 32)

MASKS = {
    "half of the columns": lambda w: w.new_ones(w.shape).index_fill_(1, torch.arange(16), 0),
    "the other half": lambda w: w.new_ones(w.shape).index_fill_(1, torch.arange(16, 32), 0),
    "rows": lambda w: w.new_ones(w.shape).index_fill_(0, torch.tensor([3, 11]), 0),
    "by chance": lambda w: (torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) > 0.1)
    .to(w),
}  # fmt: skip
HOWS = ["loop", "new gradient", "hook", "hook after", "clipped"]
OPTIMIZERS = [ocnopt.DDPNOpt, ocnopt.DGNOpt]


class Wide(nn.Module):
    """Two layers side by side: DGNOpt's players there solve jointly."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 32), nn.Linear(*WIDE[::-1]), nn.Linear(32, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        z = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.one(z) + self.two(z)))


def data(seed):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=make, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=make)


def net():
    torch.manual_seed(0)
    return Wide().double()


def trained(model, how, mask, make, steps=3):
    """Train with a masked gradient of ``model.one``; how says who masks it."""
    weight, criterion = model.one.weight, nn.CrossEntropyLoss()
    if how == "hook":
        weight.register_hook(lambda grad: grad * mask)
    if how == "hook after":

        def masked(p):
            p.grad.mul_(mask)

        weight.register_post_accumulate_grad_hook(masked)
    optimizer = make(model, criterion)
    for i in range(steps):
        optimizer.zero_grad()
        x, y = data(i)
        criterion(model(x), y).backward()
        if how in ("loop", "clipped"):
            weight.grad.mul_(mask)
        if how == "new gradient":
            weight.grad = weight.grad * mask
        if how == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return optimizer


def made_by(kind, name, **options):
    rate = {"identity": 0.3, "rmsprop": 0.01, "adam": 0.01}.get(name, 0.03)

    def make(model, criterion):
        return kind(model, criterion, lr=rate, preconditioner=rule(name), **options)

    return make


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["identity", "rmsprop", "adam", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_entries_stay(kind, name, how, mask):
    model = net()
    start, mask = model.one.weight.detach().clone(), MASKS[mask](model.one.weight)
    optimizer = trained(model, how, mask, made_by(kind, name))
    assert optimizer.diagnostics.total.feedback_share > 1e-4
    moved = model.one.weight.detach() != start
    assert not moved[mask == 0].any()
    assert moved[mask == 1].all()
    assert (model.two.weight.detach() != start).all()
    if kind is ocnopt.DGNOpt and "kfac" in name:  # a mask does not part who solves jointly
        assert not any(row.reason for row in optimizer.coverage())


@pytest.mark.parametrize("how", ["loop", "new gradient", "hook after"])
@pytest.mark.parametrize("name", ["identity", "adam", "ekfac"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_does_not_matter_who_masks(kind, name, how):
    one, two = net(), net()
    before, mask = weights(one), MASKS["by chance"](one.one.weight)
    trained(one, how, mask, made_by(kind, name))
    trained(two, "hook", mask, made_by(kind, name))
    assert_updates_close(before, one, two, 1e-9)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_masked_entries_stay_in_a_convolution_and_with_momentum(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    criterion, weight = nn.CrossEntropyLoss(), model[2].weight
    start, mask = weight.detach().clone(), torch.ones_like(weight)
    mask[:, 2:4] = 0
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.03, preconditioner=rule(name), momentum=0.9)
    for i in range(3):
        optimizer.zero_grad()
        make = torch.Generator().manual_seed(i)
        x = torch.randn(10, 2, 6, 6, generator=make, dtype=torch.float64)
        criterion(model(x), torch.arange(10) % 3).backward()
        weight.grad.mul_(mask)
        optimizer.step()
    moved = weight.detach() != start
    assert not moved[mask == 0].any()
    assert moved[mask == 1].all()


@pytest.mark.parametrize("name", ["identity", "ekfac"])
def test_a_hook_freezes_nothing_where_autograd_forms_no_gradient(name):
    """Without ``.grad`` what is there is a penalty's alone: its zeros are no mask."""
    models = []
    for hooked in (True, False):
        model, criterion = net(), nn.CrossEntropyLoss()
        if hooked:
            model.one.weight.register_hook(lambda grad: None)
        optimizer = made_by(ocnopt.DDPNOpt, name, keep_grad=False)(model, criterion)
        x, y = data(0)
        (criterion(model(x), y) + model.one.bias.square().sum()).backward()
        optimizer.step()
        models.append(model)
    assert_updates_close(weights(net()), *models, 1e-9)


@pytest.mark.parametrize("shape", [(256, 256), (128, 1000), (64, 32, 3, 3), (50000, 8)])
def test_the_entries_that_are_looked_at_lie_everywhere(shape):
    """A twentieth of the rows or columns, next to each other, has some of them."""
    param = torch.zeros(shape, requires_grad=True)
    for dim in range(min(2, len(shape))):
        size = shape[dim]
        part = -(-size // 20)
        for first in range(0, size - part + 1, part):
            param.grad = torch.ones(shape)
            param.grad.narrow(dim, first, part).zero_()
            seen = sample_of(param)
            assert seen.numel() == SAMPLE
            assert seen.any()
            assert not seen.all(), (dim, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_common_factor_is_one_in_every_precision(dtype):
    """What clipping's rounding makes of one factor does not part players who solve jointly."""
    for seed in range(10):
        torch.manual_seed(seed)
        model, criterion = games.NETS["Branching"]().to(dtype), nn.CrossEntropyLoss()
        optimizer = ocnopt.DGNOpt(model, criterion, lr=0.01, preconditioner=rule("kfac"))
        x, y = data(seed)
        criterion(model(x.to(dtype)), y).backward()
        clear = {row.parameter: row.reason for row in _stepped(optimizer)}
        optimizer.zero_grad()
        criterion(model(x.to(dtype)), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert {row.parameter: row.reason for row in _stepped(optimizer)} == clear
        assert not any("by the loop" in reason for reason in clear.values())


def _stepped(optimizer):
    optimizer.step()
    return optimizer.coverage()
