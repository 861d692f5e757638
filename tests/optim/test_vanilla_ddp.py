"""VanillaDDP is Algorithm 1: exact where it must be, equal to brute force elsewhere, and safe."""

from __future__ import annotations

import copy
import io
import itertools
import math

import oracles
import pytest
import torch
from torch import Tensor, nn

import ocnopt
from ocnopt.control.chain import watch_chain
from ocnopt.control.ddp import DDP
from ocnopt.control.passes import TerminalCall
from ocnopt.control.players import find_players
from ocnopt.control.terminal import TerminalCost

MODES = ("mean", "share", "joint")


def VanillaDDP(model, criterion, **options):
    """With every term of Eq. 3, unless the test says otherwise."""
    return ocnopt.VanillaDDP(model, criterion, **{"dynamics_order": 2, **options})


class MeanOver(nn.Module):
    def forward(self, x):
        return x.mean(1)


def linear_chain(widths=(3, 4, 2, 3)):
    """Frozen weights, trained biases: x_{t+1} = A x_t + u_t."""
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    for layer in model:
        layer.weight.requires_grad_(False)
    return model


def tanh_chain():
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Sigmoid(), nn.Linear(3, 2)
    )


def conv_chain():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 2, 2, stride=2, bias=False),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(2, 2),
    )


def token_chain():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), MeanOver(), nn.Linear(3, 2))


CHAINS = {
    "fc": (tanh_chain, (3,)),
    "conv": (conv_chain, (2, 4, 4)),
    "tokens": (token_chain, (2, 3)),
}


def case(name, batch, criterion="ce"):
    make, shape = CHAINS[name]
    model, x = make(), torch.randn(batch, *shape)
    if criterion == "ce":
        return model, x, torch.arange(batch) % 2, nn.CrossEntropyLoss()
    return model, x, torch.randn(batch, 2), nn.MSELoss()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gradient(model, criterion, x, y, decay=0.0):
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = criterion(model(x), y) + decay / 2 * sum(p.square().sum() for p in trained)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trained)])


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "size"), [("joint", 1), ("joint", 5), ("mean", 1), ("share", 1)])
def test_one_step_solves_a_linear_quadratic_problem(batch, size):
    model = linear_chain()
    x, y = torch.randn(size, 3), torch.randn(size, 3)
    optimizer = VanillaDDP(model, nn.MSELoss(), batch=batch, damping=0.0, weight_decay=0.1)
    before = gradient(model, nn.MSELoss(), x, y, 0.1).norm()
    loss = optimizer.step(x, y)
    assert before > 0.1
    assert gradient(model, nn.MSELoss(), x, y, 0.1).norm() < 1e-8
    total = optimizer.diagnostics.total
    assert optimizer.alpha == 1.0 and optimizer.damping == 0.0
    assert total.predicted_decrease == pytest.approx(total.actual_decrease, rel=1e-10)
    assert loss.shape == () and not loss.requires_grad
    # There is nothing left to do, and that is no failure.
    optimizer.step(x, y)
    assert optimizer.damping == 0.0


def test_only_the_joint_form_is_exact_for_several_samples():
    """Where costs differ, that is: equal ones give equal gains, whose mean is the joint policy."""
    left = {}
    for equal, batch in itertools.product((True, False), MODES):
        torch.manual_seed(1)
        model = linear_chain()
        x, y = torch.randn(5, 3), torch.randn(5, 3)
        w = torch.ones(5, 1) if equal else torch.rand(5, 1)
        criterion = ocnopt.Criterion(lambda o, y, w=w: (w * (o - y).square()).mean())
        VanillaDDP(model, criterion, batch=batch, damping=0.0, weight_decay=0.1).step(x, y)
        left[equal, batch] = float(gradient(model, criterion, x, y, 0.1).norm())
    assert max(left[True, "mean"], left[True, "joint"], left[False, "joint"]) < 1e-8
    assert min(left[False, "mean"], left[False, "share"]) > 1e-4


