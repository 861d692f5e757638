"""Gradients that the loop rescales between backward and step."""

import copy

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_updates_close,
    assert_weights_equal,
    batch,
    ddpnopt,
    mlp,
    step,
    weights,
)
from torch import nn

import ocnopt


def scaled(model, factor):
    for p in model.parameters():
        p.grad.mul_(factor)


def pair(name="identity", **options):
    one, two = mlp(), mlp()
    criterion = nn.CrossEntropyLoss()
    lr = options.pop("lr", 0.2)
    first = ddpnopt(one, criterion, name, lr=lr, **options)
    second = ddpnopt(two, criterion, name, lr=lr, **options)
    return criterion, (one, first), (two, second)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("terminal", ["bounded", "matched", "outer-product", "gauss-newton"])
@pytest.mark.parametrize("bellman", ["share", "joint", "off"])
def test_clip_factor_is_a_learning_rate(bellman, terminal, clip):
    """The step for c times the gradient is the step at learning rate c * lr.

    Not so for "sample" and "literal": their Q_uu holds the learning rate, but no sample's weight.
    """
    criterion, (one, first), (two, second) = pair(
        bellman=bellman, terminal=terminal, feedback_clip=clip
    )
    before = weights(one)
    x, y = batch()
    criterion(one(x), y).backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in one.parameters()]))
    nn.utils.clip_grad_norm_(one.parameters(), 0.3 * norm)
    first.step()
    criterion(two(x), y).backward()
    for group in second.param_groups:
        # clip_grad_norm_ divides by norm + 1e-6.
        group["lr"] *= 0.3 * norm / (norm + 1e-6)
    second.step()
    assert_feedback_active(first)
    assert_updates_close(before, one, two, 1e-9)


@pytest.mark.parametrize("name", ["identity", "rmsprop", "adam", "kfac", "ekfac"])
@pytest.mark.parametrize("bellman", ["share", "sample", "joint", "literal", "off"])
def test_scaled_gradient_is_the_gradient_of_the_scaled_loss(name, bellman):
    """Clipping, seen as a factor on the loss, for every preconditioner that sees the gradient.

    Kronecker factors are made of per-sample gradients of the criterion, whatever the loss was
    multiplied with, so they agree as well.
    """
    criterion, (one, first), (two, second) = pair(name, bellman=bellman, lr=0.05)
    before = weights(one)
    for i in range(3):
        x, y = batch(seed=i)
        first.zero_grad()
        criterion(one(x), y).backward()
        scaled(one, 0.3)
        first.step()
        second.zero_grad()
        (criterion(two(x), y) * 0.3).backward()
        second.step()
        assert_feedback_active(first)
    assert_updates_close(before, one, two, 1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_that_does_nothing(name):
    """A norm bound that is not reached multiplies by one."""
    one, two = mlp(), mlp()
    criterion = nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](one, criterion), OPTIMIZERS[name](two, criterion)
    before = weights(one)
    for i in range(3):
        x, y = batch(seed=i)
        step(one, first, criterion, x, y)
        second.zero_grad()
        criterion(two(x), y).backward()
        nn.utils.clip_grad_norm_(two.parameters(), 1e6)
        second.step()
    assert_updates_close(before, one, two, 1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_zero_gradients(name):
    """No division by a zero norm anywhere."""
    model = mlp()
    criterion = ocnopt.Criterion(lambda out, y: (out * 0).sum(-1).mean())
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    criterion(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = weights(model)
    optimizer.step()
    for n, p in model.state_dict().items():
        assert torch.isfinite(p).all(), n
        torch.testing.assert_close(p, before[n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_by_value_trains(name):
    """A change of direction that is no factor: only the projection can be followed."""
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_with_accumulation(name):
    one, two = mlp(), mlp()
    criterion = nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](one, criterion), OPTIMIZERS[name](two, criterion)
    before = weights(one)
    x, y = batch(12)
    criterion(one(x), y).backward()
    scaled(one, 0.25)
    first.step()
    for a, b in zip(x.split([7, 5]), y.split([7, 5]), strict=True):
        (criterion(two(a), b) * (len(a) / 12)).backward()
    scaled(two, 0.25)
    second.step()
    assert_updates_close(before, one, two, 1e-9)


def test_replaced_gradients_count():
    """``p.grad = new`` between backward and step is honoured like a change in place."""
    criterion, (one, first), (two, second) = pair()
    x, y = batch()
    criterion(one(x), y).backward()
    scaled(one, 0.5)
    first.step()
    criterion(two(x), y).backward()
    for p in two.parameters():
        p.grad = p.grad * 0.5
    second.step()
    assert_weights_equal(one, two)


@pytest.mark.parametrize("name", ["identity", "adam"])
def test_one_layer_scaled(name):
    """Scaling one layer's gradient to zero leaves that layer alone, up to its feedback."""
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = ddpnopt(model, criterion, name)
    x, y = batch()
    criterion(model(x), y).backward()
    before = copy.deepcopy(model[2].weight.detach())
    for p in model[2].parameters():
        p.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(model[2].weight.detach(), before, rtol=0, atol=1e-15)
