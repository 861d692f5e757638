"""Flows: densities that integrate to one, exact divergences, gradients that autograd confirms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from ocnopt import SNOpt
from ocnopt.control.players import find_solved
from ocnopt.errors import OptionError
from ocnopt.ode.divergence import WithDivergence, exact_divergence, hutchinson_divergence
from ocnopt.ode.fields import ConcatSquashLinear, TimedSequential
from ocnopt.ode.flow import ContinuousFlow
from ocnopt.ode.statistics import AdjointStatistics

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


def squash_net(dim, hidden=8, activation=nn.Tanh, gain=2.0):
    """Three layers, with weights large enough for a density that is far from normal."""
    net = TimedSequential(
        ConcatSquashLinear(dim, hidden),
        activation(),
        ConcatSquashLinear(hidden, hidden),
        activation(),
        ConcatSquashLinear(hidden, dim),
    )
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(gain)
    return net


class Linear(nn.Module):
    """``F = W z``, whose flow is a matrix exponential."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, t, z):
        return self.linear(z)


class Drift(nn.Module):
    """A field of the time alone."""

    def __init__(self):
        super().__init__()
        self.speed = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, t, z):
        return (self.speed * t).expand(len(z), 2)


def traces(net, t, x):
    jacobians = vmap(jacrev(lambda point: net(t, point.unsqueeze(0)).squeeze(0)))(x)
    return jacobians.diagonal(dim1=1, dim2=2).sum(1)


