"""The second-order adjoint against Jacobians of a fine Runge-Kutta solve, in float64."""

from __future__ import annotations

import doctest

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

from ocnopt.errors import OptionError, SolverError
from ocnopt.experiments.peak_memory import PeakMemory
from ocnopt.ode import dense_adjoint as dense
from ocnopt.ode.dense_adjoint import SecondOrder, second_order
from ocnopt.ode.low_rank_adjoint import (
    gradient_column,
    hessian_columns,
    second_order_low_rank,
)

TIGHT = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10, "checkpoints": 1}


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


class Mlp(nn.Module):
    """Time beside the state, and in front; a frozen parameter between trained ones."""

    def __init__(self, width=3, hidden=4, activation=torch.tanh):
        super().__init__()
        self.first = nn.Linear(width + 1, hidden)
        self.gain = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.last = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, t, x):
        z = torch.cat([x, t.expand(*x.shape[:-1], 1)], -1)
        return self.gain * (1 + torch.sin(3 * t)) * self.last(self.activation(self.first(z)))


class Conv(nn.Module):
    """Time as a channel of two convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.last = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, t, x):
        time = torch.ones_like(x[:, :1]) * t
        x = F.softplus(self.first(torch.cat([time, x], 1)))
        return self.last(torch.cat([time, x], 1))


class Affine(nn.Module):
    """No second derivatives in state and controls; both enter with coefficients in time."""

    def __init__(self, states=3, controls=2):
        super().__init__()
        self.u = nn.Parameter(torch.randn(controls))
        self.register_buffer("A", 0.6 * torch.randn(states, states))
        self.register_buffer("B", torch.randn(states, controls))

    def forward(self, t, x):
        return torch.cos(t) * self.A @ x + (1 + t * t) * self.B @ self.u


class Stiff(nn.Module):
    """A fast state that follows a slow one: its past cannot be told from where it is."""

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.tensor([30.0, 0.8]))

    def forward(self, t, x):
        fast, slow = x
        return torch.stack([self.u[0] * (torch.sin(slow + t) - fast), self.u[1] * fast**2])


def cost(x):
    """Neither quadratic nor separable over the state."""
    x = x.reshape(-1)
    return x.pow(4).sum() / 4 + torch.logsumexp(x, 0) + (x[:1] * x[-1:]).sum()


def running(t, x, u):
    """Every second derivative of it is there and depends on time."""
    x = x.reshape(-1)
    everything = torch.cat([p.reshape(-1) for p in u.values()])
    mixed = torch.tanh(everything).sum() * x.sin().sum()
    return (1 + t) * (x.pow(4).sum() + 0.1 * mixed) + 0.1 * everything.pow(4).sum()


class Oracle:
    """Trajectories as functions of (x0, u), by the classical Runge-Kutta method."""

    def __init__(self, func, x0, t0=0.0, t1=1.0, steps=100):
        self.func, self.shape = func, x0.shape
        self.x0 = x0.reshape(-1)
        trained = {k: p for k, p in func.named_parameters() if p.requires_grad}
        self.shapes = {k: p.shape for k, p in trained.items()}
        self.u = torch.cat([p.detach().reshape(-1) for p in trained.values()])
        self.times = torch.linspace(t0, t1, steps + 1)
        self.h = (t1 - t0) / steps

    def named(self, u):
        pieces = u.split([s.numel() for s in self.shapes.values()])
        return {k: p.reshape(s) for (k, s), p in zip(self.shapes.items(), pieces, strict=True)}

    def trajectory(self, x, u):
        """(steps + 1, m)."""

        def f(t, x):
            return functional_call(self.func, self.named(u), (t, x.reshape(self.shape))).reshape(-1)

        found, h = [x], self.h
        for t in self.times[:-1]:
            a = f(t, x)
            b = f(t + h / 2, x + h / 2 * a)
            c = f(t + h / 2, x + h / 2 * b)
            d = f(t + h, x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
            found.append(x)
        return torch.stack(found)

    def end(self, x, u):
        return self.trajectory(x, u)[-1]

    def integral(self, values):
        """Simpson's rule, along the first dimension."""
        weights = torch.full_like(self.times, 2.0)
        weights[1::2] = 4.0
        weights[0] = weights[-1] = 1.0
        return self.h / 3 * torch.tensordot(weights, values, 1)

    def total(self, x, u, terminal, running):
        """Phi + int l dt."""
        states = self.trajectory(x, u)
        named = self.named(u)
        rates = vmap(lambda t, x: running(t, x, named))(self.times, states)
        return terminal(states[-1]) + self.integral(rates)


