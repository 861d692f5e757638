import pytest
import torch
from torch import nn

from ocnopt.experiments import optimizers
from ocnopt.experiments.errors import InputError


def build(name, **options):
    return optimizers.build(name, nn.Linear(3, 2), nn.CrossEntropyLoss(), 0.1, options)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam", "kfac", "ekfac", "ddpnopt"])
def test_every_name_builds_an_optimizer_with_the_learning_rate(name):
    optimizer = build(name)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


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
