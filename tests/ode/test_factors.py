"""Kronecker factors of a field's layers, by loops; and which backward passes they are made of."""

import copy

import pytest
import torch
from ode.blocks import (
    TIGHT,
    batch,
    gathered,
    locations,
    make,
    reference,
    relative,
    snopt,
    steady,
)

import ocnopt
from ocnopt.ode import NeuralODE


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


def dense_factors(field, layer, x0, cost, step, count, substeps=10):
    """A and B of a layer by loops over points of time, samples and locations."""
    module = dict(field.named_modules())[layer]
    states, adjoints = reference(field, x0, cost, 0.0, 1.0, count * substeps)
    outer_z, outer_g, seen = 0, 0, 0
    for j in range(count):
        t = torch.tensor(j * substeps / (count * substeps))
        x, a = states[j * substeps].detach(), adjoints[j * substeps]
        for n in range(len(x0)):
            calls = []
            handle = module.register_forward_hook(lambda m, i, o, c=calls: c.append((i[0], o)))
            value = field(t, x[n : n + 1])
            handle.remove()
            ((z, h),) = calls
            (g,) = torch.autograd.grad(value, h, a[n : n + 1])
            g = g * len(x0)  # of a sample's own loss; the batch's is the mean
            for row, col in locations(module, z, g):
                outer_z = outer_z + torch.outer(row, row)
                outer_g = outer_g + torch.outer(col, col)
                seen += 1
    return outer_z / seen, step * (1 / count) * outer_g / len(x0)


CASES = [
    ("Linear", "layers.0.linear"),
    ("Linear", "layers.2"),
    ("ConcatSquashLinear", "layers.0.linear"),
    ("ConcatSquashLinear", "layers.0.gate"),
    ("ConcatSquashLinear", "layers.2.shift"),
    ("ConcatConv2d", "first.conv"),
    ("ConcatConv2d", "last.conv"),
]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_row_39_factors_by_loops(name, layer):
    field, x = make(name)

    def cost(out):
        return out.sin().flatten(1).sum(1).mean()

    block = NeuralODE(field, method="rk4", options={"step_size": 0.05})
    statistics = gathered(block, 0.1)
    cost(block(x)).backward()
    a, b = dense_factors(field, layer, x, cost, 0.1, 10)
    (player,) = (p for p in statistics.players if p.name == f"func.{layer}")
    assert statistics.samples == 6
    found_a, found_b = statistics.factors(player, 6, 6.0)
    assert relative(found_a[0], a) < 1e-6
    assert relative(found_b[0], b) < 1e-6


def test_factors_of_groups_are_apart():
    """Every group of a convolution has the factors of a convolution of its own."""
    field, x = make("ConcatConv2d")
    block = NeuralODE(field, **TIGHT)
    statistics = gathered(block, 0.1)
    block(x).sin().sum().backward()
    (player,) = (p for p in statistics.players if p.name == "func.grouped")
    a, b = statistics.factors(player, 6, 1.0)
    assert a.shape == (2, 2 * 9, 2 * 9) and b.shape == (2, 2, 2)
    assert relative(a[0], a[1]) > 0.01


@pytest.mark.parametrize("adjoint", [True, False])
def test_times_of_every_sample_are_times(adjoint):
    """D is in units of the ODE's time and not of the time that the samples share."""
    field, x = make("Linear")
    options = {"method": "rk4", "options": {"step_size": 0.025}, "adjoint": adjoint}
    together, each = NeuralODE(field, **options), NeuralODE(copy.deepcopy(field), **options)
    t = torch.tensor([0.0, 0.5, 1.0])
    one, other = gathered(together, 0.05), gathered(each, 0.05)
    together(x, t)[-1].sin().sum().backward()
    each(x, t[:, None].expand(3, 6))[-1].sin().sum().backward()
    for p, q in zip(one.players, other.players, strict=True):
        for f, e in zip(other.factors(q, 6, 1.0), one.factors(p, 6, 1.0), strict=True):
            # The shared time has other steps of the solver, by trapezoids without an adjoint.
            assert relative(f, e) < (1e-6 if adjoint else 1e-2)


