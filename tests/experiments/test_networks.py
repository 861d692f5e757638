import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

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


# Residual networks.


def names(net, *kinds):
    return [name for name, m in net.named_modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_residual_fcn_is_the_sum_of_both_paths(depth):
    torch.manual_seed(0)
    net = networks.residual_fcn(networks.ResidualFCN((6, 6, 4), depth, "tanh"), (1, 3, 2), 5)
    x = torch.randn(7, 1, 3, 2)
    z = torch.tanh(F.linear(x.flatten(1), net.stem.weight, net.stem.bias))
    for number, block in enumerate(net.blocks):
        path = z
        for i in range(1, depth + 1):
            layer = getattr(block, f"fc{i}")
            path = F.linear(path, layer.weight, layer.bias)
            path = torch.tanh(path) if i < depth else path
        z = torch.tanh(path + (z @ block.shortcut.weight.mT if number == 2 else z))
    torch.testing.assert_close(net(x), F.linear(z, net.head.weight, net.head.bias))


def test_the_default_residual_fcn_has_shortcuts_of_both_kinds():
    net = networks.residual_fcn(networks.ResidualFCN(), (1, 8, 8), 10)
    assert names(net, nn.Linear) == [
        "stem",
        *("blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"),
        *("blocks.2.fc1", "blocks.2.fc2", "blocks.2.shortcut"),
        *("blocks.3.fc1", "blocks.3.fc2", "blocks.3.shortcut"),
        "head",
    ]
    assert names(net, nn.Identity) == ["blocks.0.shortcut", "blocks.1.shortcut"]
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [32, 32, 32, 32, 32, 24, 24, 24, 16, 16, 16, 10]


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_a_residual_cnn_is_the_sum_of_both_paths(norm):
    torch.manual_seed(0)
    net = networks.residual_cnn(networks.ResidualCNN((4, 6), 2, norm), (2, 7, 6), 3)
    x = torch.randn(5, 2, 7, 6)

    def norm_of(owner, name, h):
        return getattr(owner, name)(h) if norm != "none" else h

    def conv(owner, name, h, stride=1, padding=1):
        layer = getattr(owner, name)
        return F.conv2d(h, layer.weight, layer.bias, stride=stride, padding=padding)

    z = F.relu(norm_of(net, "norm", conv(net, "stem", x)))
    for number, block in enumerate(net.blocks):
        stride = 1 + number
        path = F.relu(norm_of(block, "norm1", conv(block, "conv1", z, stride)))
        path = norm_of(block, "norm2", conv(block, "conv2", path))
        if number == 1 and norm == "none":
            z = conv(block, "shortcut", z, 2, 0)
        elif number == 1:
            z = norm_of(block.shortcut, "norm", conv(block.shortcut, "conv", z, 2, 0))
        z = F.relu(path + z)
    assert z.shape == (5, 6, 4, 3)
    expected = F.linear(z.mean((2, 3)), net.head.weight, net.head.bias)
    torch.testing.assert_close(net(x), expected)
    biases = [m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d)]
    # The projection, last of all, never has one; the others have none beside a normalization.
    assert biases == [norm == "none"] * 5 + [False]


@pytest.mark.parametrize(("norm", "variance"), [("none", 2.0), ("group", 1 / 3)])
def test_without_normalization_weights_keep_the_scale_of_signals(norm, variance):
    """Of variance 2 / inputs (He); torch's own is 1 / (3 inputs)."""
    torch.manual_seed(0)
    for net in (
        networks.residual_cnn(networks.ResidualCNN((32, 64), 2, norm), (3, 8, 8), 10),
        networks.inception(networks.Inception((64, 128), norm), (3, 8, 8), 10),
    ):
        for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            inputs = conv.weight[0].numel()
            assert float(conv.weight.detach().var() * inputs) == pytest.approx(variance, rel=0.2)
            assert conv.bias is None or not bool(conv.bias.any())


# Branching networks.


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_an_inception_block_is_four_branches_side_by_side(norm):
    torch.manual_seed(0)
    block = networks.InceptionBlock(6, 8, norm, halve=True)
    x = torch.randn(5, 6, 8, 9)
    h = F.max_pool2d(x, 2)

    def conv(branch, number, z):
        layer = getattr(branch, f"conv{number}")
        assert (layer.bias is None) is (norm != "none")
        z = F.conv2d(z, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)
        return z if norm == "none" else getattr(branch, f"norm{number}")(z)

    one = conv(block.branch1, 1, h)
    two = conv(block.branch2, 2, F.relu(conv(block.branch2, 1, h)))
    three = F.relu(conv(block.branch3, 2, F.relu(conv(block.branch3, 1, h))))
    three = conv(block.branch3, 3, three)
    four = conv(block.branch4, 1, F.max_pool2d(h, 3, 1, 1))
    expected = F.relu(torch.cat([one, two, three, four], 1))
    assert expected.shape == (5, 8, 4, 4)
    torch.testing.assert_close(block(x), expected)
    sizes = [m.kernel_size[0] for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert sizes == [1, 1, 3, 1, 3, 3, 1]


def test_inception_halves_where_its_width_changes():
    net = networks.inception(networks.Inception((8, 8, 12)), (1, 8, 8), 10)
    assert names(net, nn.Linear) == ["head"]
    assert names(net, nn.Identity) == ["blocks.0.pool", "blocks.1.pool"]
    assert net[:-3](torch.zeros(2, 1, 8, 8)).shape == (2, 12, 4, 4)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# All of them.

EVERY = {
    "fcn": lambda: networks.fcn(networks.FCN(), (1, 8, 8), 10),
    "cnn": lambda: networks.cnn(networks.CNN(), (1, 8, 8), 10),
    "residual-fcn": lambda: networks.residual_fcn(networks.ResidualFCN(), (1, 8, 8), 10),
    "residual-cnn": lambda: networks.residual_cnn(
        networks.ResidualCNN((4, 8), 2, "batch"), (1, 8, 8), 10
    ),
    "inception": lambda: networks.inception(networks.Inception((8, 12)), (1, 8, 8), 10),
}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_networks_can_be_traced_and_trained(make):
    torch.manual_seed(0)
    net = make()
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    torch.testing.assert_close(fx.symbolic_trace(net)(x), net(x))
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: networks.residual_cnn(networks.ResidualCNN(), (8, 8), 3), "residual-cnn needs im"),
        (lambda: networks.inception(networks.Inception(), (30,), 3), "inception needs images of"),
        (lambda: networks.inception(networks.Inception((8, 12)), (1, 5, 8), 3), "at least 6x6"),
        (
            lambda: networks.inception(networks.Inception((8, 10)), (1, 8, 8), 3),
            "multiples of 4.*8",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
