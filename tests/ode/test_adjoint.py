"""Gradients by the adjoint equation are those of back-propagation through the solver."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ode.blocks import FIELDS, TIGHT, gradients, make, relative, runge_kutta, timed
from torch import nn

from ocnopt.ode import NeuralODE


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


def derivatives(field, x0, solve):
    """Output, and the gradients of a nonlinear function of it."""
    field, x = copy.deepcopy(field), x0.clone().requires_grad_()
    out = solve(field, x)
    (out.sin() * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
    return {"out": out.detach(), "x0": x.grad, **gradients(field)}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(found[name], value) <= tolerance, name


# row 36


@pytest.mark.parametrize(
    ("method", "name"),
    [*(("dopri5", name) for name in FIELDS), ("dopri8", "Linear"), ("bosh3", "Linear")],
)
def test_row_36_gradient_is_that_of_back_propagation(method, name):
    field, x = make(name)
    tolerances = {"method": method, "rtol": 1e-6, "atol": 1e-6}

    def solve(adjoint):
        return derivatives(field, x, lambda f, x: NeuralODE(f, adjoint=adjoint, **tolerances)(x))

    adjoint, unrolled = solve(True), solve(False)
    assert_same(adjoint, unrolled, 1e-4)
    true = derivatives(field, x, lambda f, x: runge_kutta(f, x, 0.0, 1.0, 60)[-1])
    assert_same(adjoint, true, 1e-4)


@pytest.mark.parametrize("name", FIELDS)
def test_row_36_at_tight_tolerances(name):
    field, x = make(name)
    found = derivatives(field, x, lambda f, x: NeuralODE(f, 0.2, 1.5, **TIGHT)(x))
    true = derivatives(field, x, lambda f, x: runge_kutta(f, x, 0.2, 1.5, 100)[-1])
    # The times are kept in single precision.
    assert_same(found, true, 3e-7)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)]
)
def test_row_36_fixed_steps(method, order):
    """The adjoint is solved on its own grid: both gradients converge to the same, at its order."""
    field, x = make("Linear")
    true = derivatives(field, x, lambda f, x: runge_kutta(f, x, 0.0, 1.0, 200)[-1])
    errors = {}
    for adjoint in (True, False):
        for steps in (12, 24):
            options = {"step_size": 1 / steps}

            def solve(f, x, adjoint=adjoint, options=options):
                return NeuralODE(f, method=method, adjoint=adjoint, options=options)(x)

            found = derivatives(field, x, solve)
            errors[adjoint, steps] = max(relative(found[k], true[k]) for k in true if k != "out")
        assert 0.6 * 2**order < errors[adjoint, 12] / errors[adjoint, 24] < 1.7 * 2**order


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_row_36_multistep(method, adjoint):
    field, x = make("Linear")
    true = derivatives(field, x, lambda f, x: runge_kutta(f, x, 0.0, 1.0, 60)[-1])
    options = {"method": method, "adjoint": adjoint, "options": {"step_size": 0.025}}
    assert_same(derivatives(field, x, lambda f, x: NeuralODE(f, **options)(x)), true, 1e-5)


@pytest.mark.parametrize("times", [[0.0, 0.3, 0.4, 1.1], [1.0, 0.8, 0.1, -0.4]], ids=["up", "down"])
@pytest.mark.parametrize("adjoint", [True, False])
def test_row_36_several_times_up_and_down(adjoint, times):
    """A loss that looks at every state, the first one included."""
    field, x = make("Linear")

    def brute(f, x):
        states = [x]
        for a, b in pairwise(times):
            states.append(runge_kutta(f, states[-1], a, b, 60)[-1])
        return torch.stack(states)

    t = torch.tensor(times)
    block = {"adjoint": adjoint, **TIGHT}
    found = derivatives(field, x, lambda f, x: NeuralODE(f, **block)(x, t))
    assert_same(found, derivatives(field, x, brute), 1e-7)


@pytest.mark.parametrize("adjoint", [True, False])
def test_row_36_backward_in_time(adjoint):
    """t1 before t0; and the way back undoes the way there."""
    field, x = make("Linear")
    there, back = NeuralODE(field, 1.0, 0.0, adjoint=adjoint, **TIGHT), NeuralODE(field, **TIGHT)
    found = derivatives(field, x, lambda f, x: NeuralODE(f, 1.0, 0.0, adjoint=adjoint, **TIGHT)(x))
    true = derivatives(field, x, lambda f, x: runge_kutta(f, x, 1.0, 0.0, 100)[-1])
    assert_same(found, true, 1e-7)
    assert relative(back(there(x)), x) < 1e-7


@pytest.mark.parametrize("adjoint", [True, False])
def test_row_36_times_against_finite_differences(adjoint):
    field, x = make("Linear")
    block = NeuralODE(field, adjoint=adjoint, **TIGHT)
    weights = torch.randn(4, *x.shape)

    def loss(t):
        return (block(x, t) * weights).sum()

    t = torch.tensor([0.1, 0.3, 0.7, 1.2], requires_grad=True)
    (found,) = torch.autograd.grad(loss(t), t)
    for i in range(4):
        h = torch.zeros(4)
        h[i] = 1e-4
        with torch.no_grad():
            slope = (loss(t + h) - loss(t - h)) / 2e-4
        assert float(found[i]) == pytest.approx(float(slope), rel=1e-4, abs=1e-5)


def test_row_36_t0_and_t1_of_the_block():
    """The buffers themselves, once they require a gradient; dL/dt1 = a^T F, dL/dt0 = -a^T F."""
    field, x = make("Linear")
    block = NeuralODE(field, 0.0, 1.0, **TIGHT).double()
    block.t0.requires_grad_()
    block.t1.requires_grad_()
    x.requires_grad_()
    out = block(x)
    out.square().sum().backward()
    with torch.no_grad():
        at_end = (2 * out * field(block.t1, out)).sum()
        at_start = -(x.grad * field(block.t0, x)).sum()
    assert float(block.t1.grad) == pytest.approx(float(at_end), rel=1e-9)
    assert float(block.t0.grad) == pytest.approx(float(at_start), rel=1e-7)


class Coupled(nn.Module):
    """A state of two tensors with different shapes, one of which turns the other."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 3)
        self.two = nn.Linear(3, 2)

    def forward(self, t, state):
        x, y = state
        speed = torch.tanh(self.one(torch.cat([x, y.sum((1, 2))[:, None]], 1)))
        return speed * torch.cos(t), torch.sin(y) * self.two(x)[:, :, None]


