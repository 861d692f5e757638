"""Factors across players fit the players' own, whoever was away and whatever was changed."""

import copy

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.control.cross import cross_factors
from ocnopt.control.game import Game
from ocnopt.curvature.kronecker import KFAC

CRITERION = nn.CrossEntropyLoss()


class Branches(nn.Module):
    """Three branches between a stem and a head; one can be switched off."""

    def __init__(self, widths=(8, 8, 8)):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.a, self.b, self.c = (nn.Linear(8, width) for width in widths)
        self.head = nn.Linear(sum(widths), 3)
        self.on = True

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        b = torch.sigmoid(self.b(x))
        parts = [torch.tanh(self.a(x)), b if self.on else b.detach() * 0, torch.tanh(2 * self.c(x))]
        return self.head(torch.cat(parts, 1))


STAGES = [["stem"], ["a", "b", "c"], ["head"]]


def built(model, **options):
    rule = KFAC(damping=1e-2, **options)
    game = Game.described(model, STAGES)
    return ocnopt.DGNOpt(model, CRITERION, lr=0.05, preconditioner=rule, game=game)


def run(model, optimizer, steps, first=0):
    for i in range(first, first + steps):
        make = torch.Generator().manual_seed(i)
        x = torch.randn(16, 6, generator=make).to(next(model.parameters()).dtype)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()


def joint_factor(model, optimizer, factor):
    """A or B of all branches together, what has decayed since included."""
    parties = [party for group in stages(optimizer) for party in group.parties]
    (party,) = parties
    members = party.turns
    rule = optimizer._build(optimizer.param_groups[0])
    rows = []
    for n, one in enumerate(members):
        row = []
        for m, other in enumerate(members):
            if n == m:
                row.append(one.mover.states[0][factor][0])
                continue
            pair = (one, other) if n < m else (other, one)
            cross = cross_factors(*pair, rule)
            size = [t.mover.states[0][factor].shape[-1] for t in (one, other)]
            block = torch.zeros(size, dtype=torch.float64)
            if cross is not None:
                block = cross.factors()["AB".index(factor)][0]
                block = block if n < m else block.mT
            row.append(block)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def stages(optimizer):
    """The groups of the last step."""
    return optimizer.seen_groups


@pytest.fixture
def watched(monkeypatch):
    """Optimizers keep the groups of their last step."""
    original = ocnopt.DGNOpt._stages

    def keeping(self, turns, batches):
        self.seen_groups = original(self, turns, batches)
        return self.seen_groups

    monkeypatch.setattr(ocnopt.DGNOpt, "_stages", keeping)


@pytest.mark.parametrize("away", [1, 3, 10, 14])
@pytest.mark.parametrize("frozen", [True, False])
def test_players_refresh_together_again_after_one_was_away(watched, away, frozen):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = built(model, update_every=5)
    run(model, optimizer, 7)
    model.b.requires_grad_(not frozen)
    model.on = frozen
    run(model, optimizer, away, 7)
    model.b.requires_grad_(True)
    model.on = True
    for i in range(12):
        run(model, optimizer, 1, 7 + away + i)
        for factor in "AB":
            joint = joint_factor(model, optimizer, factor)
            values = torch.linalg.eigvalsh(joint)
            assert float(values[0]) > -1e-12 * float(values[-1])
    a, b = (model.get_submodule(name).weight for name in "ab")
    state = optimizer.state[a]
    # At the latest with the second refresh after its return they met.
    assert state["met with b"] == state["refreshes"]
    assert optimizer.state[b]["refreshed"] == state["refreshed"]
    assert optimizer.diagnostics.total.failures == 0


def test_what_was_in_common_fades_while_one_refreshes_alone(watched):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = built(model, update_every=5, decay=0.5)
    run(model, optimizer, 1)
    before = joint_factor(model, optimizer, "B")[:8, 8:16].clone()
    model.b.requires_grad_(False)
    run(model, optimizer, 6, 1)  # the others refresh at the sixth step
    model.b.requires_grad_(True)
    run(model, optimizer, 1, 7)  # b refreshes alone
    after = joint_factor(model, optimizer, "B")[:8, 8:16]
    torch.testing.assert_close(after, 0.5 * before, rtol=1e-12, atol=0)


def test_a_player_that_joins_later_meets_the_others(watched):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = built(model, update_every=5)
    model.on = False
    run(model, optimizer, 3)
    model.on = True
    run(model, optimizer, 3, 3)
    assert "A with b" in optimizer.state[model.a.weight]


def test_another_interval_does_not_blow_factors_up(watched):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = built(model, update_every=1)
    run(model, optimizer, 30)
    group = optimizer.param_groups[0]
    group["preconditioner"] = {**group["preconditioner"], "update_every": 10}
    for i in range(25):
        run(model, optimizer, 1, 30 + i)
        own = optimizer.state[model.a.weight]
        assert float(own["B with b"].norm()) < 10 * float(own["B"].norm())
    assert optimizer.diagnostics.total.failures == 0


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 5, 7)])
def test_a_checkpoint_fits_a_model_of_which_something_else_is_frozen(widths):
    torch.manual_seed(0)
    model = Branches(widths).double()
    optimizer = built(model, update_every=5)
    run(model, optimizer, 7)
    other = copy.deepcopy(model)
    other.stem.requires_grad_(False)
    stages_without = [["a", "b", "c"], ["head"]]
    again = ocnopt.DGNOpt(
        other,
        CRITERION,
        lr=0.05,
        preconditioner=KFAC(damping=1e-2, update_every=5),
        game=Game.described(other, stages_without),
    )
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.stem.requires_grad_(False)
    run(model, optimizer, 6, 7)
    run(other, again, 6, 7)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