# divergences


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_exact_divergence_is_the_trace_of_the_jacobian(dim, activation):
    net, x, t = squash_net(dim, activation=activation), torch.randn(7, dim), torch.tensor(0.3)
    x.requires_grad_()
    found = exact_divergence(net(t, x), x)
    wanted = traces(net, t, x.detach())
    assert wanted.abs().min() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    z, change = WithDivergence(net)(t, (x.detach(), torch.zeros(7)))
    torch.testing.assert_close(z, net(t, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(change, -wanted, rtol=0, atol=1e-10)


def test_hutchinson_over_all_signs_is_exact():
    """The mean over all 2^d directions has no error: off-diagonal terms cancel in pairs."""
    net, x, t = squash_net(3), torch.randn(4, 3, requires_grad=True), torch.tensor(0.3)
    f = net(t, x)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    every = torch.stack([hutchinson_divergence(f, x, e.expand_as(x)) for e in signs])
    torch.testing.assert_close(every.mean(0), traces(net, t, x.detach()), rtol=0, atol=1e-10)
    assert every.std(0).min() > 1e-2  # and one alone is not


def test_gradients_of_the_divergence_are_second_derivatives():
    net, x, t = squash_net(2), torch.randn(3, 2), torch.tensor(0.3)

    def change(z):
        return WithDivergence(net)(t, (z, torch.zeros(3)))[1]

    assert torch.autograd.gradcheck(change, (x.clone().requires_grad_(),))
    weight = net.layers[2].linear.weight
    (found,) = torch.autograd.grad(change(x).sum(), weight)
    step, row = torch.zeros_like(weight), 1e-5
    step[1, 2] = row
    with torch.no_grad():
        weight += step
        up = change(x).sum()
        weight -= 2 * step
        down = change(x).sum()
        weight += step
    assert found[1, 2].item() == pytest.approx((up - down).item() / (2 * row), rel=1e-6)


def test_nothing_is_kept_for_gradients_that_are_off():
    net, state = squash_net(2), (torch.randn(3, 2), torch.zeros(3))
    with torch.no_grad():
        slopes = WithDivergence(net)(torch.tensor(0.0), state)
    assert not any(part.requires_grad for part in slopes)
    assert not state[0].requires_grad


# densities


@pytest.mark.parametrize("legs", [1, 2])
def test_a_density_integrates_to_one_on_a_line(legs):
    flow = ContinuousFlow([squash_net(1) for _ in range(legs)], 1, **TIGHT)
    grid = torch.linspace(-12, 12, 2001)
    with torch.no_grad():
        density = flow.log_prob(grid[:, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-7)
    normal = torch.distributions.Normal(0, 1).log_prob(grid).exp()
    assert torch.trapezoid((density - normal).abs(), grid) > 0.1  # it is another one


def test_a_density_integrates_to_one_in_the_plane():
    flow = ContinuousFlow(squash_net(2), 2, rtol=1e-6, atol=1e-6)
    grid = torch.linspace(-7, 7, 141)
    points = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        density = flow(points).exp().view(141, 141)
    total = torch.trapezoid(torch.trapezoid(density, grid), grid)
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_a_linear_field_makes_a_normal_density():
    """``z(1) = exp(W) z(0)``: covariance exp(W) exp(W)^T."""
    field = Linear(3)
    flow = ContinuousFlow(field, 3, **TIGHT)
    x = torch.randn(5, 3)
    gain = torch.linalg.matrix_exp(field.linear.weight.detach())
    wanted = torch.distributions.MultivariateNormal(torch.zeros(3), gain @ gain.T).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), wanted, rtol=0, atol=1e-7)


def test_times_say_where_the_data_are():
    """Twice the time is twice the matrix; time that runs down to the data is its opposite."""
    field, x = Linear(2), torch.randn(5, 2)
    for t0, t1, factor in ((0.0, 2.0, 2.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 2.0)):
        flow = ContinuousFlow(field, 2, t0=t0, t1=t1, **TIGHT)
        gain = torch.linalg.matrix_exp(factor * field.linear.weight.detach())
        normal = torch.distributions.MultivariateNormal(torch.zeros(2), gain @ gain.T)
        torch.testing.assert_close(flow(x), normal.log_prob(x), rtol=0, atol=1e-7)


def test_a_field_of_the_time_alone_moves_the_normal_density():
    flow, x = ContinuousFlow(Drift(), 2, **TIGHT), torch.randn(5, 2)
    normal = torch.distributions.Normal(torch.tensor([0.5, -1.0]), 1.0)
    wanted = normal.log_prob(x).sum(1)
    torch.testing.assert_close(flow(x), wanted, rtol=0, atol=1e-8)
    (-flow(x).mean()).backward()
    shift = (x - torch.tensor([0.5, -1.0])).mean(0)
    torch.testing.assert_close(flow.legs[0].func.speed.grad, -shift / 2, rtol=0, atol=1e-8)


# there and back


@pytest.mark.parametrize("legs", [1, 3])
def test_points_come_back(legs):
    flow = ContinuousFlow([squash_net(2) for _ in range(legs)], 2, **TIGHT)
    x = torch.randn(6, 2)
    with torch.no_grad():
        z, _ = flow.to_base(x)
        back = flow.from_base(z)
    assert (z - x).norm() > 0.5
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


def test_log_prob_of_what_was_sampled_is_that_of_its_normal_point():
    """``log p(x) = log N(z) - log |det dx/dz|``, the determinant of autograd's own Jacobian."""
    flow = ContinuousFlow([squash_net(2), squash_net(2)], 2, adjoint=False, **TIGHT)
    x = flow.sample(3, torch.Generator().manual_seed(4))
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(4))
    jacobian = torch.autograd.functional.jacobian(flow.from_base, z)
    dets = torch.stack([jacobian[i, :, i].det().abs().log() for i in range(3)])
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(flow.log_prob(x), normal - dets, rtol=0, atol=1e-6)
    assert dets.abs().min() > 1e-2


