"""Hooks are harmless: copies, pickles, dropped optimizers, one optimizer after another."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_state_equal,
    assert_weights_equal,
    batch,
    mlp,
    run,
    step,
    weights,
)
from torch import nn

import ocnopt

ROLLOUTS = ["linear", "nonlinear"]


def hooks_of(model, criterion):
    """Every hook on modules and parameters."""
    count = 0
    for module in [*model.modules(), *criterion.modules()]:
        for table in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ):
            count += len(table)
    for p in model.parameters():
        count += len(p._backward_hooks or {})
        count += len(getattr(p, "_post_accumulate_grad_hooks", None) or {})
    return count


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_deepcopy_of_a_hooked_model(when, rollout):
    """A copy made and trained at any time leaves the original's step as it would have been."""
    ended, states = [], []
    for disturb in (True, False):
        model = mlp()
        criterion = nn.CrossEntropyLoss()
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, rollout=rollout)
        x, y = batch()
        step(model, optimizer, criterion, x, y)

        def other(model=model, criterion=criterion, disturb=disturb):
            if disturb:
                twin = copy.deepcopy(model)
                own = copy.deepcopy(criterion)
                a, b = batch(7, seed=9)
                own(twin(a), b).backward()
                assert all(p.grad is not None for p in twin.parameters())
                nn.CrossEntropyLoss()(twin(a), b).backward()

        optimizer.zero_grad()
        if when == "before":
            other()
        out = model(x)
        if when == "between":
            other()
        criterion(out, y).backward()
        if when == "after":
            other()
        optimizer.step()
        assert_feedback_active(optimizer)
        ended.append(model)
        states.append(optimizer.state_dict())
    assert_weights_equal(*ended)
    assert_state_equal(*states)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_can_have_an_optimizer_of_its_own(name):
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    run(model, optimizer, 2, criterion)
    twin = copy.deepcopy(model)
    fresh = mlp()
    fresh.load_state_dict(twin.state_dict())
    run(twin, OPTIMIZERS[name](twin, criterion), 3, criterion)
    own = nn.CrossEntropyLoss()
    run(fresh, OPTIMIZERS[name](fresh, own), 3, own)
    assert_weights_equal(twin, fresh)


def test_averaged_model():
    """torch's AveragedModel copies the model; updating it does not disturb the step."""
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        run(model, optimizer, 1, criterion)
        average.update_parameters(model)
        with torch.no_grad():
            average(batch()[0])
    assert_feedback_active(optimizer)
    reference = mlp()
    other = ocnopt.DDPNOpt(reference, own := nn.CrossEntropyLoss(), lr=0.1)
    for _ in range(3):
        run(reference, other, 1, own)
    assert_weights_equal(model, reference)


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_model_can_be_pickled_and_saved(rollout):
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, rollout=rollout)
    run(model, optimizer, 2, criterion)
    x, y = batch()
    loss = criterion(model(x), y)
    twin = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    loss.backward()
    for loaded in (twin, other):
        assert_weights_equal(loaded, model)
        criterion(loaded(x), y).backward()
    optimizer.step()
    assert_feedback_active(optimizer)


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("name", ["identity", "adam", "kfac"])
def test_hooks_go_with_the_optimizer(name, rollout):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[f"DDPNOpt-{name}"](model, criterion, rollout=rollout)
    run(model, optimizer, 2, criterion)
    assert hooks_of(model, criterion) > 0
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert hooks_of(model, criterion) == 0


def test_hooks_go_with_an_optimizer_that_holds_a_pass():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x, y = batch()
    loss = criterion(model(x), y)
    loss.backward()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert hooks_of(model, criterion) == 0
    loss = criterion(model(x), y)
    loss.backward()


def test_dropped_between_forward_and_backward():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x, y = batch()
    loss = criterion(model(x), y)
    del optimizer
    gc.collect()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_to_record_means_no_hook():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, bellman="off", rollout="off")
    assert hooks_of(model, criterion) == 0
    run(model, optimizer, 1, criterion)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_optimizer_after_another(name, drop):
    """The second one trains as if there had been no first, dropped or not."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    first = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    run(model, first, 2, criterion)
    start = weights(model)
    if drop:
        del first
        gc.collect()
    run(model, OPTIMIZERS[name](model, criterion), 3, criterion)
    fresh = mlp()
    fresh.load_state_dict(start)
    run(fresh, OPTIMIZERS[name](fresh, own := nn.CrossEntropyLoss()), 3, own)
    assert_weights_equal(model, fresh)


def test_detach():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    run(model, optimizer, 1, criterion)
    optimizer.detach()
    assert hooks_of(model, criterion) == 0
    before = weights(model)
    x, y = batch()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    with pytest.raises(ocnopt.RecordingError, match="detach"):
        optimizer.step()
    assert_weights_equal(before, model)
    optimizer.detach()


def test_users_hooks_stay():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    model[0].weight.register_hook(lambda g: seen.append("grad"))
    run(model, optimizer, 1, criterion)
    optimizer.detach()
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, criterion)
    assert seen == ["hook", "grad"] * 2


def test_optimizer_can_be_deepcopied_or_says_why_not():
    """A copied optimizer either works on the copied model or refuses; it never runs blind."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    run(model, optimizer, 1, criterion)
    try:
        twin, own, other = copy.deepcopy((model, criterion, optimizer))
    except (ocnopt.OcnoptError, TypeError):
        return
    x, y = batch()
    before = weights(twin)
    other.zero_grad()
    own(twin(x), y).backward()
    try:
        other.step()
    except ocnopt.RecordingError:
        assert_weights_equal(before, twin)
    else:
        assert_feedback_active(other)
    step(model, optimizer, criterion, x, y)
    assert_feedback_active(optimizer)