@pytest.mark.parametrize("batch", MODES)
@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.CrossEntropyLoss()])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_single_layer_takes_the_damped_newton_step(criterion, batch, reduction):
    criterion = type(criterion)(reduction=reduction)
    layer = nn.Linear(3, 4)
    x = torch.randn(6, 3)
    y = torch.randn(6, 4) if isinstance(criterion, nn.MSELoss) else torch.arange(6) % 4

    def cost(u: Tensor) -> Tensor:
        return criterion(x @ u[:12].reshape(4, 3).T + u[12:], y) + 0.05 * u.square().sum()

    u = flat(layer)
    hessian = torch.autograd.functional.hessian(cost, u)
    slope = torch.autograd.functional.jacobian(cost, u)
    expected = u - torch.linalg.solve(hessian + 0.3 * torch.eye(16), slope)
    VanillaDDP(layer, criterion, batch=batch, damping=0.3, weight_decay=0.1).step(x, y)
    assert oracles.relative_error(flat(layer) - u, expected - u) < 1e-12


# --- backward quantities -------------------------------------------------------------------------


def expanded(model, x, y, criterion, damping, state_reg=0.0, decay=0.0):
    """All Q of one sample."""
    players, _ = find_players(model)
    with torch.no_grad():
        watch = watch_chain(players)
        with watch:
            output = model(x)
        chain = watch.chain(output)
        call = TerminalCall(output, (y,), {}, criterion(output, y))
        v, k = TerminalCost(criterion, "full").expansion(call, 1, positive=False)
        decays = {p: tuple(torch.full_like(q, decay) for q in p.params) for p in players}
        ddp = DDP(chain, decays, 1, torch.float64, state_reg=state_reg, inspect=True)
        policies = ddp.backward(v, k, damping)
        assert policies is not None
    return ddp, policies


def compare(model, x, y, criterion, damping, drop_q_ux):
    ddp, _ = expanded(model, x, y, criterion, damping)
    phi = oracles.row_losses(criterion, model(x), y)
    expected = oracles.second_order_backward(list(model), x, phi, 0, drop_q_ux)
    worst = 0.0
    for stage, terms in zip(model, expected, strict=True):
        found = next((e for p, e in ddp.expansions.items() if p.module is stage), None)
        if found is None:
            continue
        order = slice(None)
        if isinstance(stage, nn.Linear) and stage.weight.requires_grad:
            order = oracles.row_major_order(stage)
        v_x, v_xx = terms.Q_x, terms.Q_xx
        if not drop_q_ux:
            v_x = v_x - terms.Q_ux.T @ torch.linalg.solve(terms.Q_uu, terms.Q_u)
            v_xx = v_xx - terms.Q_ux.T @ torch.linalg.solve(terms.Q_uu, terms.Q_ux)
        pairs = [
            (found.q_u[0][order], terms.Q_u),
            (found.q_uu[order][:, order], terms.Q_uu),
            (found.q_ux[0][order], terms.Q_ux),
            (found.v_x[0], v_x),
            (found.v_xx[0], v_xx),
        ]
        worst = max(worst, *(oracles.relative_error(a, b) for a, b in pairs))
    return worst


@pytest.mark.parametrize("name", ["fc", "conv"])
@pytest.mark.parametrize("criterion", ["ce", "mse"])
def test_all_second_order_terms_equal_the_oracle(name, criterion):
    """Under infinite damping the gains vanish, which is the oracle without Q_ux."""
    model, x, y, loss = case(name, 1, criterion)
    assert compare(model, x, y, loss, 1e14, drop_q_ux=True) < 1e-11