def test_samples_have_the_density():
    """Counts in bins against the density's integrals, within four standard errors each."""
    flow, n = ContinuousFlow(squash_net(1), 1, rtol=1e-6, atol=1e-6), 4000
    x = flow.sample(n, torch.Generator().manual_seed(1)).squeeze(1)
    grid = torch.linspace(-10, 10, 2001)
    with torch.no_grad():
        density = flow(grid[:, None]).exp()
    for low, high in ((-10, -1), (-1, 0), (0, 1), (1, 10)):
        part = (grid >= low) & (grid <= high)
        share = torch.trapezoid(density[part], grid[part]).item()
        seen = ((x >= low) & (x < high)).double().mean().item()
        assert abs(seen - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_samples_repeat_and_keep_no_graph():
    flow = ContinuousFlow(squash_net(2), 2)
    first, second = (flow.sample(3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert flow.sample(0).shape == (0, 2)


# gradients


def gradients(flow, x):
    flow.zero_grad()
    x = x.clone().requires_grad_()
    (-flow(x).mean()).backward()
    return [x.grad, *(p.grad.clone() for p in flow.parameters())]


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("legs", [1, 2])
def test_the_adjoint_agrees_with_back_propagation(divergence, legs):
    """Hutchinson's too: a backward solve with other noise would be far off."""
    flow = ContinuousFlow(
        [squash_net(2, 4) for _ in range(legs)], 2, divergence=divergence, **TIGHT
    )
    unrolled = ContinuousFlow(
        [leg.func for leg in flow.legs], 2, divergence=divergence, adjoint=False, **TIGHT
    )
    x = torch.randn(5, 2)
    torch.manual_seed(3)
    found = gradients(flow, x)
    torch.manual_seed(3)
    wanted = gradients(unrolled, x)
    assert len(found) == 1 + 15 * legs
    for own, other in zip(found, wanted, strict=True):
        assert other.norm() > 1e-6
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


def test_noise_of_two_forward_passes_is_not_mixed_up():
    """Both passes come before both backward passes, in either order."""
    flow = ContinuousFlow(squash_net(2, 4), 2, divergence="hutchinson", rtol=1e-6, atol=1e-6)
    x, y = torch.randn(4, 2), torch.randn(4, 2)

    def grads(order):
        torch.manual_seed(5)
        losses = [-flow(x).mean(), -flow(y).mean()]
        flow.zero_grad()
        for k in order:
            losses[k].backward()
        return [p.grad.clone() for p in flow.parameters()]

    apart = []
    torch.manual_seed(5)
    for points in (x, y):
        loss = -flow(points).mean()
        flow.zero_grad()
        loss.backward()
        apart.append([p.grad.clone() for p in flow.parameters()])
    wanted = [a + b for a, b in zip(*apart, strict=True)]
    for order in ((0, 1), (1, 0)):
        for own, other in zip(grads(order), wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_noise_comes_from_torch_and_stays_within_a_solve():
    """The estimate of a linear field is e^T W e for one e: entries of a solve's noise are +-1."""
    field = Linear(2)
    flow = ContinuousFlow(field, 2, divergence="hutchinson", **TIGHT)
    x = torch.randn(200, 2)
    torch.manual_seed(2)
    with torch.no_grad():
        (_, first), state = flow.to_base(x), torch.get_rng_state()
        _, second = flow.to_base(x)
        torch.set_rng_state(state)
        _, again = flow.to_base(x)
    w = field.linear.weight.detach()
    same, opposite = w.sum(), w[0, 0] + w[1, 1] - w[0, 1] - w[1, 0]  # e = (1, 1), e = (1, -1)
    is_same = torch.isclose(first, same, rtol=0, atol=1e-8)
    assert (is_same | torch.isclose(first, opposite, rtol=0, atol=1e-8)).all()
    assert 60 < is_same.sum() < 140  # both happen: 100 +- 7
    assert torch.equal(second, again)
    assert not torch.equal(first, second)


def test_hutchinson_is_unbiased():
    """The log-density's mean over 2000 noises is the exact one within four standard errors."""
    net, repeats = squash_net(2), 2000
    x = torch.tensor([[0.4, -0.8], [1.2, 0.3]])
    solver = {"rtol": 1e-5, "atol": 1e-5}
    exact = ContinuousFlow(net, 2, **solver)
    flow = ContinuousFlow(net, 2, divergence="hutchinson", **solver)
    with torch.no_grad():
        wanted = exact(x)
        found = flow(x.repeat(repeats, 1)).view(repeats, 2)
    error = found.std(0) / math.sqrt(repeats)
    assert error.min() > 1e-4  # it is an estimate
    assert ((found.mean(0) - wanted).abs() < 4 * error + 1e-4).all()  # 1e-4: the solver's
    flow.divergence = "exact"
    torch.testing.assert_close(flow(x), exact(x))


# with SNOpt


class Seen:
    """A listener of its own making: inputs z and output gradients g of linear layers, in time."""

    def __init__(self, flow, step):
        self.layers = {n: m for n, m in flow.named_modules() if isinstance(m, nn.Linear)}
        self.sample_step = step
        self.pairs = {name: [] for name in self.layers}
        for leg in flow.legs:
            leg.follow(self)

    def arrived(self, task, field, end, x, gradient):
        pass

    def sample(self, field, t, x, a, duration):
        calls = []
        handles = [
            m.register_forward_hook(lambda _, z, h, n=n: calls.append((n, z[0].detach(), h)))
            for n, m in self.layers.items()
        ]
        with torch.enable_grad():
            outputs = field(t, x)
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(outputs, [h for *_, h in calls], a)
        for (name, z, h), g in zip(calls, grads, strict=True):
            assert h.shape == g.shape
            self.pairs[name].append((duration, torch.cat([z, torch.ones(len(z), 1)], 1), g))

    def products(self, name):
        """``int z (x) g dt`` of every sample; time runs down from the data: dt < 0."""
        return -sum(d * g[:, :, None] * z[:, None, :] for d, z, g in self.pairs[name])


def whole_gradient(layer):
    """By weight and bias, side by side."""
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)


def test_statistics_are_of_one_call_per_layer_and_point_with_gradients_by_sample():
    """What SNOpt's factors are made of, against plain sums of z z^T and g g^T."""
    flow = ContinuousFlow([squash_net(2), squash_net(2)], 2, rtol=1e-6, atol=1e-6)
    players, step, n = find_solved(flow), 0.04, 4
    statistics = AdjointStatistics(players, lambda: step, lambda: players)
    for leg in flow.legs:
        leg.follow(statistics)
    seen = Seen(flow, step)
    (-flow(torch.randn(n, 2)).mean()).backward()
    assert len(players) == len(seen.pairs) == 2 * 9
    for player in players:
        pairs = seen.pairs[player.name]
        assert len(pairs) == 25
        a = sum(d * z.T @ z for d, z, _ in pairs) / n
        b = sum(step * d * n * g.T @ g for d, _, g in pairs)  # n: gradients of a mean
        if player.module.bias is None:
            a = a[:-1, :-1]
        found_a, found_b = statistics.factors(player, n, n)
        torch.testing.assert_close(found_a[0], a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found_b[0], b, rtol=1e-10, atol=1e-12)
        assert b.norm() > 1e-8


class TwoLayers(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.first, self.last = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, t, z):
        return self.last(torch.tanh(self.first(z)))


def test_what_layers_show_is_the_gradient_but_for_the_weights_in_the_jacobian():
    """``d log p/dW = int z (x) g dt - int d(div F)/dW dt``, the last with all outputs held fixed.

    With two layers ``div F = sum_ij V_ij tanh'(h_j) W_ji``, whose derivative by a weight matrix,
    h fixed, is written down here, and integrated along the solution by a fine trapezoidal rule.
    Biases are not in it.
    """
    net, n, step = TwoLayers(2, 6), 4, 2e-3
    flow, x = ContinuousFlow(net, 2, rtol=1e-8, atol=1e-8), torch.randn(n, 2)
    seen = Seen(flow, step)
    flow(x).sum().backward()  # of all samples at once
    own = {name: seen.products(f"odes.0.func.{name}") for name in ("first", "last")}
    flow.legs[0].unfollow(seen)
    times = torch.linspace(1, 0, 501)
    with torch.no_grad():
        states = flow.legs[0](x, times)
        slopes = 1 - torch.tanh(net.first(states)) ** 2
        mean = torch.trapezoid(slopes, -times, dim=0)  # (n, hidden)
    missing = {
        "first": -mean[:, :, None] * net.last.weight.detach().T,
        "last": -mean[:, None, :] * net.first.weight.detach().T,
    }
    for k in range(n):
        flow.zero_grad()
        flow(x[k : k + 1]).sum().backward()  # the whole gradient of one
        for name in own:
            whole = whole_gradient(getattr(net, name))
            shown = own[name][k].clone()
            shown[:, :-1] += missing[name][k]
            # what is shown is a rectangle rule: first order in the step
            bound = 2 * step * whole.norm().item()
            torch.testing.assert_close(shown, whole, rtol=0, atol=bound)
            assert missing[name][k].norm() > 0.05 * whole.norm()  # it is no small part


def test_of_a_linear_field_nothing_of_the_divergence_is_shown():
    """``F = W z``: div F = tr W, so that all it adds to a gradient, -I a sample, is missing."""
    flow = ContinuousFlow(Linear(2), 2, rtol=1e-8, atol=1e-8)
    seen = Seen(flow, 2e-3)
    flow(torch.randn(3, 2)).sum().backward()
    shown = seen.products("odes.0.func.linear").sum(0)[:, :-1]
    (weight,) = flow.parameters()
    torch.testing.assert_close(weight.grad - shown, -3 * torch.eye(2), rtol=0, atol=2e-2)


def target(n, generator=None):
    """A ring, (n, 2)."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    noise = 0.2 * torch.randn(n, 2, generator=generator)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + noise


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_it_trains_with_snopt_in_the_ordinary_loop(divergence):
    flow = ContinuousFlow(
        squash_net(2, 16, gain=1.0), 2, divergence=divergence, rtol=1e-3, atol=1e-3
    )
    optimizer = SNOpt(flow, lr=0.05, update_every=5, sample_step=0.25)
    assert {row.treatment for row in optimizer.coverage()} == {"adjoint"}
    generator = torch.Generator().manual_seed(0)
    x = target(200, generator)
    flow.divergence = "exact"
    with torch.no_grad():
        before = -flow(x).mean()
    flow.divergence = divergence
    for _ in range(12):
        optimizer.zero_grad()
        loss = -flow(target(64, generator)).mean()
        loss.backward()
        optimizer.step()
    flow.divergence = "exact"
    with torch.no_grad():
        after = -flow(x).mean()
    assert after < before - 0.1
    assert flow.legs[0].evaluations.sampling > 0


def test_a_run_goes_on_bit_for_bit():
    """Noise comes from torch's generator, so its state, the weights and the optimizer suffice."""
    x = target(32)

    def steps(flow, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            (-flow(x).mean()).backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(1)
        flow = ContinuousFlow(squash_net(2, 4), 2, divergence="hutchinson", rtol=1e-3, atol=1e-3)
        return flow, SNOpt(flow, lr=0.05, update_every=2, sample_step=0.25)

    flow, optimizer = fresh()
    steps(flow, optimizer, 3)
    kept = copy.deepcopy((flow.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    steps(flow, optimizer, 3)
    other, taken_up = fresh()
    other.load_state_dict(kept[0])
    taken_up.load_state_dict(kept[1])
    torch.set_rng_state(kept[2])
    steps(other, taken_up, 3)
    for own, wanted in zip(other.parameters(), flow.parameters(), strict=True):
        assert torch.equal(own, wanted)


# options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"divergence": "approximate"}, "divergence='approximate'"),
        ({"dim": 0}, "dim=0"),
        ({"dim": True}, "dim=True"),
        ({"field": []}, "there is none"),
        ({"t1": 0.0}, "nothing would be solved"),
        ({"method": "newton"}, "newton"),
    ],
)
def test_bad_options_are_refused(options, says):
    given = {"field": squash_net(2), "dim": 2, **options}
    with pytest.raises(OptionError, match=says.replace("(", r"\(")):
        ContinuousFlow(given.pop("field"), given.pop("dim"), **given)


def test_bad_points_are_refused():
    flow = ContinuousFlow(squash_net(2), 2)
    for x in (torch.randn(3, 3), torch.randn(2), [[0.0, 0.0]]):
        with pytest.raises(OptionError, match=r"points \(B, 2\)"):
            flow.log_prob(x)
    with pytest.raises(OptionError, match="floating"):
        flow(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(OptionError, match="n=-1"):
        flow.sample(-1)
    with pytest.raises(OptionError, match="divergence='none'"):
        flow.divergence = "none"


def test_hooks_of_the_module_see_log_prob():
    flow, calls = ContinuousFlow(squash_net(2), 2), []
    flow.register_forward_hook(lambda *_: calls.append(1))
    found: Tensor = flow.log_prob(torch.randn(3, 2))
    assert found.shape == (3,) and calls == [1]


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_no_points_have_no_densities(divergence):
    flow = ContinuousFlow(squash_net(2), 2, divergence=divergence)
    points = torch.empty(0, 2)
    found = flow.log_prob(points)
    assert found.shape == (0,) and flow.from_base(points).shape == (0, 2)
    found.sum().backward()
    assert all(not p.grad.any() for p in flow.parameters() if p.grad is not None)
