"""Micro-batches add up to the full batch."""

import copy

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_updates_close,
    assert_weights_close,
    batch,
    build,
    ddpnopt,
    mlp,
    weights,
)
from torch import nn

import ocnopt

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def full(model, optimizer, criterion, x, y):
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def split(model, optimizer, criterion, x, y, sizes):
    optimizer.zero_grad()
    mean = criterion.reduction == "mean"
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        loss = criterion(model(a), b)
        (loss * (len(a) / len(x)) if mean else loss).backward()
    optimizer.step()


def compare(make_optimizer, criterion, sizes, dtype=torch.float64, model=None, steps=4):
    one = mlp(dtype) if model is None else model
    two = copy.deepcopy(one)
    first, second = make_optimizer(one, criterion), make_optimizer(two, criterion)
    for i in range(steps):
        x, y = batch(12, dtype, seed=i)
        full(one, first, criterion, x, y)
        split(two, second, criterion, x, y, sizes)
        if isinstance(first, ocnopt.DDPNOpt) and first.rollout != "off":
            assert_feedback_active(first)
    # Single precision: measured on the weights, as differences of them only repeat rounding.
    assert_weights_close(one, two, TOLERANCE[dtype])
    return one, two


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [6, 6], [7, 3, 2]], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches(name, sizes, dtype):
    compare(OPTIMIZERS[name], nn.CrossEntropyLoss(), sizes, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("terminal", ["bounded", "matched", "outer-product", "gauss-newton"])
@pytest.mark.parametrize("bellman", ["share", "sample", "joint", "literal"])
@pytest.mark.parametrize("name", ["identity", "adam", "kfac", "ekfac"])
def test_bellman_and_terminal_forms(name, bellman, terminal, reduction):
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    lr = 0.02 if reduction == "mean" else 0.002

    def make(model, criterion):
        return ddpnopt(model, criterion, name, bellman=bellman, terminal=terminal, lr=lr)

    before = weights(mlp())
    one, two = compare(make, criterion, [7, 3, 2], steps=2)
    assert_updates_close(before, one, two, 1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mean_and_sum_of_equal_losses_agree_where_the_rule_allows(name):
    """A sum divided by B outside the criterion is the mean."""
    one, two = mlp(), mlp()
    first = OPTIMIZERS[name](one, mean := nn.CrossEntropyLoss())
    second = OPTIMIZERS[name](two, total := nn.CrossEntropyLoss(reduction="sum"))
    before = weights(one)
    for i in range(3):
        x, y = batch(12, seed=i)
        full(one, first, mean, x, y)
        second.zero_grad()
        (total(two(x), y) / len(x)).backward()
        second.step()
    assert_updates_close(before, one, two, 1e-9)


@pytest.mark.parametrize("name", ["identity", "kfac"])
def test_unequal_weights_matter(name):
    """The comparison can fail: equal weights of unequal micro-batches are another objective."""
    one, two = mlp(), mlp()
    criterion = nn.CrossEntropyLoss()
    x, y = batch(12)
    first, second = ddpnopt(one, criterion, name), ddpnopt(two, criterion, name)
    full(one, first, criterion, x, y)
    for a, b in zip(x.split([9, 3]), y.split([9, 3]), strict=True):
        (criterion(two(a), b) / 2).backward()
    second.step()
    with pytest.raises(AssertionError):
        assert_weights_close(one, two, 1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_criterion_equal_micro_batches_add_up(name):
    """The optimizer that knows no criterion takes the loss for the mean over all samples."""

    def make(model, _):
        return OPTIMIZERS[name](model, None)

    compare(make, nn.CrossEntropyLoss(), [4, 4, 4])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_convolutions(name):
    model, make = build("cnn")
    two = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](model, criterion), OPTIMIZERS[name](two, criterion)
    for i in range(3):
        x, y = make(8, seed=i)
        full(model, first, criterion, x, y)
        split(two, second, criterion, x, y, [5, 3])
    assert_weights_close(model, two, 1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_added_before_one_backward(name):
    """Several passes of the model, one backward of the sum."""
    one, two = mlp(), mlp()
    criterion = nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](one, criterion), OPTIMIZERS[name](two, criterion)
    for i in range(3):
        x, y = batch(12, seed=i)
        full(one, first, criterion, x, y)
        second.zero_grad()
        parts = zip(x.split(6), y.split(6), strict=True)
        sum(criterion(two(a), b) / 2 for a, b in parts).backward()
        second.step()
    assert_weights_close(one, two, 1e-10)
