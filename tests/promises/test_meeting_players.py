"""Players who meet, part and meet again, or who were never in the same pass."""

import games
import pytest
import torch
from promises.conformance import step
from torch import nn

import ocnopt
from ocnopt.control.alignment import RandomAlignment
from ocnopt.control.game import Game


def batch(seed, size=16):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=make, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=make)


def largest_step(kind, alignment, damping, steps=300):
    torch.manual_seed(0)
    model, criterion = games.Residual().double(), nn.CrossEntropyLoss()
    rule = {"kfac": ocnopt.curvature.KFAC, "ekfac": ocnopt.curvature.EKFAC}[kind]
    optimizer = ocnopt.DGNOpt(
        model,
        criterion,
        lr=0.02,
        preconditioner=rule(damping=damping, update_every=5),
        alignment=alignment,
    )
    most = 0.0
    x, y = batch(0, 64)
    for i in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        part = torch.arange(16) + 16 * (i % 4)
        step(model, optimizer, criterion, x[part], y[part])
        moved = [float((p - q).norm()) for p, q in zip(model.parameters(), before, strict=True)]
        most = max(most, *moved)
    return most, optimizer.diagnostics.total.failures


@pytest.mark.parametrize(("kind", "damping"), [("kfac", 1e-3), ("ekfac", 1e-2)])
def test_switching_alignments_makes_no_larger_steps(kind, damping):
    """Cross factors fit the players' own at any time: no correlation has to be scaled down."""
    fixed, failures = largest_step(kind, "early", damping)
    assert failures == 0
    for every in (7, 20):
        switched, failures = largest_step(kind, RandomAlignment(every=every), damping)
        assert failures == 0
        assert switched < 1.5 * fixed


class Switched(nn.Module):
    """One of two layers, as the call says."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, first):
        z = torch.tanh(self.stem(x))
        return self.head(torch.tanh((self.a if first else self.b)(z)))


def test_players_of_different_passes_act_alone_and_say_so():
    torch.manual_seed(0)
    model, criterion = Switched().double(), nn.CrossEntropyLoss()
    game = Game.described(model, [["stem"], ["a", "b"], ["head"]])
    rule = ocnopt.curvature.KFAC(damping=0.1)
    optimizer = ocnopt.DGNOpt(model, criterion, lr=0.05, preconditioner=rule, game=game)
    x, y = batch(0)
    for first in (True, False):
        (criterion(model(x, first), y) / 2).backward()
    optimizer.step()
    reasons = {row.module: row.reason for row in optimizer.coverage()}
    assert "no, 1 locations against 1, no of 'a'" in reasons["b"]
    assert set(optimizer.diagnostics.players) == {"stem", "a", "b", "head"}


def test_a_player_who_was_frozen_meets_its_partner_again():
    torch.manual_seed(0)
    model, criterion = games.Residual().double(), nn.CrossEntropyLoss()
    rule = ocnopt.curvature.KFAC(damping=1e-3, update_every=2)
    optimizer = ocnopt.DGNOpt(model, criterion, lr=0.01, preconditioner=rule, alignment="early")
    for i in range(24):
        model.skip.requires_grad_(i < 4 or i >= 12)
        step(model, optimizer, criterion, *batch(i))
    assert optimizer.diagnostics.total.failures == 0
    state = optimizer.state[model.one.weight]
    assert state["met with skip"] == state["refreshes"] == 12


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_row_32_rare_refreshes_agree_with_frequent_ones_right_after_one(kind):
    """With factors of the current batch alone, so that what came before a refresh is forgotten."""
    rule = {"kfac": ocnopt.curvature.KFAC, "ekfac": ocnopt.curvature.EKFAC}[kind]
    criterion = nn.CrossEntropyLoss()
    models, optimizers = [], []
    for every in (1, 4):
        torch.manual_seed(0)
        model = games.Residual().double()
        options = {"damping": 0.1, "decay": 0.0, "update_every": every}
        if kind == "ekfac":
            options["eigen_decay"] = 1.0  # eigenvalues are those of the factors
        models.append(model)
        optimizers.append(ocnopt.DGNOpt(model, criterion, lr=0.05, preconditioner=rule(**options)))
    for i in range(9):
        if i % 4 == 0:  # both refresh in this step; what they did in between differed
            models[1].load_state_dict(models[0].state_dict())
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, criterion, *batch(i))
        left, right = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
        gap = float((left - right).detach().abs().max())
        assert gap < 1e-10 if i % 4 == 0 else gap > 1e-8


class Twice(nn.Module):
    """Two layers side by side, both called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        z = torch.tanh(self.stem(x))
        for _ in range(2):
            z = torch.tanh(self.a(z) + self.b(z))
        return self.head(z)


def test_players_who_are_called_several_times_act_alone_and_say_so():
    torch.manual_seed(0)
    model, criterion = Twice().double(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DGNOpt(model, criterion, lr=0.05, preconditioner="kfac")
    step(model, optimizer, criterion, *batch(0))
    reasons = {row.module: row.reason for row in optimizer.coverage()}
    assert reasons["a"] == reasons["b"] == "acts alone: it is called several times in a pass"