def assert_close(found, expected, tolerance=1e-8):
    """Relative to the largest entry."""
    size = float(expected.abs().max())
    assert size > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


FIELDS = {
    "linear layers": lambda: (Mlp(), torch.randn(2, 3)),
    "convolutions": lambda: (Conv(), torch.randn(2, 1, 3, 3)),
    "one vector": lambda: (Affine(), torch.randn(3)),
}


# --- dense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.7, -0.2)], ids=["forward", "backward in time"])
@pytest.mark.parametrize("name", FIELDS)
def test_row_37_second_order_adjoint_is_gauss_newton(name, span):
    func, x0 = FIELDS[name]()
    t0, t1 = span
    oracle = Oracle(func, x0, t0, t1)
    J_x0, J = jacrev(oracle.end, argnums=(0, 1))(oracle.x0, oracle.u)
    x1 = oracle.end(oracle.x0, oracle.u)
    Phi_x, Phi_xx = grad(cost)(x1), hessian(cost)(x1)

    found = second_order(func, x0, cost, t0=t0, t1=t1, **TIGHT)

    assert_close(found.x1, x1.reshape(x0.shape))
    assert_close(found.Q_x, J_x0.T @ Phi_x)
    assert_close(found.Q_u, J.T @ Phi_x)
    assert_close(found.Q_xx, J_x0.T @ Phi_xx @ J_x0)
    assert_close(found.Q_xu, J_x0.T @ Phi_xx @ J)
    assert_close(found.Q_uu, J.T @ Phi_xx @ J)
    assert torch.equal(found.Q_xx, found.Q_xx.T)
    assert torch.equal(found.Q_uu, found.Q_uu.T)
    assert found.drift < 1e-8


def test_row_37_first_derivatives_are_back_propagation():
    """In the order of named_parameters(), the frozen one left out."""
    func, x0 = Mlp(), torch.randn(2, 3, requires_grad=True)
    params = [p for p in func.parameters() if p.requires_grad]
    h, x = 1 / 400, x0
    for t in torch.arange(400) * h:  # Heun's third-order method: another one than the oracle's
        a = func(t, x)
        b = func(t + h / 3, x + h / 3 * a)
        c = func(t + 2 * h / 3, x + 2 * h / 3 * b)
        x = x + h / 4 * (a + 3 * c)
    gradients = torch.autograd.grad(cost(x), [x0, *params])

    found = second_order(func, x0, cost, **TIGHT)

    assert_close(found.Q_x, gradients[0].reshape(-1), 1e-7)
    assert_close(found.Q_u, torch.cat([g.reshape(-1) for g in gradients[1:]]), 1e-7)