def test_with_gains_they_equal_the_oracle():
    """Kernels have fewer numbers than outputs, so that Q_uu is regular and the gains matter."""
    model = nn.Sequential(nn.Conv2d(1, 1, 2), nn.Tanh(), nn.Conv2d(1, 1, 2), nn.Sigmoid())
    x = torch.randn(1, 1, 6, 6)
    y = (model(x) + 1e-3 * torch.randn(1, 1, 4, 4)).detach()
    assert compare(model, x, y, nn.MSELoss(), 0.0, drop_q_ux=False) < 1e-9
    assert compare(model, x, y, nn.MSELoss(), 0.0, drop_q_ux=True) > 1e-3


# --- brute force ---------------------------------------------------------------------------------


def stages_of(model):
    """f_t = s_t(g_t): every player with what follows it."""
    stages: list[nn.Sequential] = []
    for module in model:
        if oracles.controls(module):
            stages.append(nn.Sequential(module))
        else:
            stages[-1].append(module)
    return stages


def brute_force(model, criterion, x, y, batch, damping, state_reg, decay, alpha):
    """New parameters of every player, from autograd's Hessians of Q as it is defined."""
    stages = stages_of(model)
    groups = [x] if batch == "joint" else list(x.split(1))
    share = 1 / len(groups) if batch == "share" else 1.0
    controls = [oracles.parameter_vector(stage) for stage in stages]

    def run(stage, state, u):
        return torch.func.functional_call(stage, oracles.split_vector(stage, u), (state,))

    paths = []
    for group in groups:
        path = [group]
        for stage, u in zip(stages, controls, strict=True):
            path.append(run(stage, path[-1], u).detach())
        paths.append(path)
    outputs = torch.cat([path[-1] for path in paths])
    values = []
    for i, path in enumerate(paths):

        def phi(o, i=i, path=path):
            rows = outputs if batch == "joint" else outputs[i : i + 1]
            parts = [o.reshape(rows.shape)]
            if batch != "joint":
                parts = [outputs[:i], *parts, outputs[i + 1 :]]
            return len(groups) * criterion(torch.cat(parts), y)

        end = path[-1].reshape(-1)
        values.append(
            (
                torch.autograd.functional.jacobian(phi, end),
                torch.autograd.functional.hessian(phi, end),
            )
        )
    policies = []
    for t in reversed(range(len(stages))):
        terms = []
        for path, (V_x, V_xx) in zip(paths, values, strict=True):
            here, end, n = path[t], path[t + 1].reshape(-1), path[t].numel()

            def Q(point, reg, t=t, here=here, end=end, n=n, V_x=V_x, V_xx=V_xx):
                e = run(stages[t], point[:n].reshape(here.shape), point[n:]).reshape(-1) - end
                cost = V_x @ e + 0.5 * e @ V_xx @ e + 0.5 * reg * e @ e
                return cost + 0.5 * decay * point[n:] @ point[n:]

            point = torch.cat([here.reshape(-1), controls[t]])
            first = torch.autograd.functional.jacobian(lambda p: Q(p, 0.0), point)
            second = torch.autograd.functional.hessian(lambda p: Q(p, 0.0), point)
            regular = torch.autograd.functional.hessian(lambda p: Q(p, state_reg), point)
            terms.append((n, first, second, regular))
        Q_uu = sum(r[n:, n:] for n, _, _, r in terms) / len(terms)
        Q_uu = Q_uu + damping * torch.eye(len(Q_uu))
        assert torch.linalg.eigvalsh(Q_uu).min() > 0
        policy, new_values = [], []
        for n, first, second, regular in terms:
            k = -torch.linalg.solve(Q_uu, first[n:])
            K = -torch.linalg.solve(Q_uu, regular[n:, :n])
            policy.append((k, K))
            k, K = share * k, share * K
            uu, ux, q_u = second[n:, n:], second[n:, :n], first[n:]
            V_x = first[:n] + K.T @ uu @ k + K.T @ q_u + ux.T @ k
            V_xx = second[:n, :n] + K.T @ uu @ K + K.T @ ux + ux.T @ K
            new_values.append((V_x, V_xx))
        policies.insert(0, policy)
        values = new_values
    new = []
    states = groups
    for t, stage in enumerate(stages):
        steps = [
            alpha * k + K @ (state - path[t]).reshape(-1)
            for (k, K), state, path in zip(policies[t], states, paths, strict=True)
        ]
        u = controls[t] + sum(steps) / len(steps)
        new.append(u)
        states = [run(stage, state, u).detach() for state in states]
    return torch.cat(new)