def test_samples_that_stand_still_have_no_part():
    """As many points as the longest time asks for; each weighs as much time as its sample has."""
    field, x = make("Linear")
    block, alone = NeuralODE(field, **TIGHT), NeuralODE(copy.deepcopy(field), **TIGHT)
    statistics, own = gathered(block, 0.1), gathered(alone, 0.1)
    times = torch.tensor([[0.0] * 6, [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    block(x, times)[-1].sin().sum().backward()
    alone(x[[0, 2]]).sin().sum().backward()
    for p, q in zip(statistics.players, own.players, strict=True):
        assert statistics.moments[p].points == own.moments[q].points == 10
        for f, e in zip(statistics.factors(p, 2, 1.0), own.factors(q, 2, 1.0), strict=True):
            assert relative(f, e) < 1e-6


# which passes count


def test_a_pass_for_other_gradients_does_not_count():
    """The gradient with respect to an input, asked for before and after the pass that trains."""
    field, x = make("Linear")
    optimizer = ocnopt.SNOpt(block := NeuralODE(field, **TIGHT), lr=0.1)
    found = optimizer._solved.statistics
    probe = x.clone().requires_grad_()
    torch.autograd.grad(block(probe).sum(), probe)
    block(x).sum().backward()
    expected = {p: m.signals.clone() for p, m in found.moments.items()}
    torch.autograd.grad(block(probe).sum(), probe)
    assert found.samples == 6
    for player, signals in expected.items():
        assert found.moments[player].points == 100
        assert torch.equal(found.moments[player].signals, signals)


HOW = ["optimizer", "model", "model in place", "by hand", "by hand in place"]


@pytest.mark.parametrize("how", HOW)
def test_gradients_that_were_thrown_away_are_forgotten(how):
    """As after a step that a loss scaler skipped."""
    field, x = make("Linear")
    optimizer = ocnopt.SNOpt(block := NeuralODE(field, **TIGHT), lr=0.1)
    found = optimizer._solved.statistics
    block(x).sum().backward()
    if how == "optimizer":
        optimizer.zero_grad()
        assert found.samples == 0 and not found.moments
    elif how.startswith("model"):
        block.zero_grad(set_to_none=how == "model")
    else:
        for p in block.parameters():
            if how == "by hand":
                p.grad = None
            else:
                p.grad.zero_()
    block(x[:4]).sum().backward()
    assert found.samples == 4
    assert all(m.points == 100 for m in found.moments.values())


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("when", ["before the forward pass", "after it"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_that_is_thrown_away_has_no_part_in_the_next_step(in_place, when, adjoint):
    models = []
    for skipped in (True, False):
        model = steady(adjoint=adjoint)
        optimizer = snopt(model, update_every=1)

        def away(model=model, skipped=skipped):
            for p in model.parameters() if skipped else ():
                if in_place:
                    p.grad.zero_()
                else:
                    p.grad = None

        x, y = batch(1, size=5)
        if skipped:
            torch.nn.functional.cross_entropy(model(5 * x), y).backward()
        if when == "before the forward pass":
            away()
        x, y = batch(0)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if when == "after it":
            away()
        loss.backward()
        optimizer.step()
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_accumulated_gradients_of_zero_are_not_thrown_away():
    """A pass counts though its gradient is zero: its samples are among those of the mean."""
    field, x = make("Linear")
    optimizer = ocnopt.SNOpt(block := NeuralODE(field, **TIGHT), lr=0.1)
    found = optimizer._solved.statistics
    (0 * block(x)).sum().backward()
    block(x[:4]).sum().backward()
    assert found.samples == 10


def test_nothing_is_kept_without_a_backward_pass():
    field, x = make("Linear")
    optimizer = ocnopt.SNOpt(block := NeuralODE(field, **TIGHT), lr=0.1)
    block(x)
    with torch.no_grad():
        block(x)
    assert optimizer._solved.statistics.samples == 0
    assert not optimizer._solved.statistics.moments
    assert block.evaluations.sampling == 0