def test_row_37_running_cost():
    """Gradients of Phi + int l dt, and its Gauss-Newton matrices along the trajectory."""
    func, x0 = Mlp(2, 3), torch.randn(1, 2)
    oracle = Oracle(func, x0, steps=60)
    m = x0.numel()
    whole = grad(oracle.total, argnums=(0, 1))(oracle.x0, oracle.u, cost, running)
    states = oracle.trajectory(oracle.x0, oracle.u)
    # z(t) = (x(t), u) as a function of (x0, u).
    X, S = jacfwd(oracle.trajectory, argnums=(0, 1))(oracle.x0, oracle.u)
    n = S.shape[2]
    lower = torch.cat([torch.zeros(n, m), torch.eye(n)], 1).expand(len(S), n, m + n)
    Z = torch.cat([torch.cat([X, S], 2), lower], 1)

    def l_zz(t, x):
        return hessian(lambda z: running(t, z[:m], oracle.named(z[m:])))(torch.cat([x, oracle.u]))

    end = Z[-1, :m]
    Q = end.T @ hessian(cost)(states[-1]) @ end + oracle.integral(
        Z.mT @ vmap(l_zz)(oracle.times, states) @ Z
    )

    found = second_order(func, x0, cost, running=running, **TIGHT)

    assert_close(found.Q_x, whole[0], 1e-7)
    assert_close(found.Q_u, whole[1], 1e-7)
    assert_close(found.Q_xx, Q[:m, :m], 1e-7)
    assert_close(found.Q_xu, Q[:m, m:], 1e-7)
    assert_close(found.Q_uu, Q[m:, m:], 1e-7)
    assert torch.equal(found.Q_uu, found.Q_uu.T)


def test_row_37_linear_quadratic_problem_has_its_true_hessian():
    """F is affine in (x, u): leaving out its second derivatives leaves out nothing.

    Time runs backward here, and the running cost is counted accordingly.
    """
    func, x0 = Affine(), torch.randn(3)
    t0, t1 = 0.7, -0.2
    oracle = Oracle(func, x0, t0, t1)

    def total(z):
        return oracle.total(z[:3], z[3:], cost, running)

    exact = hessian(total)(torch.cat([x0, oracle.u]))

    found = second_order(func, x0, cost, t0=t0, t1=t1, running=running, **TIGHT)

    assert_close(found.Q_xx, exact[:3, :3], 1e-7)
    assert_close(found.Q_xu, exact[:3, 3:], 1e-7)
    assert_close(found.Q_uu, exact[3:, 3:], 1e-7)


def test_nonlinear_field_has_not_its_true_hessian():
    """The matrices are Gauss-Newton's where the field bends: not a Hessian in disguise."""
    func, x0 = Mlp(2, 3), torch.randn(1, 2)
    oracle = Oracle(func, x0, steps=20)
    exact = hessian(lambda u: cost(oracle.end(oracle.x0, u)))(oracle.u)
    found = second_order(func, x0, cost, **TIGHT)
    assert float((found.Q_uu - exact).abs().max()) > 1e-2 * float(exact.abs().max())


SOLVERS = {
    "dopri5": {"rtol": 1e-8, "atol": 1e-8},
    "bosh3": {"rtol": 1e-7, "atol": 1e-7},
    "rk4": {"options": {"step_size": 0.05}},
}


@pytest.mark.parametrize("method", SOLVERS)
def test_row_37_solvers_agree(method):
    func, x0 = Mlp(2, 2), torch.randn(1, 2)
    oracle = Oracle(func, x0)
    J = jacrev(oracle.end, argnums=1)(oracle.x0, oracle.u)
    Phi_xx = hessian(cost)(oracle.end(oracle.x0, oracle.u))
    found = second_order(func, x0, cost, method=method, **SOLVERS[method])
    assert_close(found.Q_uu, J.T @ Phi_xx @ J, 1e-6)


def test_contracting_field_needs_checkpoints():
    """A state that was contracted by exp(15) cannot be followed back; drift tells."""
    func, x0 = Stiff(), torch.tensor([1.0, -0.5])
    solver = {"t1": 0.5, "rtol": 1e-7, "atol": 1e-7}
    oracle = Oracle(func, x0, t1=0.5, steps=200)
    J = jacrev(oracle.end, argnums=1)(oracle.x0, oracle.u)
    expected = J.T @ hessian(cost)(oracle.end(oracle.x0, oracle.u)) @ J
    size = float(expected.abs().max())
    without = second_order(func, x0, cost, checkpoints=0, **solver)
    found = second_order(func, x0, cost, **solver)
    assert_close(found.Q_uu, expected, 1e-5)
    assert found.drift < 1e-5
    assert float((without.Q_uu - expected).abs().max()) > 1e-2 * size
    assert without.drift > 1e-2


