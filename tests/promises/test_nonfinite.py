"""A non-finite loss or gradient never reaches weights or state, and is named."""

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_state_equal,
    assert_weights_equal,
    batch,
    flat_state,
    mlp,
    run,
    step,
    weights,
)
from torch import nn

import ocnopt


def bad(kind, model):
    """A batch and a loss function that do damage."""
    x, y = batch(seed=7)
    if kind == "nan input":
        x[0, 0] = float("nan")
        return x, y, lambda v: v
    if kind == "inf input":
        x[3, 1] = float("inf")
        return x, y, lambda v: v
    if kind == "inf loss":
        return x, y, lambda v: v * float("inf")
    return x, y, lambda v: v + float("nan") * v


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["nan input", "inf input", "inf loss", "nan loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_batch(name, kind, momentum):
    one, two = mlp(), mlp()
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    first = OPTIMIZERS[name](one, criterion, momentum=momentum)
    second = OPTIMIZERS[name](two, own, momentum=momentum)
    run(one, first, 2, criterion)
    run(two, second, 2, own)
    kept, state = weights(one), flat_state(first)
    x, y, spoil = bad(kind, one)
    first.zero_grad()
    spoil(criterion(one(x), y)).backward()
    with pytest.raises(ocnopt.NonFiniteError) as caught:
        first.step()
    assert any(f"'{n}'" in str(caught.value) for n, _ in one.named_parameters())
    assert_weights_equal(kept, one)
    assert_state_equal(state, first.state_dict())
    run(one, first, 3, criterion, start=2)
    run(two, second, 3, own, start=2)
    assert_weights_equal(one, two)
    assert_state_equal(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("name", ["DDPNOpt-identity", "DDPNOpt-adam", "DDPNOpt-kfac"])
def test_bad_batch_with_a_nonlinear_rollout(name):
    one, two = mlp(), mlp()
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    first = OPTIMIZERS[name](one, criterion, rollout="nonlinear")
    second = OPTIMIZERS[name](two, own, rollout="nonlinear")
    run(one, first, 2, criterion)
    run(two, second, 2, own)
    kept, state = weights(one), flat_state(first)
    x, y, _ = bad("nan input", one)
    first.zero_grad()
    criterion(one(x), y).backward()
    with pytest.raises(ocnopt.NonFiniteError):
        first.step()
    assert_weights_equal(kept, one)
    assert_state_equal(state, first.state_dict())
    run(one, first, 2, criterion, start=2)
    run(two, second, 2, own, start=2)
    assert_weights_equal(one, two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_not_finite_but_gradients_are(name):
    """An infinite constant in the loss; the gradient alone would not tell."""
    model = mlp()
    criterion = ocnopt.Criterion(lambda out, y: nn.functional.cross_entropy(out, y) + float("inf"))
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    criterion(model(x), y).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    kept = weights(model)
    with pytest.raises(ocnopt.NonFiniteError, match="loss"):
        optimizer.step()
    assert_weights_equal(kept, model)
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_bad_micro_batch(name):
    """One of two accumulated passes is bad: none of it counts, and nothing is left of it."""
    one, two = mlp(), mlp()
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    first, second = OPTIMIZERS[name](one, criterion), OPTIMIZERS[name](two, own)
    x, y, _ = bad("nan input", one)
    good = batch(seed=3)
    (criterion(one(good[0]), good[1]) / 2).backward()
    (criterion(one(x), y) / 2).backward()
    kept = weights(one)
    with pytest.raises(ocnopt.NonFiniteError):
        first.step()
    assert_weights_equal(kept, one)
    step(one, first, criterion, *good)
    step(two, second, own, *good)
    assert_weights_equal(one, two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_overflows(name):
    """Finite gradients, infinite update: weights and state stay as they were."""
    model = mlp(torch.float32)
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, momentum=0.5)
    run(model, optimizer, 2, criterion, torch.float32)
    kept = weights(model)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 3e38, 1e4
    x, y = batch(dtype=torch.float32)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    state = flat_state(optimizer)
    with pytest.raises(ocnopt.NonFiniteError, match="update"):
        optimizer.step()
    assert_weights_equal(kept, model)
    assert_state_equal(state, optimizer.state_dict())


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n[-4:] not in ("prop", "adam")])
def test_large_but_finite(name):
    """Entries whose sum overflows are finite all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    criterion = ocnopt.Criterion(lambda out: out.sum() * 0)
    optimizer = OPTIMIZERS[name](model, criterion)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2e38)
    for group in optimizer.param_groups:
        # Shrinks every weight by its own size, through the gradient or next to it.
        group["lr"], group["weight_decay"] = 0.5, 1.0
    criterion(model(torch.zeros(3, 2))).backward()
    optimizer.step()
    for p in model.parameters():
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1e38))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closure(name):
    """As in torch, the closure runs the model; its loss is returned and checked."""
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    for _ in range(5):
        last = float(optimizer.step(closure).detach())
    assert last < first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["0.weight", "2.bias", "all"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_the_loop_spoils(name, where, value):
    """Noise, a division by a count of zero: the gradient was finite when autograd made it."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    run(model, optimizer, 1, criterion)
    kept, state = weights(model), flat_state(optimizer)
    x, y = batch()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    for n, p in model.named_parameters():
        if where == "all":
            p.grad.mul_(value)
        elif n == where:
            p.grad.view(-1)[0] = value
    with pytest.raises(ocnopt.NonFiniteError, match="gradient" if where == "all" else where):
        optimizer.step()
    assert_weights_equal(kept, model)
    assert_state_equal(state, optimizer.state_dict())
    step(model, optimizer, criterion, x, y)
