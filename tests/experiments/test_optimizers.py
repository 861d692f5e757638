import sys
from typing import get_args

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.experiments import optimizers
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import OptimizerName
from ocnopt.ode import NeuralODE, TimedSequential


def build(name, **options):
    model = nn.Sequential(NeuralODE(TimedSequential(nn.Linear(3, 3))), nn.Linear(3, 2))
    return optimizers.build(
        name, model if name == "snopt" else model[1], nn.CrossEntropyLoss(), 0.1, options
    )


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_every_name_builds_an_optimizer_with_the_learning_rate(name):
    optimizer = build(name)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizers.runs_batches(optimizer) is (name in ("vanilla-ddp", "emsa"))


class TakesAll(ocnopt.DDPNOpt):
    """One of a user's own, built on the library's."""

    def __init__(self, model, criterion, *, lr, speed=1):
        super().__init__(model, criterion, lr=lr * speed)


class TakesModel(torch.optim.SGD):
    def __init__(self, model, lr):
        super().__init__(model.parameters(), lr)


class TakesParams(torch.optim.SGD):
    pass


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


@pytest.fixture
def own(monkeypatch):
    """Classes of this module by the name `own:Class`."""
    here = sys.modules[__name__]
    monkeypatch.setattr(optimizers, "find", lambda name, what: getattr(here, name[4:]))


@pytest.mark.parametrize("kind", [TakesAll, TakesModel, TakesParams])
def test_own_classes_are_given_what_they_take(own, kind):
    optimizer = build(f"own:{kind.__name__}")
    assert isinstance(optimizer, kind)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    if kind is TakesAll:
        assert isinstance(optimizer.criterion, nn.CrossEntropyLoss)
        assert build("own:TakesAll", speed=3).param_groups[0]["lr"] == pytest.approx(0.3)


def test_classes_by_their_full_name():
    assert type(build("torch.optim:Adagrad")) is torch.optim.Adagrad
    assert type(build("ocnopt:KFAC", damping=0.2)) is ocnopt.KFAC
    with pytest.raises(InputError, match=r"optimizer torch\.nn:Linear is no torch\.optim"):
        build("torch.nn:Linear")


@pytest.mark.parametrize("name", ["torch.optim:LBFGS", "own:NeedsClosure"])
def test_an_optimizer_that_needs_a_closure_is_refused(name, request):
    if name.startswith("own"):
        request.getfixturevalue("own")
    with pytest.raises(InputError, match=f"{name} needs a closure"):
        build(name)


def test_options_reach_the_class():
    assert build("sgd", momentum=0.9, nesterov=True).param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(("name", "valid"), [("sgd", "nesterov"), ("ddpnopt", "bellman")])
def test_unknown_option_lists_the_valid_ones(name, valid):
    with pytest.raises(InputError, match=rf"no option 'momentun'.*momentum.*{valid}|{valid}.*mome"):
        build(name, momentun=0.9)


def test_what_the_run_provides_is_no_option():
    valid = optimizers.valid_options(torch.optim.SGD)
    assert "lr" not in valid
    assert "params" not in valid


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"momentum": -1}),
        ("sgd", {"momentum": "much"}),
        ("ddpnopt", {"bellman": "nobody"}),
        ("ddpnopt", {"feedback_clip": -1.0}),
    ],
)
def test_refused_values_become_one_clear_error(name, options):
    with pytest.raises(InputError, match=f"{name} refused its options"):
        build(name, **options)
