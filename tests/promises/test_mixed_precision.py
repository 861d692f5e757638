"""GradScaler, autocast, bfloat16 and float64 models."""

import copy

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_state_equal,
    assert_updates_close,
    assert_weights_close,
    assert_weights_equal,
    batch,
    build,
    flat_state,
    mlp,
    step,
    weights,
)
from torch import nn


def scaler(scale=2.0**16):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


def scaled_step(model, optimizer, criterion, x, y, s, clip=None):
    optimizer.zero_grad()
    s.scale(criterion(model(x), y)).backward()
    if clip is not None:
        s.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    s.step(optimizer)
    s.update()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler(name, clip):
    """Unscaled by the scaler, clipped by the loop: the step is the one without a scaler."""
    one, two = mlp(torch.float32), mlp(torch.float32)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](one, criterion), OPTIMIZERS[name](two, own)
    before = weights(one)
    s = scaler()
    for i in range(3):
        x, y = batch(dtype=torch.float32, seed=i)
        scaled_step(one, first, criterion, x, y, s, clip)
        second.zero_grad()
        own(two(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(two.parameters(), clip)
        second.step()
    if name.startswith("DDPNOpt"):
        assert_feedback_active(first)
    assert_weights_close(one, two, 1e-5)
    assert_updates_close(before, one, two, 1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler_without_a_criterion(name):
    """Nothing but the gradient itself tells that the loss was scaled."""
    criterion, before = nn.CrossEntropyLoss(), weights(mlp(torch.float32))
    models = mlp(torch.float32), mlp(torch.float32)
    for model, on in zip(models, (True, False), strict=True):
        optimizer = OPTIMIZERS[name](model, None)
        s = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**6, enabled=on)
        for i in range(3):
            scaled_step(model, optimizer, criterion, *batch(dtype=torch.float32, seed=i), s)
    assert_updates_close(before, *models, 1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler_with_accumulation(name):
    one, two = mlp(), mlp()
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](one, criterion), OPTIMIZERS[name](two, own)
    before = weights(one)
    s = scaler()
    for i in range(3):
        x, y = batch(12, seed=i)
        first.zero_grad()
        for a, b in zip(x.split([8, 4]), y.split([8, 4]), strict=True):
            s.scale(criterion(one(a), b) * (len(a) / 12)).backward()
        s.step(first)
        s.update()
        step(two, second, own, x, y)
    # The scaler unscales with the reciprocal in single precision; powers of two are exact.
    assert_updates_close(before, one, two, 1e-9)


@pytest.mark.parametrize("how", ["optimizer.zero_grad", "model.zero_grad", "set to None"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_skipped_on_overflow(name, how):
    """The scaler skips a step: weights and state stay, and its passes do not count later."""
    one, two = mlp(torch.float32), mlp(torch.float32)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](one, criterion), OPTIMIZERS[name](two, own)
    s = scaler(1024.0)
    other = scaler(1024.0)
    x, y = batch(dtype=torch.float32)
    scaled_step(one, first, criterion, x, y, s)
    scaled_step(two, second, own, x, y, other)

    def reset(model, optimizer):
        if how == "optimizer.zero_grad":
            optimizer.zero_grad()
        elif how == "model.zero_grad":
            model.zero_grad()
        else:
            for p in model.parameters():
                p.grad = None

    kept, state = weights(one), flat_state(first)
    reset(one, first)
    s.scale(criterion(one(x), y) * 1e38).backward()
    s.step(first)
    s.update()
    assert_weights_equal(kept, one)
    assert_state_equal(state, first.state_dict())
    assert s.get_scale() < 1024.0
    s.update(1024.0)
    x, y = batch(dtype=torch.float32, seed=5)
    for model, optimizer, c, t in ((one, first, criterion, s), (two, second, own, other)):
        reset(model, optimizer)
        t.scale(c(model(x), y)).backward()
        t.step(optimizer)
        t.update()
    assert_weights_equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_autocast_trains(name, kind, dtype):
    model, make = build(kind, torch.float32)
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    s = scaler(2.0**8)
    x, y = make(dtype=torch.float32)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = criterion(model(x), y)
        s.scale(loss).backward()
        s.step(optimizer)
        s.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
    if name.startswith("DDPNOpt"):
        assert_feedback_active(optimizer)


@pytest.mark.parametrize("terminal", ["outer-product", "gauss-newton"])
@pytest.mark.parametrize("bellman", ["sample", "joint"])
def test_autocast_is_close_to_single_precision(bellman, terminal):
    one = mlp(torch.float32)
    two = copy.deepcopy(one)
    x, y = batch(dtype=torch.float32)
    before = weights(one)
    for model, on in ((one, True), (two, False)):
        criterion = nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS["DDPNOpt-identity"](
            model, criterion, bellman=bellman, terminal=terminal
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        assert_feedback_active(optimizer)
    assert_updates_close(before, one, two, 0.05)


ROLLOUTS = [
    (name, rollout)
    for name in OPTIMIZERS
    for rollout in (("linear", "nonlinear") if name.startswith("DDPNOpt") else ("off",))
]


@pytest.mark.parametrize("name,rollout", ROLLOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_models_of_other_precision_train(name, kind, dtype, rollout):
    model, make = build(kind, dtype)
    criterion = nn.CrossEntropyLoss()
    options = {"rollout": rollout} if name.startswith("DDPNOpt") else {}
    optimizer = OPTIMIZERS[name](model, criterion, **options)
    x, y = make(dtype=dtype)
    losses = [float(step(model, optimizer, criterion, x, y)) for _ in range(15)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())
    if name.startswith("DDPNOpt"):
        assert_feedback_active(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mixed_model(name):
    """Layers of different precision in one model."""
    model = mlp(torch.float32)
    model[2].double()

    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.to(self.dtype)

    mixed = nn.Sequential(
        model[0], model[1], Cast(torch.float64), model[2], model[3], Cast(torch.float32), model[4]
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](mixed, criterion)
    x, y = batch(dtype=torch.float32)
    losses = [float(step(mixed, optimizer, criterion, x, y)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert [p.dtype for p in mixed.parameters()] == [torch.float32] * 2 + [torch.float64] * 2 + [
        torch.float32
    ] * 2
