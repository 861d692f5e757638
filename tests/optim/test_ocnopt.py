"""OCNOpt: what it is made of, on models that are made of all three."""

import copy

import pytest
import torch
from ode.blocks import STEADY, timed, trained
from promises.conformance import (
    assert_feedback_active,
    assert_updates_close,
    assert_weights_equal,
    batch,
    mlp,
    step,
    weights,
)
from torch import nn

import ocnopt
from ocnopt.curvature.kronecker import EKFAC
from ocnopt.ode import NeuralODE

CE = nn.CrossEntropyLoss
RULE = EKFAC(damping=0.05, decay=0.0, update_every=3)


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


class Block(nn.Module):
    """A projection beside a main path: two players at one stage."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.shortcut = (
            nn.Linear(5, 4),
            nn.Linear(4, 3),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))) + self.shortcut(x))


def everything():
    """A chain, a branch, a Neural ODE, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 5), nn.Tanh(), Block(), NeuralODE(timed(), **STEADY), nn.Linear(3, 3)
    )


def train(model, optimizer, criterion, steps=7, start=0):
    for i in range(start, start + steps):
        step(model, optimizer, criterion, *batch(seed=i))


def both(make, one, two, steps=7):
    """Weights of a model that each of two optimizers has trained, and those before."""
    models = make(), make()
    before = trained(models[0])
    for model, build in zip(models, (one, two), strict=True):
        criterion = CE()
        train(model, build(model, criterion), criterion, steps)
    return before, *map(trained, models)


@pytest.mark.parametrize("m", ["identity", "rmsprop", "ekfac"])
def test_on_a_chain_it_is_ddpnopt(m):
    found = both(
        mlp,
        lambda model, c: ocnopt.OCNOpt(model, c, lr=0.02, preconditioner=m),
        lambda model, c: ocnopt.DDPNOpt(model, c, lr=0.02, preconditioner=m),
    )
    assert_updates_close(*found, 1e-9)


def test_on_branches_it_is_dgnopt():
    def branching():
        torch.manual_seed(0)
        return nn.Sequential(Block(), nn.Linear(3, 3))

    before, one, two = both(
        branching,
        lambda model, c: ocnopt.OCNOpt(model, c, lr=0.02, alignment="early"),
        lambda model, c: ocnopt.DGNOpt(model, c, lr=0.02, alignment="early"),
    )
    for name, value in one.items():
        assert torch.equal(value, two[name]) and not torch.equal(value, before[name])


def test_without_feedback_it_is_snopt():
    options = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01, "sample_step": 0.1}
    found = both(
        everything,
        lambda model, c: ocnopt.OCNOpt(
            model, c, information="open-loop", preconditioner=RULE, solved=RULE, **options
        ),
        lambda model, c: ocnopt.SNOpt(model, update_every=3, precondition_all=True, **options),
    )
    assert_updates_close(*found, 1e-12)


def test_every_part_by_its_rule():
    """In one step: the Neural ODE's layers as SNOpt moves them, the others as DGNOpt does."""
    options = {"lr": 0.05, "sample_step": 0.1}
    models = everything(), everything(), everything()
    criteria = CE(), CE(), CE()
    optimizers = (
        ocnopt.OCNOpt(models[0], criteria[0], **options),
        ocnopt.SNOpt(models[1], **options),
        ocnopt.DGNOpt(models[2], criteria[2], lr=0.05),
    )
    for model, optimizer, criterion in zip(models, optimizers, criteria, strict=True):
        step(model, optimizer, criterion, *batch())
    found, solved, played = map(trained, models)
    before = trained(everything())
    inside = {k for k in found if k.startswith("3.")}
    for part, other, differs in ((inside, solved, played), (found.keys() - inside, played, solved)):
        for name in part:
            assert torch.equal(found[name], other[name])
            assert not torch.equal(found[name], before[name])
            first = name.startswith("0.")  # has no one to answer to, but a value to follow
            assert first or not torch.equal(found[name], differs[name])
    assert_feedback_active(optimizers[0])
    treated = {row.parameter: row.treatment for row in optimizers[0].coverage()}
    assert treated == {k: "adjoint" if k in inside else "player" for k in found}
    assert not any(row.reason for row in optimizers[0].coverage())
    assert optimizers[0].game is not None


