"""Options are numbers whether they are Python's or numpy's, wherever they are checked."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import ocnopt
from ocnopt import OptionError, curvature
from ocnopt.losses import MMCLoss, VanishingGradientRegularizer
from ocnopt.ode import IntegrationTime, NeuralODE, TimedSequential
from ocnopt.ode.solve import Method
from ocnopt.optim.solving import require_sample_step
from ocnopt.real import is_real, is_scalar, plain

NUMBERS = [1, 1.0, np.float16(1), np.float32(1), np.float64(1), np.int64(1), Fraction(1)]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_real_numbers(value):
    assert is_real(value)
    made = plain({"value": value})["value"]
    assert made == 1 and type(made) in (int, float)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), "1", None, 1j, [1], torch.tensor(1.0)], ids=repr
)
def test_what_is_none(value):
    assert not is_real(value)
    assert plain({"value": value})["value"] is value


@pytest.mark.parametrize("number", NUMBERS[2:], ids=repr)
def test_they_are_taken_wherever_an_option_is_a_number(number):
    model, criterion = net(), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    assert require_sample_step(number) == 1.0
    assert MMCLoss(2, radius=number).radius == 1.0
    assert Method(rtol=number, atol=number, options={"step_size": number}).rtol == 1
    full = ocnopt.DDPNOpt(model, criterion, lr=0.1, terminal="full", value_reg=number)
    criterion(model(x), y).backward()
    full.step()
    regularizer = VanishingGradientRegularizer(model, weight=number)
    loss = criterion(model(x), y)
    (loss + regularizer(loss)).backward()
    regularizer.remove()
    full.detach()
    for optimizer in (
        ocnopt.VanillaDDP(model, criterion, lr=number, damping=number, state_reg=number),
        ocnopt.EMSA(model, criterion, lr=number, rho=number),
    ):
        assert bool(torch.isfinite(optimizer.step(x, y)))


def test_tensors_of_one_number():
    assert is_scalar(0.1) and is_scalar(torch.tensor(1)) and is_scalar(torch.ones(1, 1))
    for value in (True, "1", torch.tensor(True), torch.tensor(1j), torch.ones(2), torch.ones(0)):
        assert not is_scalar(value)


WRONG = ["3", None, [1.0], 1j, True, float("nan"), torch.ones(2)]
RULES = {
    "damping": (curvature.KFAC, curvature.EKFAC),
    "decay": (curvature.KFAC, curvature.EKFAC, curvature.RMSprop),
    "update_every": (curvature.KFAC, curvature.EKFAC),
    "gram_tolerance": (curvature.KFAC, curvature.EKFAC),
    "eigen_decay": (curvature.EKFAC,),
    "eps": (curvature.RMSprop, curvature.Adam),
}


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    ("option", "rule"), [(option, rule) for option, rules in RULES.items() for rule in rules]
)
def test_an_option_of_a_preconditioner_that_is_no_number_is_named(option, rule, value):
    with pytest.raises(OptionError, match=rf"^{rule.__name__}: {option}=.*must be a number"):
        rule(**{option: value})


@pytest.mark.parametrize("value", [*WRONG, 0.9, (0.9,), ("a", 0.9), (0.9, True), "ab"], ids=repr)
def test_betas_that_are_not_two_numbers_are_named(value):
    with pytest.raises(OptionError, match="betas="):
        curvature.Adam(betas=value)


def test_betas_of_a_group_that_are_no_numbers():
    group = {"params": "0", "preconditioner": "adam", "betas": 3}
    with pytest.raises(OptionError, match="'adam'"):
        ocnopt.DDPNOpt(net(), nn.CrossEntropyLoss(), lr=0.1, params=[group])


def solved():
    return nn.Sequential(NeuralODE(TimedSequential(nn.Linear(3, 3))), nn.Linear(3, 2))


NAMED = {
    "SNOpt": (("lr", "damping", "update_every", "eigen_decay", "momentum", "weight_decay"), solved),
    "EKFAC": (("lr", "damping", "update_every", "decay", "eigen_decay", "momentum"), net),
    "EMSA": (("lr", "rho", "inner_steps", "history_size", "weight_decay"), net),
    "VanillaDDP": (("lr", "damping", "state_reg", "weight_decay"), net),
    "DDPNOpt": (("lr", "momentum", "weight_decay", "feedback_clip"), net),
}


@pytest.mark.parametrize("value", ["3", 1j, [1.0], torch.ones(2)], ids=repr)
@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, option) for kind, (options, _) in NAMED.items() for option in options],
)
def test_an_option_of_an_optimizer_that_is_no_number_is_named(kind, option, value):
    criterion = () if kind == "SNOpt" else (nn.CrossEntropyLoss(),)
    with pytest.raises(OptionError, match=f"{option}="):
        getattr(ocnopt, kind)(NAMED[kind][1](), *criterion, **{"lr": 0.1, option: value})


@pytest.mark.parametrize("value", ["3", None, 1j, torch.ones(2)], ids=repr)
def test_a_time_that_is_no_number_is_named(value):
    field = TimedSequential(nn.Linear(3, 3))
    for option in ("t0", "t1"):
        with pytest.raises(OptionError, match=f"{option}=.*a finite number"):
            NeuralODE(field, **{option: value})
    for option in ("lr", "penalty", "every", "minimum", "decay"):
        with pytest.raises(OptionError, match=f"{option}="):
            IntegrationTime(NeuralODE(field), rule="first-order", **{option: value})


def test_numbers_inside_a_preconditioners_options_are_plain(tmp_path):
    rule = ocnopt.curvature.KFAC(damping=np.float64(0.1), update_every=np.int64(5))
    model = torch.nn.Linear(2, 2)
    optimizer = ocnopt.DDPNOpt(model, torch.nn.CrossEntropyLoss(), lr=0.1, preconditioner=rule)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]
    assert again["preconditioner"]["update_every"] == 5
    assert type(again["preconditioner"]["damping"]) is float
