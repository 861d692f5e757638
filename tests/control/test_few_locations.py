"""Wide convolutions on small images: no per-sample gradient is formed, and nothing changes."""

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.curvature.frames import EigenFrame, KroneckerFrame
from ocnopt.curvature.kronecker import EKFAC, KFAC
from ocnopt.layers.base import MatrixLayer


class Block(nn.Module):
    """Two convolutions and a projection beside them, on 2x2 pixels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 20, 3, padding=1)
        self.second = nn.Conv2d(20, 20, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 20, 1)

    def forward(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))) + self.shortcut(x))


def trained(monkeypatch, by_factors, rule, **options):
    """Weights after six steps, and by whom factors were asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), Block(), nn.Flatten(), nn.Linear(80, 4)
    ).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DGNOpt(model, criterion, lr=0.1, preconditioner=rule, **options)
    asked = []

    def watching(name, function):
        def watched(*args, **kwargs):
            asked.append(name)
            return function(*args, **kwargs)

        return watched

    with monkeypatch.context() as patch:
        patch.setattr(MatrixLayer, "factors", watching("alone", MatrixLayer.factors))
        for frame in (EigenFrame, KroneckerFrame):
            jointly = watching("jointly", frame.gram_and_seen_factors)
            patch.setattr(frame, "gram_and_seen_factors", jointly)
        if not by_factors:
            patch.setattr(MatrixLayer, "few_locations", lambda *args, **kwargs: False)
        for i in range(6):
            torch.manual_seed(i)
            x, y = torch.randn(12, 3, 2, 2).double(), torch.randint(4, (12,))
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), set(asked)


@pytest.mark.parametrize("information", ["feedback", "group-rational"])
@pytest.mark.parametrize(
    "rule",
    [
        KFAC(update_every=100),
        EKFAC(update_every=100, gram_tolerance=0.0),
        EKFAC(update_every=100, gram_tolerance=0.01),
        "identity",
    ],
    ids=["kfac", "ekfac", "ekfac in salient directions", "identity"],
)
@pytest.mark.parametrize("terminal", ["bounded", "gauss-newton"])
def test_steps_are_the_same(monkeypatch, rule, information, terminal):
    options = {"information": information, "terminal": terminal, "bellman": "sample"}
    one, asked = trained(monkeypatch, True, rule, **options)
    two, never = trained(monkeypatch, False, rule, **options)
    jointly = information == "group-rational" and rule != "identity"
    assert not never and asked == ({"alone", "jointly"} if jointly else {"alone"})
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
