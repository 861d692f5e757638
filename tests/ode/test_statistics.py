"""Points of the adjoint: where they lie, what they weigh, and that gradients do not notice."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ode.blocks import (
    FIELDS,
    TIGHT,
    gathered,
    gradients,
    make,
    reference,
    relative,
    runge_kutta,
    timed,
)
from torch import nn

from ocnopt.control.players import find_solved
from ocnopt.ode import NeuralODE

FIXED = {"method": "rk4", "options": {"step_size": 0.05}}
SOLVERS = {
    "dopri5": {"rtol": 1e-5, "atol": 1e-5},
    "dopri8": {"method": "dopri8", "rtol": 1e-3, "atol": 1e-3},
    "seminorm": {"rtol": 1e-5, "atol": 1e-5, "seminorm": True},
    "rk4": FIXED,
    "midpoint in one step": {"method": "midpoint"},
    "unrolled dopri5": {"rtol": 1e-5, "atol": 1e-5, "adjoint": False},
    "unrolled rk4": {**FIXED, "adjoint": False},
}


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


class Points:
    """Keeps every point of the adjoint."""

    def __init__(self, step):
        self.sample_step = step
        self.arrivals, self.points = [], []

    def arrived(self, task, field, end, x, gradient):
        self.arrivals.append((float(end), x, gradient))

    def sample(self, field, t, x, a, duration):
        self.points.append((t, x, a, duration))

    @property
    def times(self):
        return [float(t) for t, *_ in self.points]

    @property
    def durations(self):
        return [duration for *_, duration in self.points]


# row 39: the grid


@settings(max_examples=25, deadline=None)
@given(
    t0=st.floats(-2, 2),
    span=st.floats(0.01, 2),
    down=st.booleans(),
    step=st.floats(0.01, 3),
    method=st.sampled_from(["euler", "bosh3"]),
)
def test_row_39_number_and_weight_of_points(t0, span, down, step, method):
    """N = (t1 - t0) / D rounded and at least one, evenly spaced, without t1, the last one at t0."""
    t1 = t0 - span if down else t0 + span
    seen = Points(step)
    block = NeuralODE(timed(2, 2), method=method)
    block.follow(seen)
    x = torch.zeros(1, 2, requires_grad=True)
    block(x, torch.tensor([t0, t1]))[-1].sum().backward()
    count = max(1, round(abs(t1 - t0) / step))
    assert len(seen.points) == count
    expected = [t1 + (t0 - t1) * j / count for j in range(1, count + 1)]
    assert seen.times == pytest.approx(expected, abs=1e-12)
    assert seen.times[-1] == t0
    assert seen.durations == pytest.approx([span / count] * count)
    assert sum(seen.durations) == pytest.approx(span)


@pytest.mark.parametrize("solver", SOLVERS)
def test_row_39_weights_sum_to_the_time(solver):
    field, x = make("Linear")
    block, seen = NeuralODE(field, 0.5, 2.0, **SOLVERS[solver]), Points(0.1)
    block.follow(seen)
    block(x).sum().backward()
    assert sum(seen.durations) == pytest.approx(1.5)
    assert seen.times[-1] == pytest.approx(0.5)
    if SOLVERS[solver].get("adjoint", True):
        assert len(seen.points) == 15


def test_row_39_several_times():
    """Every interval has its own points; one that is shorter than D has one."""
    field, x = make("Linear")
    block, seen = NeuralODE(field, **TIGHT), Points(0.1)
    block.follow(seen)
    block(x, torch.tensor([0.0, 0.5, 0.53, 1.33])).sum().backward()
    late = [1.33 - 0.1 * j for j in range(1, 9)]
    early = [0.5 - 0.1 * j for j in range(1, 6)]
    assert seen.times == pytest.approx([*late, 0.5, *early])
    assert seen.durations == pytest.approx([0.1] * 8 + [0.03] + [0.1] * 5)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_row_39_gradients_are_the_same_bit_for_bit(solver, name):
    """The defect that this is about made them a hundredth on such iterations."""
    field, x = make(name)
    found = []
    for follow in (False, True):
        block = NeuralODE(copy.deepcopy(field), 0.0, 1.0, **SOLVERS[solver])
        start = x.clone().requires_grad_()
        if follow:
            statistics = gathered(block, 0.03)
        block(start).sin().sum().backward()
        found.append({"x0": start.grad, **gradients(block)})
    assert all(m.points >= 2 for m in statistics.moments.values())
    assert len(statistics.moments) == len(find_solved(block)) >= 2
    plain, watched = found
    for key, value in plain.items():
        assert torch.equal(value, watched[key]), key


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_row_39_gradients_of_times_and_tuples_too(solver):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = timed()

        def forward(self, t, state):
            f = self.inner(t, state[0])
            return f, f.sum(1) * t

    torch.manual_seed(0)
    field = Pair()
    x, y, t = torch.randn(4, 3), torch.zeros(4), torch.tensor([0.0, 0.4, 1.0])
    found = []
    for follow in (False, True):
        block = NeuralODE(copy.deepcopy(field), **SOLVERS[solver])
        inputs = [v.clone().requires_grad_() for v in (x, y, t)]
        if follow:
            statistics = gathered(block, 0.03)
        u, v = block(tuple(inputs[:2]), inputs[2])
        (u.square().sum() + v.sin().sum()).backward()
        found.append([*(v.grad for v in inputs), *gradients(block).values()])
    assert len(statistics.moments) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        # Between steps of at most 0.04 a cubic is within 1e-7.
        ({"rtol": 1e-9, "atol": 1e-9, "options": {"max_step": 0.04}}, 1e-6),
        ({"method": "rk4", "options": {"step_size": 0.03}}, 1e-5),
        ({"method": "rk4", "options": {"step_size": 0.05}}, 1e-5),
        # Steps of its own choosing: the cubic's error is of the solver's order of magnitude.
        ({"rtol": 1e-3, "atol": 1e-3}, 5e-2),
    ],
    ids=["tight", "between nodes", "on nodes", "loose"],
)
def test_row_39_points_lie_on_the_adjoint(name, solver, tolerance):
    field, x = make(name)

    def cost(out):
        return out.sin().sum()

    block, seen = NeuralODE(field, **solver), Points(0.05)
    block.follow(seen)
    cost(block(x)).backward()
    states, adjoints = reference(field, x, cost, 0.0, 1.0, 100)
    assert len(seen.points) == 20
    for j, (t, (found,), (a,), _) in enumerate(seen.points, 1):
        k = 100 - 5 * j
        assert float(t) == pytest.approx(k / 100)
        assert relative(found, states[k]) < tolerance
        assert relative(a, adjoints[k]) < tolerance
    ((end, (last,), (gradient,)),) = seen.arrivals
    assert end == 1.0
    assert relative(last, states[-1]) < tolerance
    assert relative(gradient, adjoints[-1]) < tolerance


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4"])
def test_unrolled_points_lie_on_the_adjoint(method):
    """The solver's own steps, with the gradient that back-propagation brings there."""
    field, x = make("Linear")
    options = {"step_size": 1 / 20} if method == "rk4" else {}
    block = NeuralODE(field, method=method, adjoint=False, options=options, rtol=1e-6, atol=1e-6)
    seen = Points(0.5)
    block.follow(seen)
    block(x).sin().sum().backward()
    assert len(seen.points) >= 3
    for t, (found,), (a,), _ in seen.points[:: max(1, len(seen.points) // 5)]:
        time = float(t)
        expected = runge_kutta(field, x, 0.0, time, 40)[-1] if time else x
        assert relative(found, expected) < 1e-5
        if time < 1:
            _, (adjoint, *_) = reference(field, found, lambda o: o.sin().sum(), time, 1.0, 40)
            assert relative(a, adjoint) < 1e-5


# row 42


def test_row_42_chained_solves_add_up():
    """k solves of one block: k * N points, and the sums of what each would have had alone."""
    field, x = make("Linear")
    k, points = 5, 10
    shared = NeuralODE(field, **TIGHT)
    apart = nn.ModuleList(NeuralODE(copy.deepcopy(field), **TIGHT) for _ in range(k))
    one, each = gathered(shared, 0.1), [gathered(block, 0.1) for block in apart]

    def run(blocks):
        state = x
        for i, block in enumerate(blocks):
            state = block(state) + 0.1 * i
        state.sin().sum().backward()

    run([shared] * k)
    run(apart)
    assert one.samples == 6
    for i, player in enumerate(one.players):
        total = one.moments[player]
        parts = [found.moments[found.players[i]] for found in each]
        assert total.points == k * points == sum(part.points for part in parts)
        assert total.weight == pytest.approx(sum(part.weight for part in parts))
        assert relative(total.inputs, sum(part.inputs for part in parts)) < 1e-12
        assert relative(total.signals, sum(part.signals for part in parts)) < 1e-12


def test_row_42_a_field_of_two_blocks():
    """Two blocks that share a field, over different times, are two solves of it."""
    field, x = make("Linear")
    model = nn.Sequential(NeuralODE(field, **TIGHT), NeuralODE(field, 1.0, 3.0, **TIGHT))
    statistics = gathered(model, 0.1)
    model(x).sum().backward()
    assert len(statistics.players) == 2
    for player in statistics.players:
        assert statistics.moments[player].points == 30
        assert statistics.moments[player].weight == pytest.approx(3 * 6)


def test_row_42_a_layer_called_twice():
    """Both calls count, each at every point."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, t, x):
            return self.layer(torch.tanh(self.layer(x)))

    block = NeuralODE(Twice(), **TIGHT)
    statistics = gathered(block, 0.1)
    x = torch.randn(6, 3)
    block(x).sum().backward()
    (player,) = statistics.players
    assert statistics.moments[player].points == 10
    assert statistics.moments[player].weight == pytest.approx(2 * 6)