@pytest.mark.parametrize("adjoint", [True, False])
def test_row_36_tuple_states(adjoint):
    field = Coupled()
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 2, 4, requires_grad=True)

    def derive(solve):
        field.zero_grad()
        u, v = solve((x, y))
        found = torch.autograd.grad(u.square().sum() + v.sin().sum(), [x, y, *field.parameters()])
        return {str(i): g for i, g in enumerate(found)}

    found = derive(NeuralODE(field, adjoint=adjoint, **TIGHT))
    assert_same(found, derive(lambda s: runge_kutta(field, s, 0.0, 1.0, 100)[-1]), 1e-7)


@pytest.mark.parametrize("adjoint", [True, False])
def test_row_36_a_part_of_the_state_that_the_loss_ignores(adjoint):
    field = Coupled()
    state = torch.randn(5, 3, requires_grad=True), torch.randn(5, 2, 4, requires_grad=True)
    out, _ = NeuralODE(field, adjoint=adjoint, **TIGHT)(state)
    found = torch.autograd.grad(out.square().sum(), state)
    brute = runge_kutta(field, state, 0.0, 1.0, 100)[-1][0]
    for f, e in zip(found, torch.autograd.grad(brute.square().sum(), state), strict=True):
        assert relative(f, e) < 1e-7


