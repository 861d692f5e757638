"""Small fields and models with a Neural ODE, and their brute force in many small steps."""

import torch
from torch import nn

import ocnopt
from ocnopt.control.players import find_solved
from ocnopt.ode import ConcatConv2d, ConcatLinear, ConcatSquashLinear, NeuralODE, TimedSequential
from ocnopt.ode.statistics import AdjointStatistics

#: Solver options at which what is compared agrees to about nine digits.
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
#: Solver options at which models are trained that are only compared with each other.
LOOSE = {"rtol": 1e-4, "atol": 1e-5}
#: A solver with the same steps for every batch.
STEADY = {"method": "rk4", "options": {"step_size": 0.2}}


def timed(width=3, hidden=5):
    """Nonlinear, and dependent on the time."""
    return TimedSequential(ConcatLinear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))


def squashed(width=3, hidden=4):
    """The layers of a flow."""
    return TimedSequential(
        ConcatSquashLinear(width, hidden), nn.Tanh(), ConcatSquashLinear(hidden, width)
    )


class Convolutions(nn.Module):
    """Two convolutions that see the time, one in groups that does not, an activation in place."""

    def __init__(self, channels=2):
        super().__init__()
        self.first = ConcatConv2d(channels, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.last = ConcatConv2d(4, channels, 3, padding=1)

    def forward(self, t, x):
        x = nn.functional.softplus(self.first(t, x))
        return self.last(t, torch.tanh_(self.grouped(x)))


#: Name: how to make a field, and the shape of one sample.
FIELDS = {
    "Linear": (timed, (3,)),
    "ConcatSquashLinear": (squashed, (3,)),
    "ConcatConv2d": (Convolutions, (2, 4, 4)),
}


def make(name, seed=0, scale=1.5):
    """A field with weights large enough to bend, and a batch of initial states."""
    torch.manual_seed(seed)
    build, shape = FIELDS[name]
    field = build()
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(scale)
    return field, torch.randn(6, *shape)


def runge_kutta(field, x, t0, t1, steps):
    """States at every step of the classical method, differentiable; x a tensor or a tuple."""
    h = (t1 - t0) / steps
    single = not isinstance(x, tuple)

    def f(t, x):
        value = field(t, x[0] if single else x)
        return (value,) if single else value

    def add(x, scale, k):
        return tuple(a + scale * b for a, b in zip(x, k, strict=True))

    states = [(x,) if single else x]
    for i in range(steps):
        t, x = torch.as_tensor(t0 + i * h), states[-1]
        a = f(t, x)
        b = f(t + h / 2, add(x, h / 2, a))
        c = f(t + h / 2, add(x, h / 2, b))
        d = f(t + h, add(x, h, c))
        for scale, k in ((1, a), (2, b), (2, c), (1, d)):
            x = add(x, h / 6 * scale, k)
        states.append(x)
    return [state[0] for state in states] if single else states


def reference(field, x0, cost, t0, t1, steps):
    """States and adjoints at every step of a fine solve."""
    states = runge_kutta(field, x0.clone().requires_grad_(), t0, t1, steps)
    return states, torch.autograd.grad(cost(states[-1]), states)


def gathered(model, step):
    """Factors of a model's Neural ODEs are gathered, whoever asks."""
    players = find_solved(model)
    found = AdjointStatistics(players, lambda: step, lambda: players)
    for module in model.modules():
        if isinstance(module, NeuralODE):
            module.follow(found)
    return found


def locations(module, z, g):
    """Pairs of one input [z; 1] and one output gradient."""
    if isinstance(module, nn.Conv2d):
        z = nn.functional.unfold(z, module.kernel_size, padding=module.padding)
        z, g = z[0].T, g[0].flatten(1).T
    for row, col in zip(z, g, strict=True):
        one = [] if module.bias is None else [torch.ones(1)]
        yield torch.cat([row, *one]), col


def classifier(dtype=torch.float64, seed=0, ode=None, **options):
    """Linear, Neural ODE, linear."""
    torch.manual_seed(seed)
    block = NeuralODE(timed(), **{**LOOSE, **options}) if ode is None else ode
    return nn.Sequential(nn.Linear(4, 3), block, nn.Linear(3, 3)).to(dtype)


def batch(seed=0, size=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=g, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (size,), generator=g)


def relative(found, expected):
    """Largest difference, in units of the largest expected entry."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def snopt(model, **options):
    """An optimizer that renews its factors every other step."""
    options = {"lr": 0.05, "update_every": 2, "sample_step": 0.1, "momentum": 0.5, **options}
    return ocnopt.SNOpt(model, **options)


def steady(dtype=torch.float64, seed=0, **options):
    """A classifier whose solver's steps do not depend on who else is in the batch."""
    return classifier(dtype, seed, **{**STEADY, **options})


def step(model, optimizer, x, y):
    """One turn of the ordinary loop; returns the loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def run(model, optimizer, steps, start=0, dtype=torch.float64):
    return [step(model, optimizer, *batch(i, dtype=dtype)) for i in range(start, start + steps)]


def trained(model):
    """The weights without the times."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
