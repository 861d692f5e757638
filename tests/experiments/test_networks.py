import itertools

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


@pytest.mark.parametrize("pools", list(itertools.combinations((1, 2, 3, 4), 2)))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 7, 4)])
def test_pools_follow_the_convolutions_that_they_name(pools, shape):
    net = networks.cnn(networks.CNN(channels=3, hidden=5, pools=pools), shape, 4)
    kinds = [type(m).__name__ for m in net]
    followed, number = [], 0
    for kind in kinds:
        number += kind == "Conv2d"
        if kind == "MaxPool2d":
            followed.append(number)
    assert tuple(followed) == pools
    assert kinds.count("Conv2d") == 4
    assert [m.out_features for m in net if isinstance(m, nn.Linear)] == [5, 4]
    assert {m.out_channels for m in net if isinstance(m, nn.Conv2d)} == {3}
    assert net(torch.zeros(2, *shape)).shape == (2, 4)


def test_a_sigmoid_on_the_outputs():
    net = networks.fcn(networks.FCN((4,), "relu", "sigmoid"), (3,), 2)
    assert [type(m).__name__ for m in net] == ["Flatten", "Linear", "ReLU", "Linear", "Sigmoid"]
    outputs = net(torch.randn(5, 3) * 10)
    assert bool(((outputs > 0) & (outputs < 1)).all())


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 8, 3), (8, 8)])
def test_cnn_refuses_images_too_small_to_be_pooled(shape):
    with pytest.raises(InputError, match="at least 4x4 pixels"):
        networks.cnn(networks.CNN(), shape, 3)


def test_cnn_refuses_what_is_no_image():
    with pytest.raises(InputError, match="images"):
        networks.cnn(networks.CNN(), (13,), 3)
