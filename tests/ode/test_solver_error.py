"""What solvers cost in the accuracy of the adjoint's first and second derivatives, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from ocnopt.ode.low_rank_adjoint import (
    adjoint_errors,
    gradient_column,
    second_order_low_rank,
)


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, t, x):
        time = torch.full_like(x[:, :1], float(t))
        h = torch.tanh(2 * self.first(torch.cat([x, time], 1)))
        return 2 * torch.cos(4 * t) * self.last(h)


def costs(x):
    return x.pow(4).sum(1) / 4


def brute_force(func, x0, columns):
    """p_i of every sample (B, R, n) = y_i^T dx1/du, by 400 classical Runge-Kutta steps."""
    names = [k for k, _ in func.named_parameters()]
    shapes = [p.shape for p in func.parameters()]
    u = torch.cat([p.detach().reshape(-1) for p in func.parameters()])

    def end(u):
        pieces = [
            p.reshape(s) for p, s in zip(u.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        named = dict(zip(names, pieces, strict=True))

        def f(t, x):
            return functional_call(func, named, (t, x))

        h, x = 1 / 400, x0
        for t in torch.arange(400) * h:
            a = f(t, x)
            b = f(t + h / 2, x + h / 2 * a)
            c = f(t + h / 2, x + h / 2 * b)
            d = f(t + h, x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x

    return torch.einsum("brm,bmn->brn", columns(end(u)), jacrev(end)(u))


def two_columns(x1):
    """Of rank two: the gradient, and a direction that does not depend on the state."""
    y = vmap(grad(lambda x: costs(x[None]).sum()))(x1)
    return torch.stack([y, torch.tensor([1.0, -0.5]).expand_as(x1)], 1)


@pytest.mark.parametrize("method", ["dopri8", "dopri5", "bosh3", "adaptive_heun"])
def test_row_47_errors_fall_with_tolerances(method):
    tolerances = (1e-2, 1e-4, 1e-5) if method == "adaptive_heun" else (1e-3, 1e-5, 1e-7)
    solvers = {str(x): {"method": method, "rtol": x, "atol": x} for x in tolerances}
    found = adjoint_errors(Field(), torch.randn(3, 2), gradient_column(costs), solvers)
    assert list(found) == list(solvers)
    loose, middle, tight = found.values()
    for order in ("first", "second"):
        a, b, c = (getattr(row, order) for row in (loose, middle, tight))
        assert a > 3 * b > 9 * c
        # The tolerance is what is had: the error does not stay behind it.
        assert 0 < c < 100 * tolerances[-1]


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_row_47_errors_fall_with_steps(method, order):
    """By 2^order when steps are halved."""
    solvers = {n: {"method": method, "options": {"step_size": 1 / n}} for n in (32, 64, 128)}
    found = adjoint_errors(Field(), torch.randn(3, 2), gradient_column(costs), solvers)
    for errors in ([e.first for e in found.values()], [e.second for e in found.values()]):
        for coarse, fine in pairwise(errors):
            assert 0.7 * 2**order < coarse / fine < 1.4 * 2**order


def test_row_47_errors_are_distances_to_the_true_derivatives():
    """From matrices, and from a solver that shares nothing with the package's."""
    func, x0 = Field(), torch.randn(3, 2)
    true = brute_force(func, x0, two_columns)
    matrices = true.mT @ true
    solvers = {
        "coarse": {"method": "rk4", "options": {"step_size": 0.25}},
        "adaptive": {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3, "checkpoints": 2},
    }
    found = adjoint_errors(func, x0, two_columns, solvers)
    for name, solver in solvers.items():
        low = second_order_low_rank(func, x0, two_columns, **{"checkpoints": 0, **solver})
        first = (low.p - true).norm() / true.norm()
        second = (low.Q_uu - matrices).norm() / matrices.norm()
        assert found[name].first > 1e-5
        assert found[name].first == pytest.approx(float(first), rel=1e-4)
        assert found[name].second == pytest.approx(float(second), rel=1e-4)


def test_small_errors_are_not_lost_to_rounding():
    """|Q_uu - Q_uu*| from squares of R x R products would end at the root of the precision."""
    solver = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10}
    x0, column = torch.randn(3, 2), gradient_column(costs)
    found = adjoint_errors(Field(), x0, column, {"tight": solver})["tight"]
    assert 0 < found.first < 1e-10
    assert 0.5 * found.first < found.second < 4 * found.first


def test_reference_can_be_another():
    """A solver has no error against itself."""
    solver = {"method": "rk4", "options": {"step_size": 0.5}, "checkpoints": 0}
    x0, column = torch.randn(3, 2), gradient_column(costs)
    found = adjoint_errors(Field(), x0, column, {"itself": solver}, reference=solver)
    assert found["itself"].first == found["itself"].second == 0
