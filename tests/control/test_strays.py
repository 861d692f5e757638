"""Layers that the game does not have, as another path was taken when it was found."""

import random

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.control.turns import Group, with_strays


class Mode(nn.Module):
    """Called with another argument than its default."""

    def __init__(self):
        super().__init__()
        self.stem, self.short = nn.Linear(6, 8), nn.Linear(8, 8)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, deep=False):
        x = torch.tanh(self.stem(x))
        if deep:
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return self.head(torch.tanh(self.short(x)))


class Drop(nn.Module):
    """Layers are left out by chance."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            if not self.training or random.random() < 0.5:
                x = x + torch.tanh(block(x))
        return self.head(x)


@pytest.mark.parametrize(("build", "given"), [(Mode, {"deep": True}), (Drop, {})])
def test_they_act_in_the_order_of_calls_and_coverage_says_so(build, given):
    criterion, weights = nn.CrossEntropyLoss(), []
    for make in (ocnopt.DDPNOpt, ocnopt.DGNOpt):
        random.seed(1)
        torch.manual_seed(0)
        model = build().double()
        options = {"information": "feedback"} if make is ocnopt.DGNOpt else {}
        optimizer = make(model, criterion, lr=0.5, preconditioner="identity", **options)
        x, y = torch.randn(32, 6).double(), torch.arange(32) % 3
        random.seed(2)
        criterion(model(x, **given), y).backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-14)
    reasons = [row.reason for row in optimizer.coverage() if row.treatment == "player"]
    assert any("not called when the game was found" in reason for reason in reasons)
    assert list(optimizer.diagnostics.players)[-1] == "head"


def grouped(*stages):
    return [Group([turns[name] for name in stage]) for stage in stages]


class Named:
    def __init__(self, name):
        self.name = name


turns = {name: Named(name) for name in "abcdef"}


@pytest.mark.parametrize(
    ("stages", "calls", "wanted"),
    [
        (["a", "c"], "abc", ["a", "b", "c"]),
        (["ac", "d"], "abcd", ["a", "b", "c", "d"]),  # no place for b: a stage each
        (["b"], "abc", ["a", "b", "c"]),
        (["a", "bd", "e"], "abdcef", ["a", "bd", "c", "e", "f"]),
        (["c", "a"], "abc", ["a", "b", "c"]),
    ],
)
def test_a_place_for_every_stray(stages, calls, wanted):
    found = with_strays(grouped(*stages), [turns[name] for name in calls])
    assert ["".join(t.name for t in group.turns) for group in found] == wanted
