"""Directions that EKFAC solves from rotated factors, without forming them."""

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.control.sweep import Sweep
from ocnopt.curvature.kronecker import EKFAC


def trained(monkeypatch, samples, by_factors, clip=None, **options):
    """Weights after ten steps, and which layers' steps were solved by factors."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 6)
    ).double()
    criterion = nn.CrossEntropyLoss()
    # One basis: where samples are few it is arbitrary in part, and rounding would choose another.
    rule = EKFAC(update_every=100, gram_tolerance=options.pop("gram_tolerance", 0.01))
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, preconditioner=rule, **options)
    taken = set()
    original = Sweep._solved_by_factors

    def watched(self, turn, excess):
        found = original(self, turn, excess) if by_factors else None
        if found is not None:
            taken.add(turn.player.name)
        return found

    monkeypatch.setattr(Sweep, "_solved_by_factors", watched)
    for i in range(10):
        torch.manual_seed(i)
        optimizer.zero_grad()
        for part in range(2):  # accumulated: two passes lead to a step
            x, y = torch.randn(samples, 40).double(), torch.randint(6, (samples,))
            (criterion(model(x), y) * (0.25 + 0.5 * part)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    monkeypatch.undo()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), taken


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gram_tolerance": 0.0},
        {"terminal": "gauss-newton", "bellman": "sample"},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"curvature": "value"},
        {"clip": 0.3},
    ],
    ids=["default", "every direction", "rank r", "momentum", "value", "clipped"],
)
def test_as_if_formed(monkeypatch, options):
    one, taken = trained(monkeypatch, 4, True, **options)
    two, none = trained(monkeypatch, 4, False, **options)
    assert taken == {"0", "2"} and not none  # the last is too narrow
    assert float((one - two).abs().max()) < 1e-11


def test_not_where_samples_are_many(monkeypatch):
    assert not trained(monkeypatch, 64, True)[1]
