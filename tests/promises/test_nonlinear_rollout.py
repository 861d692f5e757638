"""The second forward pass leaves no trace of itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from promises.conformance import (
    PRECONDITIONERS,
    assert_feedback_active,
    assert_state_equal,
    assert_updates_close,
    assert_weights_equal,
    batch,
    build,
    ddpnopt,
    flat_state,
    mlp,
    run,
    step,
    weights,
)
from torch import nn

import ocnopt


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_statistics_of_batch_norm_are_updated_once(name):
    model, make = build("resnet")
    plain = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = ddpnopt(model, criterion, name, rollout="nonlinear")
    for i in range(2):
        x, y = make(seed=i)
        plain.load_state_dict(model.state_dict())
        plain(x)
        step(model, optimizer, criterion, x, y)
        assert_feedback_active(optimizer)
        for n, b in statistics(plain).items():
            assert torch.equal(b, dict(model.named_buffers())[n]), n
    assert int(model.norms[0].num_batches_tracked) == 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        self.outputs = []
        self.noise = 0.1

    def forward(self, x):
        x = self.drop(torch.tanh(self.first(x)))
        x = x + self.noise * torch.randn_like(x)
        x = F.dropout(torch.tanh(self.second(x)), 0.3, self.training)
        x = self.last(x)
        self.outputs.append(x.detach())
        return x


def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.mark.parametrize("bellman", ["share", "joint", "off"])
def test_masks_are_the_same_in_the_second_pass(bellman):
    """Its output is that of the updated weights under the first pass's random numbers."""
    model = net()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.3, rollout="nonlinear", bellman=bellman)
    x, y = batch()
    torch.manual_seed(42)
    step(model, optimizer, criterion, x, y)
    first, second = model.outputs
    torch.manual_seed(42)
    with torch.no_grad():
        expected = model(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)
    assert_feedback_active(optimizer)


def test_equals_the_manual_computation():
    """Two linear layers with dropout between: rho is P^T of the change under the same mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion = nn.CrossEntropyLoss()
    lr = 0.2
    optimizer = ocnopt.DDPNOpt(
        model,
        criterion,
        lr=lr,
        rollout="nonlinear",
        bellman="off",
        terminal="outer-product",
        feedback_clip=None,
    )
    before = weights(model)
    x, y = batch(6)
    torch.manual_seed(7)
    step(model, optimizer, criterion, x, y)
    assert_feedback_active(optimizer)

    w0, b0 = before["0.weight"], before["0.bias"]
    w1, b1 = before["3.weight"], before["3.bias"]
    torch.manual_seed(7)
    mask = F.dropout(torch.ones(6, 6, dtype=torch.float64), 0.5)
    state = torch.tanh((x @ w0.t() + b0) * mask)
    signal = (state @ w1.t() + b1).softmax(-1) - F.one_hot(y, 3)  # per sample
    back = (signal @ w1) * (1 - state**2) * mask
    new_w0, new_b0 = w0 - lr * back.t() @ x / 6, b0 - lr * back.mean(0)
    new_state = torch.tanh((x @ new_w0.t() + new_b0) * mask)
    rho = ((signal @ w1) * (new_state - state)).sum(-1, keepdim=True)
    steered = signal * (1 + rho)
    new_w1, new_b1 = w1 - lr * steered.t() @ state / 6, b1 - lr * steered.mean(0)
    expected = {"0.weight": new_w0, "0.bias": new_b0, "3.weight": new_w1, "3.bias": new_b1}
    assert_updates_close(before, model, expected, 1e-11)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_random_state_after_the_step(name):
    model = net()
    criterion = nn.CrossEntropyLoss()
    optimizer = ddpnopt(model, criterion, name, rollout="nonlinear")
    x, y = batch()
    torch.manual_seed(3)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    expected = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(expected, torch.get_rng_state())


class Fragile(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.calls = 0
        self.fail_at = None

    def forward(self, x):
        self.calls += 1
        out = self.body[:3](x)
        if self.calls == self.fail_at:
            raise KeyError("on purpose")
        return self.body[3:](out)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_exception_in_the_second_pass(name):
    """The first layers have moved by then; they are put back, and so is the rest."""
    model = Fragile()
    criterion = nn.CrossEntropyLoss()
    optimizer = ddpnopt(model, criterion, name, rollout="nonlinear", momentum=0.5)
    run(model, optimizer, 2, criterion)
    kept, state = weights(model), flat_state(optimizer)
    random = torch.get_rng_state()
    model.fail_at = model.calls + 2
    with pytest.raises(KeyError, match="on purpose"):
        run(model, optimizer, 1, criterion, start=2)
    assert_weights_equal(kept, model)
    assert torch.equal(random, torch.get_rng_state())
    assert_state_equal(state, optimizer.state_dict())
    twin = Fragile()
    other = ddpnopt(twin, own := nn.CrossEntropyLoss(), name, rollout="nonlinear", momentum=0.5)
    run(twin, other, 2, own)
    run(model, optimizer, 2, criterion, start=3)
    run(twin, other, 2, own, start=3)
    assert_weights_equal(model, twin)


def test_exception_in_the_first_pass_leaves_torch_usable():
    model = Fragile()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, rollout="nonlinear")
    model.fail_at = 1
    with pytest.raises(KeyError):
        model(batch()[0])
    from torch.overrides import _get_current_function_mode_stack

    assert not _get_current_function_mode_stack()
    run(model, optimizer, 2, criterion)
    assert_feedback_active(optimizer)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_accumulation_is_refused_by_name(name):
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = ddpnopt(model, criterion, name, rollout="nonlinear")
    x, y = batch()
    before, state = weights(model), flat_state(optimizer)
    for a, b in zip(x.split(6), y.split(6), strict=True):
        (criterion(model(a), b) / 2).backward()
    with pytest.raises(ocnopt.GraphError, match="accumulation"):
        optimizer.step()
    assert_weights_equal(before, model)
    assert_state_equal(state, optimizer.state_dict())


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_close_to_the_linear_rollout_at_a_small_rate(name):
    """The two differ in second order: halving the rate divides the difference of rho by four."""
    differences = []
    for lr in (0.008, 0.004):
        ended = []
        for rollout in ("linear", "nonlinear", "off"):
            model = mlp()
            optimizer = ddpnopt(
                model, c := nn.CrossEntropyLoss(), name, lr=lr, rollout=rollout, feedback_clip=None
            )
            run(model, optimizer, 1, c)
            ended.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        linear, nonlinear, off = ended
        differences.append(float((linear - nonlinear).norm()))
        assert float((linear - off).norm()) > 3 * differences[-1]
    # One order from the rate of the step itself, two from rho.
    assert 5 < differences[0] / differences[1] < 11


@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet"])
def test_measured_decrease_is_the_decrease(kind):
    """``measure_every`` runs the batch again; statistics and weights do not notice."""
    ended = []
    for measure in (0, 1):
        model, make = build(kind)
        criterion = nn.CrossEntropyLoss()
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, measure_every=measure)
        x, y = make(seed=4)
        loss = step(model, optimizer, criterion, x, y)
        if measure:
            twin = copy.deepcopy(model)
            actual = float(loss) - float(criterion(twin(x), y).detach())
            found = optimizer.diagnostics.total
            assert found.actual_decrease == pytest.approx(actual, rel=1e-9)
            assert found.predicted_decrease == pytest.approx(actual, rel=0.3)
        else:
            assert optimizer.diagnostics.total.actual_decrease is None
        ended.append(model)
    assert_weights_equal(*ended)
