"""The optimizers that SNOpt reduces to, and the layers that are not its own."""

import copy

import pytest
import torch
from ode.blocks import FIELDS, STEADY, batch, make, steady, timed, trained
from promises.conformance import assert_updates_close, assert_weights_close, weights
from torch import nn

import ocnopt
from ocnopt.ode import NeuralODE


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


def cost(out):
    return out.sin().flatten(1).sum(1)


def train(model, optimizers, steps, start=0, loss=nn.functional.cross_entropy):
    for i in range(start, start + steps):
        x, y = batch(seed=i)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


# row 43: layers outside


def outside(model):
    return {k: v for k, v in weights(model).items() if not k.startswith("1.")}


def test_row_43_outside_layers_take_ekfacs_steps():
    """Step for step, with the Neural ODE at rest so that both see the same states."""
    one, two = steady(), steady()
    options = {"lr": 0.05, "damping": 0.05, "momentum": 0.5, "weight_decay": 0.01}
    resting = [{"params": "1", "lr": 0.0}]
    first = ocnopt.SNOpt(one, precondition_all=True, update_every=3, params=resting, **options)
    second = ocnopt.EKFAC(
        two, update_every=3, decay=0.0, eigen_decay=0.75, params=copy.deepcopy(resting), **options
    )
    before = outside(one)
    train(one, [first], 7)
    train(two, [second], 7)
    assert_updates_close(before, outside(one), outside(two), 1e-12)
    # By default they take gradient steps.
    three, four = steady(), steady()
    third = ocnopt.SNOpt(three, params=copy.deepcopy(resting), **options)
    sgd = torch.optim.SGD(
        [*four[0].parameters(), *four[2].parameters()], lr=0.05, momentum=0.5, weight_decay=0.01
    )
    train(three, [third], 7)
    train(four, [sgd], 7)
    assert_updates_close(before, outside(three), outside(four), 1e-12)


def test_row_43_eigenvalues_do_not_grow_with_refreshes():
    """On one and the same batch, every refresh finds one and the same curvature everywhere."""
    model = steady()
    optimizer = ocnopt.SNOpt(model, lr=0.0, precondition_all=True, update_every=1, eigen_decay=1.0)
    x, y = batch()
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        seen.append([optimizer.state[p]["m2"] for p in model.parameters() if optimizer.state[p]])
    assert len(seen[0]) == 4  # layers
    for later in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], later, strict=True))


# reductions


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_much_damping_makes_it_sgd(momentum, adjoint):
    """m2 is lost beside d: the direction is G / d; momentum and weight decay as in SGD."""
    rate, shrink, d = 0.05, 0.02, 1e9
    one, two = steady(adjoint=adjoint), steady(adjoint=adjoint)
    plain = {"params": ["0", "2"], "lr": rate, "weight_decay": shrink}
    mine = ocnopt.SNOpt(
        one,
        lr=rate * d,
        damping=d,
        momentum=momentum,
        weight_decay=shrink / d,  # added after the division
        update_every=4,
        params=[plain],
    )
    theirs = torch.optim.SGD(two.parameters(), lr=rate, momentum=momentum, weight_decay=shrink)
    before = trained(one)
    train(one, [mine], 20)
    train(two, [theirs], 20)
    assert_updates_close(before, one, two, 1e-6)


def test_little_damping_does_not():
    """The comparison can fail."""
    one, two = steady(), steady()
    train(one, [ocnopt.SNOpt(one, lr=0.05 * 0.1, damping=0.1)], 3)
    train(two, [torch.optim.SGD(two.parameters(), lr=0.05)], 3)
    with pytest.raises(AssertionError):
        assert_weights_close(one[1], two[1], 1e-3)


def test_a_group_of_adams():
    """GRU and head of a recurrent model, say: torch's Adam on them, next to SNOpt on the rest."""
    one, two = steady(), steady()
    adam = {"params": ["0", "2"], "preconditioner": "adam", "lr": 0.01}
    first = ocnopt.SNOpt(one, lr=0.05, update_every=4, params=[adam])
    second = ocnopt.SNOpt(two, lr=0.05, update_every=4, params=[{**adam, "lr": 0.0}])
    theirs = torch.optim.Adam([*two[0].parameters(), *two[2].parameters()], lr=0.01)
    before = trained(one)
    train(one, [first], 10)
    train(two, [second, theirs], 10)
    assert_updates_close(before, one, two, 1e-10)
    assert {row.treatment for row in first.coverage()} == {"adjoint", "first-order"}


def test_a_block_trained_by_adam():
    """Layers of the field, too, may have another rule; coverage says which."""
    model, other = steady(), steady()
    adam = {"params": "1.func.layers.0", "preconditioner": "adam", "lr": 0.01}
    optimizer = ocnopt.SNOpt(model, lr=0.0, params=[adam])
    theirs = torch.optim.Adam(other[1].func.layers[0].parameters(), lr=0.01)
    before = weights(model[1].func.layers[0])
    train(model, [optimizer], 4)
    train(other, [theirs], 4)
    assert_updates_close(before, model[1].func.layers[0], other[1].func.layers[0], 1e-10)
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert rows["1.func.layers.0.linear.weight"].treatment == "first-order"
    assert "'adam'" in rows["1.func.layers.0.linear.weight"].reason
    assert rows["1.func.layers.2.weight"].treatment == "adjoint"


def test_two_blocks_are_as_two_models():
    """Blocks in parallel on inputs of their own share nothing but the step."""
    torch.manual_seed(0)
    fields = [timed(), timed()]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                NeuralODE(copy.deepcopy(f), 0.0, 0.5 + i, **STEADY) for i, f in enumerate(fields)
            )

        def forward(self, x):
            return [block(x) for block in self.blocks]

    model = Both()
    optimizer = ocnopt.SNOpt(model, lr=0.05, update_every=2, sample_step=0.1)
    alone = [NeuralODE(copy.deepcopy(f), 0.0, 0.5 + i, **STEADY) for i, f in enumerate(fields)]
    each = [ocnopt.SNOpt(block, lr=0.05, update_every=2, sample_step=0.1) for block in alone]
    for i in range(3):
        x = torch.randn(6, 3) + 0.1 * i
        optimizer.zero_grad()
        sum(cost(out).mean() for out in model(x)).backward()
        optimizer.step()
        for block, own in zip(alone, each, strict=True):
            own.zero_grad()
            cost(block(x)).mean().backward()
            own.step()
    for block, other in zip(model.blocks, alone, strict=True):
        assert_weights_close(block, other, 1e-12)


@pytest.mark.parametrize("name", FIELDS)
def test_the_loss_falls(name):
    """Faster than plain gradient steps of the same rate: a smoke test of the sign."""
    field, x = make(name)
    block = NeuralODE(field, **STEADY)
    target = torch.randn_like(x) * 0.3
    optimizer = ocnopt.SNOpt(block, lr=0.05, update_every=5, sample_step=0.1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (block(x) - target).square().flatten(1).sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_may_be_a_sum():
    """The factors are those of samples all the same; the rate is the only difference."""
    one, two = steady(), steady()
    first = ocnopt.SNOpt(one, lr=0.1, update_every=2, eigen_decay=1.0)
    second = ocnopt.SNOpt(two, lr=0.1 / 8, update_every=2, eigen_decay=1.0, reduction="sum")

    def total(out, y):
        return nn.functional.cross_entropy(out, y, reduction="sum")

    before = trained(one)
    train(one, [first], 3)
    train(two, [second], 3, loss=total)
    assert_updates_close(before, one, two, 1e-9)
