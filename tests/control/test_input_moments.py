"""Players that read the same tensor share its moments, and nothing changes."""

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.control.views import InputMoments
from ocnopt.curvature.kronecker import EKFAC
from ocnopt.layers import StackedLinear
from ocnopt.layers.base import MatrixLayer


class Branches(nn.Module):
    """Three readers of one tensor, one of a copy of it, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.readers = nn.ModuleList(
            [nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(5, 3, bias=False)]
        )
        self.apart = nn.Linear(5, 2)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        parts = [reader(x) for reader in self.readers] + [self.apart(x.clone())]
        return self.head(torch.tanh(torch.cat(parts, 1)))


def trained(make, network=Branches, width=4):
    """Weights after four steps, and how many moments of inputs the first step computed."""
    torch.manual_seed(0)
    model = network().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = make(model, criterion)
    computed = []
    original = MatrixLayer.cross_moment

    def counted(self, x, y):
        computed.append(x is y)
        return original(self, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MatrixLayer, "cross_moment", counted)
        for i in range(4):
            torch.manual_seed(i)
            x, y = torch.randn(8, width).double(), torch.randint(3, (8,))
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), len(computed)


def group_rational(model, criterion):
    rule = EKFAC(update_every=1)
    return ocnopt.DGNOpt(
        model, criterion, lr=0.1, preconditioner=rule, information="group-rational"
    )


#: Two of six players read one tensor, at each of four steps; so does the pair that they make.
@pytest.mark.parametrize(
    ("make", "saved"),
    [(lambda m, c: ocnopt.EKFAC(m, c, lr=0.1, update_every=1), 4), (group_rational, 4 + 4)],
    ids=["alone", "together"],
)
def test_computed_once_and_the_same(monkeypatch, make, saved):
    one, few = trained(make)
    monkeypatch.setattr(InputMoments, "of", lambda self, key, compute: compute())
    two, many = trained(make)
    assert many - few == saved
    assert torch.equal(one, two)


class TwoSizes(nn.Module):
    """Stacked layers of two and of four networks on one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = StackedLinear(2, 5, 6), StackedLinear(4, 5, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.a(x)) + torch.tanh(self.b(x)))


@pytest.mark.parametrize("rule", ["kfac", "ekfac"])
def test_stacks_of_different_sizes_do_not_share(monkeypatch, rule):
    def make(model, criterion):
        return ocnopt.DDPNOpt(model, criterion, lr=0.1, preconditioner=rule)

    one, few = trained(make, TwoSizes, 5)
    monkeypatch.setattr(InputMoments, "of", lambda self, key, compute: compute())
    two, many = trained(make, TwoSizes, 5)
    assert few == many
    assert torch.equal(one, two)