# --- low rank --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear layers", "convolutions"])
def test_row_38_columns_make_the_dense_matrices(name):
    """One state of all samples; any rank."""
    func, x0 = FIELDS[name]()
    y = torch.randn(4, *x0.shape)
    factor = y.flatten(1)
    matrices = second_order(
        func, x0, lambda x: (factor @ x.reshape(-1)).square().sum() / 2, **TIGHT
    )
    found = second_order_low_rank(func, x0, y, per_sample=False, **TIGHT)
    assert found.q.shape == (4, x0.numel())
    assert_close(found.Q_xx, matrices.Q_xx)
    assert_close(found.Q_xu, matrices.Q_xu)
    assert_close(found.Q_uu, matrices.Q_uu)


@pytest.mark.parametrize("with_head", [True, False])
def test_row_38_factor_of_cross_entropy_behind_a_head(with_head):
    """Factors per sample; the batch's matrices are the samples', side by side or summed."""
    func, x0, target = Mlp(), torch.randn(2, 3), torch.tensor([2, 0])
    head = nn.Linear(3, 5) if with_head else nn.Identity()
    criterion = nn.CrossEntropyLoss()

    def terminal(x):  # the sum of the samples' own costs: twice their mean
        return 2 * criterion(head(x), target)

    matrices = second_order(func, x0, terminal, **TIGHT)
    columns = hessian_columns(criterion, target, head if with_head else None)
    found = second_order_low_rank(func, x0, columns, **TIGHT)

    rank = 5 if with_head else 3
    assert found.q.shape == (2, rank, 3)
    assert found.p.shape == (2, rank, matrices.Q_u.numel())
    assert_close(found.x1, matrices.x1)
    assert_close(torch.block_diag(*found.Q_xx), matrices.Q_xx)
    assert_close(found.Q_xu.reshape(6, -1), matrices.Q_xu)
    assert_close(found.Q_uu.sum(0), matrices.Q_uu)


@pytest.mark.parametrize("name", ["linear layers", "convolutions"])
def test_row_38_gradient_column_gives_gradients(name):
    """p is every sample's gradient, q the adjoint, and Q_uu = g g^T."""
    func, x0 = FIELDS[name]()

    def costs(x):
        return torch.stack([cost(row) for row in x])

    def values(x, u):
        return costs(oracle.end(x, u).reshape(x0.shape))

    oracle = Oracle(func, x0)
    in_x, g = jacrev(values, argnums=(0, 1))(oracle.x0, oracle.u)
    found = second_order_low_rank(func, x0, gradient_column(costs), **TIGHT)
    assert_close(found.p, g.unsqueeze(1))
    assert_close(found.q.reshape(2, -1), torch.stack([in_x[i].view(2, -1)[i] for i in range(2)]))
    assert_close(found.Q_uu, g[:, :, None] * g[:, None, :])

    together = gradient_column(lambda x: costs(x).mean(), per_sample=False)
    found = second_order_low_rank(func, x0, together, per_sample=False, **TIGHT)
    assert_close(found.p, g.mean(0, keepdim=True))


ACTIVATIONS = {"tanh": torch.tanh, "softplus": F.softplus, "sin": torch.sin}


