"""SNOpt's step by dense algebra: one point of time, sample, location and layer after another."""

import copy

import pytest
import torch
from ode.blocks import locations, make, relative, runge_kutta
from promises.conformance import assert_updates_close, weights
from torch import nn

import ocnopt
from ocnopt.ode import NeuralODE, TimedSequential


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


def cost(out):
    return out.sin().flatten(1).sum(1)


# row 41: the step by dense algebra


class Dense:
    """The update by plain loops: every point of time, sample, location and layer on its own."""

    def __init__(self, field, ends, sample_step, lr, damping, decay, every, momentum, shrink):
        self.field = field
        self.t0, self.t1 = ends
        self.lr, self.damping, self.decay, self.every = lr, damping, decay, every
        self.momentum, self.shrink = momentum, shrink
        self.step_size = sample_step
        self.points = round((self.t1 - self.t0) / sample_step)
        self.layers = {
            name: module
            for name, module in field.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        }
        self.kept = {}
        self.velocity = {}
        self.count = 0

    def step(self, x0, fine=6):
        samples = len(x0)
        self.field.zero_grad()
        steps = self.points * fine
        start = x0.clone().requires_grad_()
        states = runge_kutta(self.field, start, self.t0, self.t1, steps)
        total = cost(states[-1]).mean()
        adjoints = torch.autograd.grad(total, states, retain_graph=True)
        total.backward()
        if self.count % self.every == 0:
            for name, module in self.layers.items():
                self.kept[name] = self.factors(module, states, adjoints, fine, samples)
        for name, module in self.layers.items():
            self.move(name, module, samples)
        self.count += 1

    def factors(self, module, states, adjoints, fine, samples):
        groups = getattr(module, "groups", 1)
        found = []
        for group in range(groups):
            a, b, seen = 0, 0, 0
            for j in range(self.points):  # t0 is one of them, t1 is not
                t = torch.tensor(self.t0 + j * self.step_size)
                for n in range(samples):
                    z, g = self.call(module, t, states[j * fine][n], adjoints[j * fine][n])
                    for row, col in locations(module, z, samples * g):
                        row, col = part(row, group, groups, module), col.chunk(groups)[group]
                        a, b, seen = a + torch.outer(row, row), b + torch.outer(col, col), seen + 1
            a, b = a / seen, self.step_size * self.step_size * b / samples
            (e_a, u_a), (e_b, u_b) = torch.linalg.eigh(a), torch.linalg.eigh(b)
            found.append([u_a, u_b, torch.outer(e_b.clamp_min(0), e_a.clamp_min(0))])
        return found

    def call(self, module, t, x, a):
        """One sample's input of the layer and gradient at its output."""
        calls = []

        def keep(module, inputs, output):
            calls.append((inputs[0], output))
            return output.clone()  # what follows may work in place

        handle = module.register_forward_hook(keep)
        value = self.field(t, x[None].detach())
        handle.remove()
        ((z, h),) = calls
        return z.detach(), torch.autograd.grad(value, h, a[None])[0]

    def move(self, name, module, samples):
        blocks = []
        groups = getattr(module, "groups", 1)
        grads = [p.grad for p in module.parameters()]
        for group in range(groups):
            u_a, u_b, m2 = self.kept[name][group]
            g = grads[0].chunk(groups)[group].flatten(1)
            if module.bias is not None:
                g = torch.cat([g, grads[1].chunk(groups)[group][:, None]], 1)
            turned = u_b.T @ g @ u_a
            m2 = self.decay * m2 + (1 - self.decay) * samples * turned**2
            self.kept[name][group][2] = m2
            blocks.append(u_b @ (turned / (m2 + self.damping)) @ u_a.T)
        update = torch.cat(blocks)
        parts = [update]
        if module.bias is not None:
            parts = [update[:, :-1], update[:, -1]]
        for i, (p, d) in enumerate(zip(module.parameters(), parts, strict=True)):
            d = d.reshape(p.shape) + self.shrink * p.detach()
            v = d + self.momentum * self.velocity.get((name, i), torch.zeros_like(d))
            self.velocity[name, i] = v
            p.data.sub_(self.lr * v)


def part(row, group, groups, module):
    """The entries of a row of patches that belong to a group, and the one."""
    if groups == 1:
        return row
    tail = row[-1:] if module.bias is not None else row[:0]
    patches = row[: len(row) - len(tail)]
    return torch.cat([patches.chunk(groups)[group], tail])


# A cubic between steps of at most 0.04 is within 1e-8 of the adjoint.
EXACT = {"rtol": 1e-10, "atol": 1e-10, "options": {"max_step": 0.04}}
ON_NODES = {"method": "rk4", "options": {"step_size": 0.05}}


@pytest.mark.parametrize(
    ("name", "solver", "tolerance"),
    [
        ("Linear", EXACT, 1e-6),
        ("ConcatSquashLinear", EXACT, 1e-6),
        ("ConcatConv2d", ON_NODES, 1e-5),  # the solver's own error
    ],
)
def test_row_41_steps_by_dense_algebra(name, solver, tolerance):
    """Three steps, the factors of the first renewed before the third."""
    field, x = make(name)
    x = x[:4]
    block = NeuralODE(field, 0.0, 0.3, **solver)
    options = {"lr": 0.02, "damping": 0.1, "momentum": 0.5}
    dense = Dense(copy.deepcopy(field), (0.0, 0.3), 0.1, 0.02, 0.1, 0.6, 2, 0.5, 0.03)
    optimizer = ocnopt.SNOpt(
        block, update_every=2, eigen_decay=0.6, sample_step=0.1, weight_decay=0.03, **options
    )
    before = weights(field)
    for i in range(3):
        start = x + 0.1 * i
        optimizer.zero_grad()
        cost(block(start)).mean().backward()
        optimizer.step()
        dense.step(start)
        assert_updates_close(before, field, dense.field, tolerance)


@pytest.mark.parametrize("points", [1, 4])
def test_row_41_without_damping_the_step_is_b_inverse_g_a_inverse(points):
    """alpha = 1: eigenvalues of the factors alone; a linear field, one sample in time or more."""
    torch.manual_seed(0)
    field = TimedSequential(nn.Linear(3, 3))
    layer, x, lr, span = field.layers[0], torch.randn(12, 3), 0.3, 0.4
    block = NeuralODE(field, 0.0, span, method="rk4", options={"step_size": 0.02})
    optimizer = ocnopt.SNOpt(
        block, lr=lr, damping=1e-13, eigen_decay=1.0, sample_step=span / points
    )
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    cost(block(x)).mean().backward()
    gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
    # By matrix exponentials: d[x; 1]/dt = [[W, b], [0, 0]] [x; 1], da/dt = -W^T a.
    flow = torch.zeros(4, 4)
    flow[:3] = before
    start = torch.cat([x, torch.ones(12, 1)], 1)
    end = start @ torch.linalg.matrix_exp(span * flow).T
    signal = end[:, :3].cos()  # of every sample's own cost
    a, b = 0, 0
    for j in range(points):
        t = span * j / points
        z = start @ torch.linalg.matrix_exp(t * flow).T
        g = signal @ torch.linalg.matrix_exp((span - t) * flow[:, :3][:3])
        a = a + z.T @ z / (12 * points)
        b = b + (span / points) ** 2 * g.T @ g / 12
    expected = before - lr * torch.linalg.solve(b, gradient) @ torch.linalg.inv(a)
    optimizer.step()
    found = torch.cat([layer.weight, layer.bias[:, None]], 1)
    assert relative(found - before, expected - before) < 1e-6