@pytest.mark.parametrize("batch", MODES)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("state_reg", [0.0, 0.7])
def test_a_step_equals_brute_force(name, batch, state_reg):
    model, x, y, criterion = case(name, 3)
    start = flat(model)
    expected = brute_force(model, criterion, x, y, batch, 2.0, state_reg, 0.1, 0.7)
    optimizer = VanillaDDP(
        model,
        criterion,
        lr=0.7,
        damping=2.0,
        state_reg=state_reg,
        batch=batch,
        weight_decay=0.1,
        backtracks=None,
    )
    optimizer.step(x, y)
    assert optimizer.diagnostics.total.failures == 0
    assert oracles.relative_error(flat(model) - start, expected - start) < 1e-10


def test_first_order_dynamics_leave_out_what_they_say():
    """With everything affine but the criterion there is nothing to leave out."""
    torch.manual_seed(3)
    deep = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    deep[2].weight.requires_grad_(False)
    deep[0].weight.requires_grad_(False)
    twin = copy.deepcopy(deep)
    x, y = torch.randn(4, 3), torch.arange(4) % 2
    VanillaDDP(deep, nn.CrossEntropyLoss(), batch="joint", dynamics_order=1).step(x, y)
    VanillaDDP(twin, nn.CrossEntropyLoss(), batch="joint", dynamics_order=2).step(x, y)
    assert torch.allclose(flat(deep), flat(twin), rtol=1e-9)
    one = tanh_chain()
    two = copy.deepcopy(one)
    VanillaDDP(one, nn.CrossEntropyLoss(), batch="joint", damping=2.0, dynamics_order=1).step(x, y)
    VanillaDDP(two, nn.CrossEntropyLoss(), batch="joint", damping=2.0, dynamics_order=2).step(x, y)
    assert not torch.allclose(flat(one), flat(two), rtol=1e-3)


# --- the regularized recursion -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_the_value_is_the_cost_to_go_of_the_regularized_policy(size):
    model, criterion, decay = linear_chain(), nn.MSELoss(), 0.1
    x, y = torch.randn(size, 3), torch.randn(size, 3)
    ddp, policies = expanded(model, x, y, criterion, 0.5, state_reg=0.3, decay=decay)
    states = [x]
    for layer in model:
        states.append(layer(states[-1]).detach())
    literal_is_off = 0.0
    for t in range(len(model)):

        def cost(dx, t=t):
            state, total = states[t] + dx.reshape(states[t].shape), torch.zeros(())
            for s in range(t, len(model)):
                policy, change = policies[s], (state - states[s]).reshape(-1)
                u = model[s].bias.detach() + policy.k[0] + policy.gain[0] @ change
                total = total + decay / 2 * u @ u
                state = state @ model[s].weight.detach().T + u
            return total + criterion(state, y)

        zero = torch.zeros(states[t].numel())
        player = policies[t].control.player
        found = ddp.expansions[player]
        first = torch.autograd.functional.jacobian(cost, zero)
        second = torch.autograd.functional.hessian(cost, zero)
        assert oracles.relative_error(found.v_x[0], first) < 1e-10
        assert oracles.relative_error(found.v_xx[0], second) < 1e-10
        literal = found.q_ux[0].T @ policies[t].gain[0]  # Eq. 5 takes K for the minimizer's gain
        q_xx = found.v_xx[0] - (
            policies[t].gain[0].T @ found.q_uu @ policies[t].gain[0] + literal + literal.T
        )
        literal_is_off = max(literal_is_off, oracles.relative_error(q_xx + literal, second))
    assert literal_is_off > 0.01


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", MODES)
@pytest.mark.parametrize("dynamics_order", [1, 2])
def test_digits_fall_monotonically(batch, dynamics_order):
    pytest.importorskip("sklearn")
    from ocnopt.experiments.datasets import load

    data = load("digits")
    x, y = data.train_x[:24].double().flatten(1)[:, ::4], data.train_y[:24]
    model = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 10))
    optimizer = VanillaDDP(
        model, nn.CrossEntropyLoss(), batch=batch, dynamics_order=dynamics_order, damping=0.1
    )
    losses = [float(optimizer.step(x, y)) for _ in range(12)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses)), losses
    assert losses[-1] < losses[0] - 0.05, losses
    if batch == "joint" and dynamics_order == 2:
        assert losses[-1] < 0.7 * losses[0], losses