@pytest.mark.parametrize("adjoint", [True, False])
def test_row_36_times_of_every_sample(adjoint):
    """Each as if it were solved alone: apart, backward, and standing still."""
    field, x = make("Linear")
    times = torch.tensor(
        [
            [0.0, 0.1, 0.5, 1.0, 0.2, 0.3],
            [0.4, 0.9, 0.5, 0.0, 0.2, 1.3],
            [1.0, 1.0, 0.5, -0.5, 0.9, 1.4],
        ]
    )
    options = {"adjoint": adjoint, **TIGHT}

    def alone(f, x):
        rows = []
        for n in range(len(x)):
            states = [x[n : n + 1]]
            for a, b in zip(times[:, n], times[1:, n], strict=False):
                still = bool(a == b)
                states.append(
                    states[-1]
                    if still
                    else NeuralODE(f, adjoint=adjoint, **TIGHT)(states[-1], torch.stack([a, b]))[-1]
                )
            rows.append(torch.cat(states))
        return torch.stack(rows, 1)

    found = derivatives(field, x, lambda f, x: NeuralODE(f, **options)(x, times))
    assert_same(found, derivatives(field, x, alone), 1e-7)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    t0=st.floats(-1, 1),
    span=st.floats(0.05, 1.5),
    down=st.booleans(),
    width=st.integers(1, 4),
)
def test_row_36_any_small_field(seed, t0, span, down, width):
    torch.manual_seed(seed)
    field, x = timed(width, 3), torch.randn(2, width)
    ends = (t0, t0 - span if down else t0 + span)
    t = torch.tensor(ends)
    found = derivatives(field, x, lambda f, x: NeuralODE(f, **TIGHT)(x, t)[-1])
    assert_same(found, derivatives(field, x, lambda f, x: runge_kutta(f, x, *ends, 40)[-1]), 1e-6)


def test_row_36_seminorm():
    """The parameters' gradient left out of the error: as right, at fewer evaluations."""
    field, _ = make("Linear", scale=2.0)
    x = torch.randn(60, 3)  # whose gradients add up in the parameters
    true = derivatives(field, x, lambda f, x: runge_kutta(f, x, 0.0, 1.0, 60)[-1])
    counts = {}
    for seminorm in (True, False):
        block = None

        def solve(f, x, seminorm=seminorm):
            nonlocal block
            block = NeuralODE(f, rtol=1e-6, atol=1e-6, seminorm=seminorm)
            return block(x)

        assert_same(derivatives(field, x, solve), true, 1e-4)
        counts[seminorm] = block.evaluations.backward
    assert counts[True] < counts[False]


# what takes part


def test_row_36_an_input_that_needs_no_gradient():
    field, x = make("Linear")
    NeuralODE(field, **TIGHT)(x).square().sum().backward()
    found = gradients(field)
    field.zero_grad()
    runge_kutta(field, x, 0.0, 1.0, 100)[-1].square().sum().backward()
    assert_same(found, gradients(field), 1e-7)
    assert x.grad is None


def test_row_36_frozen_and_unused_parameters():
    """A frozen one has no gradient; one that the field does not use has none or zero."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = timed(), nn.Linear(3, 3)

        def forward(self, t, x):
            return self.used(t, x)

    torch.manual_seed(0)
    field, x = Field(), torch.randn(4, 3)
    frozen = field.used.layers[0].linear.weight.requires_grad_(False)
    NeuralODE(field, **TIGHT)(x).square().sum().backward()
    assert frozen.grad is None
    assert all(p.grad is None or not p.grad.any() for p in field.unused.parameters())
    found = gradients(field.used)
    field.zero_grad(set_to_none=True)
    runge_kutta(field, x, 0.0, 1.0, 100)[-1].square().sum().backward()
    assert_same(found, gradients(field.used), 1e-7)


def test_row_36_a_field_without_parameters():
    class Decay(nn.Module):
        def forward(self, t, x):
            return -x

    x = torch.randn(3, 2, requires_grad=True)
    NeuralODE(Decay(), **TIGHT)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, -1.0).exp(), rtol=1e-8, atol=0)