@given(
    width=st.integers(1, 3),
    hidden=st.integers(1, 3),
    batch=st.integers(1, 3),
    rank=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    t1=st.sampled_from((1.0, -0.5)),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_row_38_random_fields(width, hidden, batch, rank, activation, t1, seed):
    """Symmetric, positive semidefinite as one matrix, and what the columns make."""
    torch.manual_seed(seed)
    func, x0 = Mlp(width, hidden, ACTIVATIONS[activation]), torch.randn(batch, width)
    y = torch.randn(batch, rank, width)
    solver = {"t1": t1, "method": "dopri8", "rtol": 1e-7, "atol": 1e-7, "checkpoints": 0}

    def terminal(x):
        return torch.einsum("brm,bm->br", y, x).square().sum() / 2

    found = second_order(func, x0, terminal, **solver)
    assert torch.equal(found.Q_xx, found.Q_xx.T)
    assert torch.equal(found.Q_uu, found.Q_uu.T)
    whole = torch.cat(
        [torch.cat([found.Q_xx, found.Q_xu], 1), torch.cat([found.Q_xu.T, found.Q_uu], 1)]
    )
    spectrum = torch.linalg.eigvalsh(whole)
    size = float(spectrum[-1])
    assert float(spectrum[0]) > -1e-7 * size
    low = second_order_low_rank(func, x0, y, **solver)
    m = x0.numel()
    made = [torch.block_diag(*low.Q_xx), low.Q_xu.reshape(m, -1), low.Q_uu.sum(0)]
    for expected, product in zip((found.Q_xx, found.Q_xu, found.Q_uu), made, strict=True):
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-7 * size)


# --- memory and side effects -----------------------------------------------------------------


def peak(work):
    with PeakMemory() as memory:
        work()
    return memory.peak


def test_memory_does_not_grow_with_steps():
    """At three times the steps; back-propagation through them shows that the measure sees it."""
    func, x0 = Mlp(3, 8), torch.randn(4, 3)
    y = torch.randn(4, 2, 3)

    def rk4(steps):
        return {"method": "rk4", "options": {"step_size": 1 / steps}, "checkpoints": 1}

    def unrolled(steps):
        oracle = Oracle(func, x0, steps=steps)
        u = oracle.u.clone().requires_grad_()
        cost(oracle.end(oracle.x0, u)).backward()

    works = {
        "dense": lambda n: second_order(func, x0, cost, **rk4(n)),
        "low rank": lambda n: second_order_low_rank(func, x0, y, **rk4(n)),
        "unrolled": unrolled,
    }
    growth = {k: peak(lambda w=w: w(12)) / peak(lambda w=w: w(4)) for k, w in works.items()}
    assert growth["unrolled"] > 2
    # A little for the solver's grid of times.
    assert 0.95 < growth["dense"] < 1.02
    assert 0.95 < growth["low rank"] < 1.02


def test_field_is_left_as_it_was():
    func, x0 = Mlp(2, 2), torch.randn(2, 2, requires_grad=True)
    before = {k: v.clone() for k, v in func.state_dict().items()}
    results = [
        second_order(func, x0, cost, running=running, method="rk4"),
        second_order_low_rank(func, x0, gradient_column(cost), method="rk4"),
    ]
    for found in results:
        tensors = [v for v in vars(found).values() if isinstance(v, Tensor)]
        assert len(tensors) >= 3
        assert not any(v.requires_grad for v in tensors)
    assert x0.grad is None
    assert all(p.grad is None for p in func.parameters())
    assert [p.requires_grad for p in func.parameters()] == [False, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in func.state_dict().items())