def test_where_no_alpha_is_accepted_the_weights_stay():
    model, x, y, criterion = case("fc", 4)
    optimizer = VanillaDDP(model, criterion, lr=1e3, backtracks=0, damping=1.0)
    kept = flat(model)
    optimizer.step(x, y)
    total = optimizer.diagnostics.total
    assert torch.equal(flat(model), kept)
    assert optimizer.alpha == 0.0
    assert optimizer.damping == pytest.approx(10 * total.damping)
    assert total.predicted_decrease is not None and total.actual_decrease is not None
    with_search = VanillaDDP(model, criterion, lr=1e3, backtracks=20, damping=1.0)
    with_search.step(x, y)
    assert 0 < with_search.alpha < 1 and with_search.diagnostics.total.actual_decrease > 0
    assert not torch.equal(flat(model), kept)


@pytest.mark.parametrize("batch", MODES)
def test_a_singular_curvature_is_survived(batch):
    """Two samples cannot determine 17 parameters; damping starts at zero."""
    model, x, y, criterion = case("fc", 2)
    optimizer = VanillaDDP(model, criterion, batch=batch, damping=0.0)
    losses = [float(optimizer.step(x, y)) for _ in range(4)]
    assert optimizer.diagnostics.total.failures > 0
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0]
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)  # Q_uu of the first layer is exactly zero
    optimizer = VanillaDDP(dead, criterion, batch=batch, damping=0.0)
    before = float(optimizer.step(x, y))
    assert float(criterion(dead(x), y).detach()) < before


