"""torch.compile: the optimizer is built first, and whoever builds it later is told so."""

import copy

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_weights_close,
    batch,
    mlp,
    step,
    weights,
)
from torch import nn

import ocnopt


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_and_run_before_the_optimizer_was_built():
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend="eager")
    x, y = batch()
    criterion(compiled(x), y).backward()
    model.zero_grad()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    before = weights(model)
    criterion(compiled(x), y).backward()
    try:
        optimizer.step()
    except ocnopt.RecordingError as error:
        assert "torch.compile" in str(error)
        assert all(torch.equal(before[n], p) for n, p in weights(model).items())
    else:
        # The compiler noticed the hooks and compiled again: then they must have worked.
        assert_feedback_active(optimizer)


@pytest.mark.parametrize(
    "name,backend",
    [
        *((name, "eager") for name in OPTIMIZERS),
        ("DDPNOpt-adam", "aot_eager"),
        ("KFAC", "aot_eager"),
    ],
)
def test_optimizer_built_first(name, backend):
    model = mlp()
    plain = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss()
    own = nn.CrossEntropyLoss()
    optimizer, reference = OPTIMIZERS[name](model, criterion), OPTIMIZERS[name](plain, own)
    compiled = torch.compile(model, backend=backend)
    for i in range(3):
        x, y = batch(seed=i)
        step(compiled, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
        if name.startswith("DDPNOpt"):
            assert_feedback_active(optimizer)
    assert_weights_close(model, plain, 1e-12)


@pytest.mark.parametrize("terminal", ["outer-product", "gauss-newton"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_terminal_forms(backend, terminal):
    model = mlp()
    plain = copy.deepcopy(model)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, terminal=terminal)
    reference = ocnopt.DDPNOpt(plain, own, lr=0.1, terminal=terminal)
    compiled = torch.compile(model, backend=backend)
    for i in range(2):
        x, y = batch(seed=i)
        step(compiled, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
    assert_feedback_active(optimizer)
    assert_weights_close(model, plain, 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_built_on_the_compiled_wrapper(backend):
    model = mlp()
    plain = copy.deepcopy(model)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend=backend)
    optimizer = ocnopt.DDPNOpt(compiled, criterion, lr=0.1)
    reference = ocnopt.DDPNOpt(plain, own, lr=0.1)
    for i in range(2):
        x, y = batch(seed=i)
        step(compiled, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
    assert_feedback_active(optimizer)
    assert_weights_close(model, plain, 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_model_compiled_in_place(backend):
    """``model.compile()`` instead of a wrapper."""
    model = mlp()
    plain = copy.deepcopy(model)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    reference = ocnopt.DDPNOpt(plain, own, lr=0.1)
    model.compile(backend=backend)
    for i in range(2):
        x, y = batch(seed=i)
        step(model, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
    assert_feedback_active(optimizer)
    assert_weights_close(plain, model, 1e-12)