@pytest.mark.parametrize("adjoint", [True, False])
def test_feedback_passes_through_a_neural_ode(adjoint):
    """What the head answers to is the derivative of each sample's loss along the moves before."""
    torch.manual_seed(0)
    tight = {"rtol": 1e-11, "atol": 1e-12, "adjoint": adjoint}
    model = nn.Sequential(nn.Linear(5, 3), NeuralODE(timed(), **tight), nn.Linear(3, 3))
    criterion = CE()
    optimizer = ocnopt.OCNOpt(model, criterion, lr=0.05, preconditioner="identity")
    x, y = batch()
    before = copy.deepcopy(model)
    step(model, optimizer, criterion, x, y)
    (rho,) = optimizer._ledger.path[0]  # after the first layer's move
    both_ends = zip(model[0].parameters(), before[0].parameters(), strict=True)
    moves = [p.detach() - q.detach() for p, q in both_ends]

    def losses(scale):
        moved = copy.deepcopy(before)
        with torch.no_grad():
            for p, move in zip(moved[0].parameters(), moves, strict=True):
                p.add_(move, alpha=scale)
            return nn.functional.cross_entropy(moved(x), y, reduction="none")

    slope = (losses(1e-3) - losses(-1e-3)) / 2e-3
    torch.testing.assert_close(rho, slope, rtol=1e-4, atol=1e-9)
    assert float(rho.abs().max()) > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"rollout": "nonlinear"},
        {"keep_grad": False},
        {"terminal": "gauss-newton", "preconditioner": "kfac"},
        {"measure_every": 1},
        {"keep_policy": True, "information": "feedback"},
        {"fictitious": "adversarial", "penalty": 10.0},
        {"alignment": "random"},
    ],
    ids=str,
)
def test_it_has_dgnopts_options(options):
    model, criterion = everything(), CE()
    optimizer = ocnopt.OCNOpt(model, criterion, lr=0.05, sample_step=0.1, **options)
    losses = [float(step(model, optimizer, criterion, *batch())) for _ in range(8)]
    assert losses[-1] < 0.99 * losses[0]
    assert_feedback_active(optimizer)
    assert {row.treatment for row in optimizer.coverage()} == {"player", "adjoint"}


def test_groups_come_first():
    """A group that names layers of the Neural ODE keeps them, at its own rule."""
    model = everything()
    first = model[3].func.layers[0]
    groups = [{"params": [first, "4"], "preconditioner": "adam", "lr": 1e-3}]
    optimizer = ocnopt.OCNOpt(model, CE(), lr=0.05, params=groups)
    kinds = [g["preconditioner"]["name"] for g in optimizer.param_groups]
    assert kinds == ["adam", "ekfac", "ekfac"]
    solved, rest = optimizer.param_groups[1:]
    assert solved["preconditioner"]["damping"] == 0.05 != rest["preconditioner"]["damping"]
    assert {id(p) for p in solved["params"]} == {
        id(p) for p in model[3].func.layers[2].parameters()
    }
    train(model, optimizer, optimizer.criterion, 2)
    reasons = {row.parameter: row.reason for row in optimizer.coverage()}
    assert "'adam'" in reasons["3.func.layers.0.linear.weight"]
    assert not reasons["3.func.layers.2.weight"]


def test_layers_of_a_field_that_are_unfrozen():
    model = everything()
    first = model[3].func.layers[0].requires_grad_(False)
    optimizer = ocnopt.OCNOpt(model, CE(), lr=0.05)
    train(model, optimizer, optimizer.criterion, 2)
    assert not any("3.func.layers.0" in row.parameter for row in optimizer.coverage())
    first.requires_grad_(True)
    optimizer.add_param_group({"params": "3.func.layers.0", "preconditioner": RULE})
    train(model, optimizer, optimizer.criterion, 2, start=2)
    rows = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert rows["3.func.layers.0.linear.weight"] == rows["3.func.layers.2.weight"] == "adjoint"


def test_resumes_bit_for_bit():
    whole, first = everything(), everything()
    criteria = CE(), CE(), CE()
    one = ocnopt.OCNOpt(whole, criteria[0], lr=0.05, solved=RULE, sample_step=0.1)
    train(whole, one, criteria[0], 8)
    two = ocnopt.OCNOpt(first, criteria[1], lr=0.05, solved=RULE, sample_step=0.1)
    train(first, two, criteria[1], 4)
    second = copy.deepcopy(first)
    three = ocnopt.OCNOpt(second, criteria[2], lr=0.05, sample_step=0.1)
    three.load_state_dict(two.state_dict())
    train(second, three, criteria[2], 4, start=4)
    assert_weights_equal(weights(whole), second)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sample_step": 0.0}, "sample_step=0.0"),
        ({"solved": "ekfax"}, "ekfax"),
        ({"information": "all"}, "information='all'"),
        ({"params": [{"params": "3.funk"}]}, "3.funk"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ocnopt.OptionError, match=match):
        ocnopt.OCNOpt(everything(), CE(), lr=0.1, **options)


def test_leaves_the_model_alone_when_it_is_detached():
    model = everything()
    optimizer = ocnopt.OCNOpt(model, CE(), lr=0.05)
    train(model, optimizer, optimizer.criterion, 1)
    optimizer.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model[3]._listeners