def test_buffers_random_numbers_and_grad():
    """One pass is real: running statistics move once, all trials share one dropout mask."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Dropout(), nn.Linear(4, 2)
    )
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    with pytest.raises(ocnopt.GraphError, match="batch='joint'"):
        VanillaDDP(model, nn.CrossEntropyLoss()).step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    optimizer = VanillaDDP(model, nn.CrossEntropyLoss(), batch="joint", damping=1.0)
    torch.manual_seed(5)
    loss = optimizer.step(x, y)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(loss, nn.CrossEntropyLoss()(twin(x), y).detach())
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    # The actual decrease is what the same mask and statistics give.
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    fallen = float(loss - nn.CrossEntropyLoss()(twin(x), y).detach())
    assert fallen == pytest.approx(optimizer.diagnostics.total.actual_decrease, rel=1e-9)


# --- an optimizer among others -------------------------------------------------------------------


def test_resumes_bit_for_bit():
    def build():
        torch.manual_seed(2)
        model = tanh_chain()
        optimizer = VanillaDDP(model, nn.CrossEntropyLoss(), damping=0.0, weight_decay=1e-3)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(8)]
    one, first, schedule = build()
    for x, y in batches[:4]:
        first.step(x, y)
        schedule.step()
    assert first.damping > 0
    saved = io.BytesIO()
    torch.save((one.state_dict(), first.state_dict(), schedule.state_dict()), saved)
    saved.seek(0)
    states = torch.load(saved)
    two, second, schedule_two = build()
    for part, state in zip((two, second, schedule_two), states, strict=True):
        part.load_state_dict(state)
    assert second.damping == first.damping
    assert second.param_groups[0]["lr"] == pytest.approx(0.9**4)
    for x, y in batches[4:]:
        assert torch.equal(first.step(x, y), second.step(x, y))
        schedule.step()
        schedule_two.step()
    assert torch.equal(flat(one), flat(two))
    assert first.damping == second.damping


def test_groups_and_rates():
    model, x, y, criterion = case("fc", 4)
    optimizer = VanillaDDP(model, criterion, params=[{"params": "0", "lr": 0.0}])
    kept = model[0].weight.clone()
    optimizer.step(x, y)
    assert torch.equal(model[0].weight, kept)
    assert optimizer.alpha > 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    kept = flat(model)
    assert torch.equal(optimizer.step(x, y), criterion(model(x), y).detach())
    assert torch.equal(flat(model), kept)
    split = VanillaDDP(model, criterion, params=[{"params": "0.weight", "lr": 0.1}])
    with pytest.raises(ocnopt.OptionError, match="'0' has its weight and bias in groups"):
        split.step(x, y)
    # Frozen and unfrozen on the way.
    optimizer = VanillaDDP(model, criterion, batch="joint")
    model[2].weight.requires_grad_(False)
    kept = flat(model)
    optimizer.step(x, y)
    assert torch.equal(model[2].weight.reshape(-1), kept[16:28])
    model[2].weight.requires_grad_(True)
    optimizer.step(x, y)
    assert not torch.equal(model[2].weight.reshape(-1), kept[16:28])


def test_several_inputs_and_a_plain_function():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a, b):
            return torch.tanh(self.layer(a + b))

    model = Two()
    optimizer = VanillaDDP(model, lambda o, y, w: (w * (o - y).square().sum(1)).mean())
    x, y, w = torch.randn(5, 3), torch.rand(5, 2), torch.rand(5)
    before = float(optimizer.step((x, x), y, w))
    assert float(optimizer.step((x, x), y, w)) < before


def test_what_cannot_be_trained_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="leaves '1.weight' and 1 more as they are") as caught:
        optimizer = VanillaDDP(model, nn.CrossEntropyLoss())
    assert caught[0].filename == __file__
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert rows["0.weight"].treatment == "player" and not rows["0.weight"].reason
    assert rows["1.bias"].treatment == "untrained" and "not affine" in rows["1.bias"].reason
    kept = model[1].weight.clone()
    before = float(optimizer.step(torch.randn(4, 3), torch.arange(4) % 2))
    assert torch.equal(model[1].weight, kept) and math.isfinite(before) and optimizer.alpha > 0
    with pytest.raises(ocnopt.OptionError, match="no layer that VanillaDDP can train"):
        VanillaDDP(nn.LayerNorm(3), nn.MSELoss())


# --- refusals ------------------------------------------------------------------------------------


class Root(nn.Module):
    def forward(self, h):
        return h.abs().sqrt()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("input", "the input of layer '0' is not finite"),
        ("weight", "the output of layer '2' is not finite"),
        ("target", "the loss is not finite, though the output of layer '4' is"),
        ("derivative", "derivatives of the cost are not finite at layer '2'"),
    ],
)
@pytest.mark.parametrize(("dynamics_order", "damping"), [(1, 1e-3), (2, 0.0)])
def test_what_is_not_finite_is_named(kind, message, dynamics_order, damping):
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 2)
    )
    x, y = torch.randn(3, 3), torch.randn(3, 2)
    options = {"dynamics_order": dynamics_order, "damping": damping}
    optimizer = VanillaDDP(model, nn.MSELoss(), **options)
    optimizer.step(x, y)
    if kind == "input":
        x[1, 1] = float("nan")
    elif kind == "weight":
        model[2].weight.data[0, 0] = float("inf")
    elif kind == "target":
        y[0, 0] = float("inf")
    else:
        model[3] = Root()
        model[2].weight.data.zero_()
        model[2].bias.data.zero_()
    kept, state = flat(model), optimizer.state_dict()["state"]
    with pytest.raises(ocnopt.NonFiniteError, match=message):
        optimizer.step(x, y)
    assert torch.equal(flat(model), kept)
    assert optimizer.state_dict()["state"] == state


def test_a_trial_that_overflows_is_no_step():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    optimizer = VanillaDDP(
        model, ocnopt.Criterion(lambda o, y: (o.exp() - y * o).mean()), lr=1e4, backtracks=30
    )
    x, y = torch.ones(2, 1), torch.full((2, 1), 5.0)
    first = float(optimizer.step(x, y))
    assert 0 < optimizer.alpha < 0.01
    assert float(optimizer.step(x, y)) < first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0, but it must be finite and at least 0"),
        ({"lr": float("inf")}, "lr=inf, but it must be"),
        ({"damping": -0.1}, "damping=-0.1, but it must be"),
        ({"damping": True}, "damping=True, but it must be"),
        ({"state_reg": "x"}, "state_reg='x', but it must be"),
        ({"weight_decay": float("nan")}, "weight_decay=nan, but it must be"),
        ({"backtracks": -1}, "backtracks=-1, but it must be a whole number"),
        ({"backtracks": 1.5}, "backtracks=1.5, but it must be a whole number"),
        ({"dynamics_order": 3}, "dynamics_order=3, but it must be 1 or 2"),
        ({"batch": "sum"}, "batch='sum' is not known; choose one of mean, share, joint"),
        ({"params": [{"params": "0", "momentum": 0.9}]}, "no option 'momentum'"),
        ({"params": [{"params": "zero"}]}, "no parameter or module of the model is named 'zero'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ocnopt.OptionError, match=message):
        VanillaDDP(tanh_chain(), nn.MSELoss(), **options)


def test_misuse_is_explained():
    model, x, y, criterion = case("fc", 2)
    with pytest.raises(ocnopt.OptionError, match=r"expected an nn.Module, got generator"):
        VanillaDDP(model.parameters(), criterion)
    with pytest.raises(ocnopt.OptionError, match="expected a loss function, got float"):
        VanillaDDP(model, 0.1)
    optimizer = VanillaDDP(model, criterion)
    for arguments in ((), (lambda: 0.0,)):
        with pytest.raises(ocnopt.OptionError, match=r"call loss = optimizer.step\(x, y\)"):
            optimizer.step(*arguments)
    with pytest.raises(ocnopt.OptionError, match="must be one number; use reduction='mean'"):
        VanillaDDP(model, nn.CrossEntropyLoss(reduction="none")).step(x, y)
    with pytest.raises(ocnopt.OcnoptError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)


def test_too_large_is_refused_before_anything_is_formed():
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 200_000))
    criterion = nn.CrossEntropyLoss()
    optimizer = VanillaDDP(model, criterion, dynamics_order=1)
    with pytest.raises(ocnopt.GraphError) as caught:
        optimizer.step(torch.randn(2, 5), torch.tensor([0, 1]))
    text = str(caught.value)
    assert "layer '2'" in text and "800000 x 800000" in text and "DDPNOpt" in text, text


def test_no_chain_is_refused():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return h + self.b(h)

    with pytest.raises(ocnopt.GraphError, match=r"no chain.*DDPNOpt"):
        VanillaDDP(Skip(), nn.MSELoss()).step(torch.randn(2, 3), torch.randn(2, 3))


def test_float32_and_public_name():
    model, x, y, criterion = case("fc", 4)
    model, x = model.float(), x.float()
    optimizer = ocnopt.VanillaDDP(model, criterion, batch="joint")
    losses = [float(optimizer.step(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
