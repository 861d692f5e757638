"""Options are numbers whether they are Python's or numpy's, wherever they are checked."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.losses import MMCLoss, VanishingGradientRegularizer
from ocnopt.ode.solve import Method
from ocnopt.optim.solving import require_sample_step
from ocnopt.real import is_real, plain

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


def test_numbers_inside_a_preconditioners_options_are_plain(tmp_path):
    rule = ocnopt.curvature.KFAC(damping=np.float64(0.1), update_every=np.int64(5))
    model = torch.nn.Linear(2, 2)
    optimizer = ocnopt.DDPNOpt(model, torch.nn.CrossEntropyLoss(), lr=0.1, preconditioner=rule)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]
    assert again["preconditioner"]["update_every"] == 5
    assert type(again["preconditioner"]["damping"]) is float
