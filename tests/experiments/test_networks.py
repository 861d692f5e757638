import pytest
import torch
from torch import nn

from ocnopt.experiments import networks
from ocnopt.experiments.errors import InputError


def test_default_fcn_has_five_linear_layers():
    net = networks.fcn(networks.FCN(), (1, 8, 8), 10)
    linear = [m for m in net if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [
        (64, 32),
        (32, 32),
        (32, 32),
        (32, 16),
        (16, 10),
    ]
    assert sum(isinstance(m, nn.Tanh) for m in net) == 4
    assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("side", [8, 28])
def test_cnn_layout(side):
    net = networks.cnn(networks.CNN(), (1, side, side), 10)
    assert [type(m).__name__ for m in net] == [
        *("Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"),
        *("Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"),
        *("Flatten", "Linear", "ReLU", "Linear"),
    ]
    assert net(torch.zeros(2, 1, side, side)).shape == (2, 10)


def test_cnn_refuses_what_is_no_image():
    with pytest.raises(InputError, match="images"):
        networks.cnn(networks.CNN(), (13,), 3)