def test_shared_and_buffered_fields():
    """One weight used twice is one control; running statistics are read and kept."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.norm = nn.BatchNorm1d(2).eval()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, t, x):
            return self.b(self.relu(self.norm(self.a(x)) + 3)) * torch.cos(t)

    func, x0 = Shared(), torch.rand(2, 2)
    func.norm.running_mean.fill_(0.3)
    y = torch.randn(2, 1, 2)
    found = second_order_low_rank(func, x0, y, t1=0.3, **TIGHT)
    oracle = Oracle(func, x0, t1=0.3)
    J = jacrev(oracle.end, argnums=1)(oracle.x0, oracle.u).reshape(2, 2, -1)
    assert J.shape[2] == 4 + 2 + 2 + 4
    assert_close(found.p, y @ J)
    assert_close(func.norm.running_mean, torch.full((2,), 0.3))


def test_single_precision():
    func, x0 = Mlp(2, 2), torch.randn(2, 2)
    exact = second_order(func, x0, cost, **TIGHT)
    loose = {"rtol": 1e-4, "atol": 1e-4}
    found = second_order(func.float(), x0.float(), cost, **loose)
    assert found.Q_uu.dtype == torch.float32
    assert_close(found.Q_uu.double(), exact.Q_uu, 1e-3)


# --- refusals --------------------------------------------------------------------------------


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.ones(1))

    def forward(self, t, x):
        return self.u * x.sum()


def dense_of(func=None, x0=None, terminal=cost, **options):
    func = Mlp(2, 2) if func is None else func
    return second_order(func, torch.ones(1, 2) if x0 is None else x0, terminal, **options)


REFUSED = {
    "no module": (lambda: dense_of(lambda t, x: x), "nn.Module"),
    "nothing to train": (lambda: dense_of(Mlp(2, 2).requires_grad_(False)), "requires_grad"),
    "integers": (lambda: dense_of(x0=torch.ones(1, 2, dtype=torch.long)), "floating point"),
    "empty state": (lambda: dense_of(x0=torch.ones(0, 2)), "empty"),
    "no time": (lambda: dense_of(t0=1.0), "nothing to integrate"),
    "endless time": (lambda: dense_of(t1=float("inf")), "finite"),
    "unknown solver": (lambda: dense_of(method="magic"), "dopri5"),
    "checkpoints": (lambda: dense_of(checkpoints=-1), "checkpoints=-1"),
    "terminal per sample": (lambda: dense_of(terminal=lambda x: x), "terminal must return one"),
    "running per state": (lambda: dense_of(running=lambda t, x, u: x), "running must return one"),
    "rate of another shape": (lambda: dense_of(Wrong()), "shaped as x"),
    "too large": (lambda: dense_of(nn.Linear(10**4, 10**4, device="meta")), "low_rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    work, words = REFUSED[case]
    with pytest.raises(OptionError, match=words):
        work()


def test_limit_is_named_and_can_be_raised():
    func, x0 = Mlp(2, 2), torch.ones(1, 2)
    n = sum(p.numel() for p in func.parameters() if p.requires_grad)
    entries = 2 + n + 4 + 2 * n + n * n
    with pytest.raises(OptionError, match=f"{entries} entries"):
        dense_of(func, x0, max_entries=entries - 1)
    assert isinstance(dense_of(func, x0, max_entries=entries), SecondOrder)
    y = torch.ones(1, 3, 2)
    with pytest.raises(OptionError, match="gradient_column"):
        second_order_low_rank(func, x0, y, max_entries=3 * (2 + n) - 1)
    second_order_low_rank(func, x0, y, max_entries=3 * (2 + n))


@pytest.mark.parametrize("per_sample", [True, False])
def test_columns_of_another_shape_are_refused(per_sample):
    for shape in [(2, 3), (2, 0, 3), (2, 1, 2), (3, 1, 3), (2, 2, 2, 3)]:
        with pytest.raises(OptionError, match="columns have the shape"):
            second_order_low_rank(Mlp(), torch.ones(2, 3), torch.ones(shape), per_sample=per_sample)


def test_fields_that_mix_samples_have_no_factors_per_sample():
    class Mixing(Mlp):
        def forward(self, t, x):
            return super().forward(t, x - x.mean(0))

    func, x0 = Mixing(), torch.randn(2, 3)
    with pytest.raises(OptionError, match="per_sample=False"):
        second_order_low_rank(func, x0, gradient_column(cost))
    found = second_order_low_rank(
        func, x0, gradient_column(cost, per_sample=False), per_sample=False, **TIGHT
    )
    oracle = Oracle(func, x0)
    expected = grad(lambda u: cost(oracle.end(oracle.x0, u)))(oracle.u)
    assert_close(found.p[0], expected)


def test_solvers_that_fail_say_so():
    class Blowing(Mlp):
        def forward(self, t, x):
            return super().forward(t, x) + x**3

    with pytest.raises(SolverError, match="the state"):
        second_order(Blowing(), 5 * torch.ones(1, 3), cost, rtol=1e-3, atol=1e-3)


def test_example_in_the_docstring():
    assert doctest.testmod(dense, extraglobs={"torch": torch}).failed == 0
