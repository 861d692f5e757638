"""What M is built from: the value function's derivatives, or the ordinary gradient."""

import copy

import pytest
import torch
from torch import nn

import ocnopt


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return model.double(), torch.randn(6, 4).double(), torch.randint(3, (6,))


def stepped(model, x, y, optimizer, criterion):
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("source", ["value", "gradient"])
def test_second_moment(source):
    model, x, y = setting()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(
        model, criterion, lr=0.05, preconditioner="rmsprop", curvature=source
    )
    stepped(model, x, y, optimizer, criterion)
    for p in (model[0].weight, model[2].bias):
        close = torch.allclose(optimizer.state[p]["square_avg"], 0.01 * p.grad**2, rtol=1e-10)
        assert close == (source == "gradient")
    # No player comes after the last one: its value is the gradient.
    last = model[4].weight
    assert torch.allclose(optimizer.state[last]["square_avg"], 0.01 * last.grad**2, rtol=1e-10)


@pytest.mark.parametrize("source", ["value", "gradient"])
def test_factors(source):
    model, x, y = setting()
    other = copy.deepcopy(model)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    ours = ocnopt.DDPNOpt(model, criterion, lr=0.05, preconditioner="kfac", curvature=source)
    theirs = ocnopt.KFAC(other, own, lr=0.05)
    stepped(model, x, y, ours, criterion)
    stepped(other, x, y, theirs, own)
    mine, reference = ours.state[model[0].weight], theirs.state[other[0].weight]
    assert torch.allclose(mine["A"], reference["A"], rtol=1e-10)
    assert torch.allclose(mine["B"], reference["B"], rtol=1e-10) == (source == "gradient")


def test_without_recursion_they_are_one():
    model, x, y = setting()
    other = copy.deepcopy(model)
    for m, source in ((model, "value"), (other, "gradient")):
        criterion = nn.CrossEntropyLoss()
        optimizer = ocnopt.DDPNOpt(
            m, criterion, lr=0.05, preconditioner="adam", bellman="off", curvature=source
        )
        for _ in range(3):
            stepped(m, x, y, optimizer, criterion)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_source():
    with pytest.raises(ocnopt.OptionError, match="curvature"):
        ocnopt.DDPNOpt(setting()[0], lr=0.1, curvature="newton")


@pytest.mark.parametrize(("name", "lr", "first"), [("rmsprop", 0.05, 0.5), ("adam", 0.5, 0.5)])
def test_no_entry_outgrows_what_m_was_built_from(name, lr, first):
    """Where samples cancel, M is next to nothing; what feedback adds need not cancel."""
    torch.manual_seed(0)
    widths = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    model = nn.Sequential(*widths).double()
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    for clip in (0.5, None):
        other, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
        optimizer = ocnopt.DDPNOpt(
            other, criterion, lr=lr, preconditioner=name, bellman="off", feedback_clip=clip
        )
        before = [p.detach().clone() for p in other.parameters()]
        stepped(other, x, y, optimizer, criterion)
        largest = max(
            float((p.detach() - b).abs().max())
            for p, b in zip(other.parameters(), before, strict=True)
        )
        assert (largest <= 1.5 * first * (1 + 1e-6)) == (clip is not None)  # first: the lender's
