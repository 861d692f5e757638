"""Layers that the game does not have, as another path was taken when it was found."""

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.control.grouping import with_strays


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
    """Layers are left out by their numbers."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x, out="1245"):
        x = torch.tanh(self.stem(x))
        for i, block in enumerate(self.blocks):
            if str(i) not in out:
                x = x + torch.tanh(block(x))
        return self.head(x)


@pytest.mark.parametrize(("build", "given"), [(Mode, {"deep": True}), (Drop, {"out": "35"})])
def test_they_act_in_the_order_of_calls_and_coverage_says_so(build, given):
    criterion, weights = nn.CrossEntropyLoss(), []
    for make in (ocnopt.DDPNOpt, ocnopt.DGNOpt):
        torch.manual_seed(0)
        model = build().double()
        options = {"information": "feedback"} if make is ocnopt.DGNOpt else {}
        optimizer = make(model, criterion, lr=0.5, preconditioner="identity", **options)
        x, y = torch.randn(32, 6).double(), torch.arange(32) % 3
        criterion(model(x, **given), y).backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-14)
    reasons = [row.reason for row in optimizer.coverage() if row.treatment == "player"]
    assert any("not called when the game was found" in reason for reason in reasons)
    assert list(optimizer.diagnostics.players)[-1] == "head"


class Named:
    def __init__(self, name):
        self.name = name


turns = {name: Named(name) for name in "abcdef"}


@pytest.mark.parametrize(
    ("stages", "calls", "wanted"),
    [
        (["a", "c"], "abc", ["a", "b", "c"]),
        (["ac", "d"], "abcd", ["a", "b", "c", "d"]),
        (["b"], "abc", ["a", "b", "c"]),
        (["a", "bd", "e"], "abdcef", ["a", "bd", "c", "e", "f"]),
        (["c", "a"], "abc", ["a", "b", "c"]),
        (["ad", "ef"], "abcdef", ["a", "b", "c", "d", "ef"]),
    ],
)
def test_a_place_for_every_stray(stages, calls, wanted):
    given = [[turns[name] for name in stage] for stage in stages]
    found = with_strays(given, [turns[name] for name in calls])
    assert ["".join(t.name for t in stage) for stage in found] == wanted


class Shortcut(nn.Module):
    """Two blocks; a layer that is switched on later parts the players of the first one's stage."""

    def __init__(self):
        super().__init__()
        self.stem, self.extra = nn.Linear(6, 8), nn.Linear(8, 8)
        self.short, self.c1, self.c2 = (nn.Linear(8, 8) for _ in range(3))
        self.short2, self.d1, self.d2 = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.on = False

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        beside, x = self.short(x), torch.tanh(self.c1(x))
        x = torch.tanh(self.extra(x)) if self.on else x
        x = torch.tanh(self.c2(x) + beside)
        x = torch.tanh(self.d2(torch.tanh(self.d1(x))) + self.short2(x))
        return self.head(x)


def test_only_the_stage_in_the_way_is_parted_and_coverage_says_so():
    torch.manual_seed(0)
    model, criterion = Shortcut().double(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DGNOpt(model, criterion, lr=0.1, preconditioner="kfac")
    for on in (False, True):
        model.on = on
        optimizer.zero_grad()
        criterion(model(torch.randn(12, 6).double()), torch.arange(12) % 3).backward()
        optimizer.step()
        reasons = {row.module: row.reason for row in optimizer.coverage()}
        assert "alone" not in reasons["d2"]
        assert "alone" not in reasons["short2"]
        assert ("'extra' not in the game" in reasons["short"]) == on
        assert ("'extra' not in the game" in reasons["c2"]) == on
    assert "was not called when the game was found" in reasons["extra"]
    order = list(optimizer.diagnostics.players)
    assert order.index("short") < order.index("extra") < order.index("c2")
