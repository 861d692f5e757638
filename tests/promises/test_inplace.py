"""In-place activations behind a layer change nothing."""

import pytest
import torch
import torch.nn.functional as F
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_weights_equal,
    batch,
    images,
    run,
)
from torch import nn


def chain(inplace):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.ReLU(inplace=inplace),
        nn.Linear(8, 8),
        nn.ReLU(inplace=inplace),
        nn.Linear(8, 3),
    ).double()


class Functional(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        return self.last(x.mean((2, 3)))


def functional(inplace):
    torch.manual_seed(0)
    return Functional(F.relu_ if inplace else F.relu).double()


class Residual(nn.Module):
    """An in-place addition onto a layer's output."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        h = self.second(x)
        if self.inplace:
            h += x
            h.relu_()
        else:
            h = F.relu(h + x)
        return self.last(h)


def residual(inplace):
    torch.manual_seed(0)
    return Residual(inplace).double()


MODELS = {"chain": (chain, batch), "functional": (functional, images), "add": (residual, batch)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inplace_equals_out_of_place(name, kind):
    make_model, make = MODELS[kind]
    ended = []
    for inplace in (True, False):
        model = make_model(inplace)
        criterion = nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS[name](model, criterion)
        run(model, optimizer, 3, criterion, make=make)
        if name.startswith("DDPNOpt"):
            assert_feedback_active(optimizer)
        ended.append(model)
    assert_weights_equal(*ended)


@pytest.mark.parametrize("kind", MODELS)
def test_nonlinear_rollout_with_inplace(kind):
    make_model, make = MODELS[kind]
    ended = []
    for inplace in (True, False):
        model = make_model(inplace)
        criterion = nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS["DDPNOpt-identity"](model, criterion, rollout="nonlinear")
        run(model, optimizer, 3, criterion, make=make)
        assert_feedback_active(optimizer)
        ended.append(model)
    assert_weights_equal(*ended)
