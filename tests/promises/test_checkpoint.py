"""A run that was interrupted goes on bit for bit."""

import io

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_state_equal,
    assert_weights_equal,
    build,
    flat_state,
    mlp,
    run,
    weights,
)
from torch import nn

import ocnopt


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continues_bit_for_bit(name, kind, dtype):
    """Interrupted between two refreshes of the curvature, with momentum on."""
    criterion = nn.CrossEntropyLoss()
    one, make = build(kind, dtype)
    first = OPTIMIZERS[name](one, criterion, momentum=0.5)
    run(one, first, 3, criterion, dtype, make)
    model_state, optimizer_state = saved(one.state_dict()), saved(first.state_dict())
    run(one, first, 4, criterion, dtype, make, start=3)

    two, _ = build(kind, dtype, seed=5)
    own = nn.CrossEntropyLoss()
    second = OPTIMIZERS[name](two, own, momentum=0.5)
    two.load_state_dict(model_state)
    second.load_state_dict(optimizer_state)
    run(two, second, 4, own, dtype, make, start=3)
    if name.startswith("DDPNOpt"):
        assert_feedback_active(second)
    assert_weights_equal(one, two)
    assert_state_equal(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("name", ["DDPNOpt-rmsprop", "DDPNOpt-adam", "DDPNOpt-ekfac", "EKFAC"])
def test_state_matters(name):
    """The test above can fail: without the state, the continuation is another."""
    criterion = nn.CrossEntropyLoss()
    one, two = mlp(), mlp()
    first = OPTIMIZERS[name](one, criterion)
    run(one, first, 3, criterion)
    two.load_state_dict(one.state_dict())
    run(one, first, 2, criterion, start=3)
    run(two, OPTIMIZERS[name](two, own := nn.CrossEntropyLoss()), 2, own, start=3)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loading_moves_nothing_else(name):
    criterion = nn.CrossEntropyLoss()
    one, two = mlp(), mlp(seed=3)
    first = OPTIMIZERS[name](one, criterion, momentum=0.5)
    run(one, first, 3, criterion)
    own = nn.CrossEntropyLoss()
    second = OPTIMIZERS[name](two, own, momentum=0.5)
    run(two, second, 1, own)
    state = first.state_dict()
    before, kept = weights(two), flat_state(first)
    grads = [p.grad.clone() for p in two.parameters()]
    generator = torch.get_rng_state()
    second.load_state_dict(state)
    assert_weights_equal(before, two)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, two.parameters(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    # Training the one that loaded does not reach into the one that was saved.
    run(two, second, 3, own)
    assert_state_equal(kept, first.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_of_the_groups_come_back(name):
    criterion = nn.CrossEntropyLoss()
    one, two = mlp(), mlp()
    groups = [{"params": "0", "lr": 0.5, "weight_decay": 0.25}]
    first = OPTIMIZERS[name](one, criterion, params=groups)
    second = OPTIMIZERS[name](two, criterion, params=[{"params": "0"}])
    second.load_state_dict(saved(first.state_dict()))
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups]
    assert second.param_groups[0]["weight_decay"] == 0.25
    assert second.param_groups[0]["preconditioner"] == first.param_groups[0]["preconditioner"]


def test_preconditioner_options_come_back():
    """An object with options of its own, loaded into an optimizer that was built otherwise."""
    criterion = nn.CrossEntropyLoss()
    one, two = mlp(), mlp()
    rule = ocnopt.curvature.Adam(betas=(0.5, 0.9), eps=1e-2)
    first = ocnopt.DDPNOpt(one, criterion, lr=0.01, preconditioner=rule)
    run(one, first, 2, criterion)
    own = nn.CrossEntropyLoss()
    second = ocnopt.DDPNOpt(two, own, lr=0.01, preconditioner="adam")
    two.load_state_dict(one.state_dict())
    second.load_state_dict(saved(first.state_dict()))
    run(one, first, 3, criterion, start=2)
    run(two, second, 3, own, start=2)
    assert_weights_equal(one, two)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_factors_keep_their_precision(name):
    """torch casts state to the parameter's dtype on loading; factors must stay as they were."""
    criterion = nn.CrossEntropyLoss()
    model = mlp(torch.bfloat16)
    optimizer = OPTIMIZERS[f"DDPNOpt-{name}"](model, criterion)
    run(model, optimizer, 2, criterion, torch.bfloat16)
    dtypes = {
        key: value.dtype
        for key, value in optimizer.state[model[0].weight].items()
        if isinstance(value, torch.Tensor)
    }
    assert torch.float32 in dtypes.values()
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    for key, dtype in dtypes.items():
        assert optimizer.state[model[0].weight][key].dtype == dtype


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrong_state_is_refused(name):
    criterion = nn.CrossEntropyLoss()
    one = mlp()
    first = OPTIMIZERS[name](one, criterion)
    run(one, first, 1, criterion)
    two = nn.Sequential(nn.Linear(5, 3)).double()
    second = OPTIMIZERS[name](two, criterion)
    kept = flat_state(second)
    with pytest.raises(ValueError):
        second.load_state_dict(first.state_dict())
    assert_state_equal(kept, second.state_dict())


class Sequence(nn.Module):
    """Layers with many locations, whose inputs are not kept where no factors are due."""

    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.head = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x.unsqueeze(1).expand(-1, 20, -1)
        return self.head(torch.tanh(self.middle(torch.tanh(self.enter(x)))).mean(1))


@pytest.mark.parametrize("information", ["open-loop", "feedback", "group-rational"])
def test_a_state_with_another_preconditioner_is_followed(information):
    criterion = nn.CrossEntropyLoss()

    def built(model, rule):
        return ocnopt.DGNOpt(model, criterion, lr=0.1, preconditioner=rule, information=information)

    def run(model, optimizer, first, last):
        for i in range(first, last):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            criterion(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()

    torch.manual_seed(0)
    model, other = Sequence(), Sequence()
    optimizer, again = built(model, "kfac"), built(other, "identity")
    run(model, optimizer, 0, 3)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    run(model, optimizer, 3, 15)
    run(other, again, 3, 15)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
