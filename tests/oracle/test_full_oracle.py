"""terminal="full" == Alg. 3 with a dense V_xx per sample: its regularisation and its second order.

The first part holds the oracle against autograd and closed forms and needs no package; the second
holds the package against the oracle; the third against itself and against a formula by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import random

import cases
import comparison
import pytest
import torch
from oracles import (
    Options,
    absolute_value,
    controls,
    ddp_step,
    distance,
    parameter_vector,
    player_of,
    positive_part,
    relative_error,
    row_losses,
    run_stage,
    terminal_derivatives,
)
from torch import Tensor, nn

ORDERS = (1, 2)
REGS = (0.0, 0.05)


# --- networks ------------------------------------------------------------------------------------


@cases.in_float64
def fc(activation: type[nn.Module], squared: bool, batch: int = 3) -> cases.Case:
    """Three players and one activation."""
    model = nn.Sequential(
        nn.Linear(3, 4), activation(), nn.Linear(4, 5), activation(), nn.Linear(5, 3)
    )
    cases.livelier(model, 1.6)
    x = torch.randn(batch, 3)
    if squared:
        return cases.Case(model, list(model), x, torch.randn(batch, 3), nn.MSELoss())
    return cases.Case(model, list(model), x, torch.arange(batch) % 3, nn.CrossEntropyLoss())


@cases.in_float64
def odd() -> cases.Case:
    """Nothing between two players, a dense stage between others, an activation at the end."""
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False),
        nn.Linear(4, 4),
        nn.Softmax(1),
        nn.Linear(4, 3),
        nn.Sigmoid(),
    )
    cases.livelier(model, 2.4)
    return cases.Case(model, list(model), torch.randn(3, 3), torch.rand(3, 3), nn.MSELoss())


BUILD = {
    "tanh": lambda: fc(nn.Tanh, False),
    "tanh, squared": lambda: fc(nn.Tanh, True),
    "sigmoid": lambda: fc(nn.Sigmoid, False),
    "sigmoid, squared": lambda: fc(nn.Sigmoid, True),
    "relu": lambda: fc(nn.ReLU, False),
    "relu, squared": lambda: fc(nn.ReLU, True),
    "mixed": cases.fc_chain,
    "odd": odd,
    "conv": cases.conv_chain,
}
FULLY_CONNECTED = tuple(name for name in BUILD if name != "conv")


@functools.cache
def shared(name: str) -> cases.Case:
    """A case that no test changes: its Jacobians are computed once."""
    return BUILD[name]()


def full(preconditioner: str = "identity", **others) -> Options:
    return cases.options_for(preconditioner, **{"terminal": "full", **others})


def new_options(options: Options) -> dict:
    """What `comparison` does not hand over by itself."""
    return {"value_reg": options.value_reg, "dynamics_order": options.dynamics_order}


def package_step(case: cases.Case, options: Options, parts=None) -> dict[str, Tensor]:
    return comparison.package_step(case, options, parts, **new_options(options))


def covering(axes: dict[str, tuple], groups: list[tuple[str, ...]]) -> list[dict]:
    """Few settings of all `axes` among which the names of each group meet in all their values."""
    draw = random.Random(0)
    wanted = {
        tuple(zip(group, values, strict=True)): None
        for group in groups
        for values in itertools.product(*(axes[name] for name in group))
    }
    rows = []
    while wanted:
        fixed = dict(next(iter(wanted)))
        tries = [{**{n: draw.choice(v) for n, v in axes.items()}, **fixed} for _ in range(50)]

        def met(row: dict) -> list[tuple]:
            every = (tuple((n, row[n]) for n in group) for group in groups)
            return [one for one in every if one in wanted]

        rows.append(max(tries, key=lambda row: len(met(row))))
        for one in met(rows[-1]):
            del wanted[one]
    return rows


OPTIONS = {
    "dynamics_order": ORDERS,
    "bellman": cases.RECURSIONS,
    "rollout": cases.ROLLOUTS,
    "preconditioner": cases.PRECONDITIONERS,
    "value_reg": REGS,
    "feedback_clip": (None, 0.5, 0.02),
}


# --- the oracle: second order --------------------------------------------------------------------


def remainder(case: cases.Case, k: int, i: int):
    """phi_i as a function of the flat state at stage k's input and stage k's parameters."""
    state = case.table[k][i].state

    def cost(x: Tensor, u: Tensor | None) -> Tensor:
        out = run_stage(case.stages[k], x.reshape(state.shape), u)
        for stage in case.stages[k + 1 :]:
            out = stage(out)
        return case.phi(out, i)

    return cost


@pytest.mark.parametrize("network", BUILD)
def test_lemma_6(network):
    """Where Q_ux counts as zero, V_x and V_xx are the cost's gradient and Hessian in the hidden
    state (Eq. 25), and Q_u, Q_ux (Eq. 26) its derivatives in the parameters."""
    case = shared(network)
    result = case.chain_step(full(bellman="off", dynamics_order=2))
    first = case.chain_step(full(bellman="off"))
    further = 0.0
    for k, stage in enumerate(case.stages):
        player = player_of(stage)
        for i in range(len(case.x)):
            cost, x = remainder(case, k, i), case.table[k][i].state.reshape(-1)
            n = len(x)
            u = torch.empty(0) if player is None else parameter_vector(player)

            def joint(point: Tensor, cost=cost, n=n, player=player) -> Tensor:
                return cost(point[:n], None if player is None else point[n:])

            gradient = torch.autograd.functional.jacobian(joint, torch.cat([x, u]))
            hessian = torch.autograd.functional.hessian(joint, torch.cat([x, u]))
            here = result.stages[k]
            assert relative_error(here.V_x[i], gradient[:n]) < 1e-12
            assert relative_error(here.V_xx[i], hessian[:n, :n]) < 1e-11
            further = max(further, distance_of(first.stages[k].V_xx[i], hessian[:n, :n]))
            if player is not None:
                assert relative_error(here.Q_u[i], gradient[n:]) < 1e-12
                assert relative_error(here.Q_ux[i], hessian[n:, :n]) < 1e-11
    bends = not network.startswith("relu")
    assert (further > 1e-2) == bends, "the first order is exact where every stage is linear in x"


def distance_of(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


@pytest.mark.parametrize("network", FULLY_CONNECTED)
def test_the_mixed_term_is_an_outer_product(network):
    """(V_h . g_ux) dx = V_h [dx; 0]^T (Eq. 27): apart from V_hh, what the second order adds."""
    case = shared(network)
    result = case.chain_step(full(bellman="off", dynamics_order=2))
    values = [r.V_x for r in result.stages[1:]], [r.V_xx for r in result.stages[1:]]
    ends = [terminal_derivatives(case.phi, r.output, i) for i, r in enumerate(case.table[-1])]
    V_x = [*values[0], [g for g, _ in ends]]
    V_xx = [*values[1], [h for _, h in ends]]
    for k, stage in enumerate(case.stages):
        if player_of(stage) is None:
            continue
        for i, row in enumerate(case.table[k]):
            dx = torch.randn(row.state.numel())
            a, h_change = row.state.reshape(-1), V_xx[k][i] @ stage.weight.detach() @ dx
            weight = torch.outer(h_change, a) + torch.outer(V_x[k][i], dx)
            expected = weight.reshape(-1)
            if stage.bias is not None:
                expected = torch.cat([expected, h_change])
            assert relative_error(result.stages[k].Q_ux[i] @ dx, expected) < 1e-11


@pytest.mark.parametrize("bellman", ("sample", "share"))
def test_the_recursion_minimises_the_expansion(bellman):
    """At the last player V is the minimum over du of the quadratic model of
    phi(g(x, u)) + |du|^2 / (2 lr), times B for a share, as a function of dx."""
    case, lr = shared("tanh"), 0.8
    batch, k = len(case.x), len(case.stages) - 1
    options = full(bellman=bellman, dynamics_order=2, lr=lr)
    record = case.chain_step(options).stages[k]
    for i in range(batch):
        cost, x = remainder(case, k, i), case.table[k][i].state.reshape(-1)
        n, u = len(x), parameter_vector(case.stages[k])
        price = (batch if bellman == "share" else 1) / (2 * lr)

        def joint(e: Tensor, cost=cost, x=x, u=u, n=n, price=price) -> Tensor:
            return cost(x + e[:n], u + e[n:]) + price * e[n:] @ e[n:]

        zero = torch.zeros(n + len(u))
        gradient = torch.autograd.functional.jacobian(joint, zero)
        hessian = torch.autograd.functional.hessian(joint, zero)

        def value(dx: Tensor, gradient=gradient, hessian=hessian, n=n) -> Tensor:
            du = -torch.linalg.solve(hessian[n:, n:], gradient[n:] + hessian[n:, :n] @ dx)
            e = torch.cat([dx, du])
            return gradient @ e + 0.5 * e @ hessian @ e

        slope = torch.autograd.functional.jacobian(value, zero[:n])
        curvature = torch.autograd.functional.hessian(value, zero[:n])
        assert relative_error(record.V_x[i], slope) < 1e-11
        assert relative_error(record.V_xx[i], curvature) < 1e-11


def test_positive_part():
    """A = A_+ - (-A)_+ with both parts positive semidefinite and orthogonal to each other."""
    a = torch.randn(5, 5)
    a = a + a.T
    above, below = positive_part(a), positive_part(-a)
    assert relative_error(above - below, a) < 1e-12
    assert torch.linalg.eigvalsh(a).min() < -0.1
    for part in (above, below):
        assert torch.linalg.eigvalsh(part).min() > -1e-12
    assert (above @ below).abs().max() < 1e-12
    assert relative_error(absolute_value(a) @ absolute_value(a), a @ a) < 1e-12


@pytest.mark.parametrize("bellman", cases.RECURSIONS)
def test_the_second_order_needs_the_absolute_value(bellman):
    """V_xx gets negative eigenvalues at order 2 alone; Q_uu, of an absolute value, never does."""
    lowest = {order: 0.0 for order in ORDERS}
    for network, order in itertools.product(("tanh, squared", "sigmoid", "conv"), ORDERS):
        result = shared(network).chain_step(full(bellman=bellman, dynamics_order=order))
        eigenvalues = [torch.linalg.eigvalsh(v) for r in result.stages for v in r.V_xx]
        lowest[order] = min(lowest[order], *(float(e.min()) for e in eigenvalues))
    assert lowest[2] < -1e-2
    assert lowest[1] > -1e-12 or bellman == "literal"


def test_the_bound_at_second_order():
    """|s Q_ux dx| <= bound |Q_u| in the norm of M^-1, with equality where s < 1."""
    options = full(dynamics_order=2, feedback_clip=0.05, preconditioner="rmsprop", lr=0.02)
    result, seen = shared("mixed").chain_step(options), set()
    for record in result.stages:
        if record.M is None:
            continue
        root = record.M.diagonal().rsqrt()
        for Q_u, Q_ux, dx, s in zip(
            record.Q_u, record.Q_ux, record.dx, record.scale, strict=bool(record.Q_u)
        ):
            ratio = s * (root * (Q_ux @ dx)).norm() / (0.05 * (root * Q_u).norm())
            assert ratio <= 1 + 1e-12
            assert s == 1 or ratio == pytest.approx(1)
            seen.add(s < 1)
    assert seen == {True, False}


def test_a_batch_of_one():
    """share == sample when the sample is the batch, at either order."""
    case = fc(nn.Tanh, True, batch=1)
    for order in ORDERS:
        share, sample = (
            case.chain_step(full(bellman=bellman, dynamics_order=order, value_reg=0.05)).new
            for bellman in ("share", "sample")
        )
        assert distance(share, sample) < 1e-12


# --- the oracle: regularisation ------------------------------------------------------------------


@pytest.mark.parametrize("network", ("mixed", "conv"))
@pytest.mark.parametrize("bellman", cases.RECURSIONS)
def test_without_either_it_is_gauss_newton(bellman, network):
    """value_reg=0 and first-order dynamics: nothing but the exact terminal Hessian."""
    case = shared(network)
    for rollout, clip in itertools.product(cases.ROLLOUTS, (None, 0.02)):
        options = full(bellman=bellman, rollout=rollout, feedback_clip=clip)
        other = dataclasses.replace(options, terminal="gauss-newton")
        step, known = case.chain_step(options).new, case.chain_step(other).new
        assert distance(step, known) < 1e-12


@pytest.mark.parametrize("network", BUILD)
def test_regularisation_adds_up_over_players(network):
    """bellman="off": V_xx = J^T phi_xx J + eps sum_s J_s^T J_s, with J_s = dx_s/dx for the inputs
    x_s of this and the later players; V_x takes no notice."""
    case, eps = shared(network), 0.05
    plain = case.chain_step(full(bellman="off"))
    result = case.chain_step(full(bellman="off", value_reg=eps))
    for i in range(len(case.x)):
        for k in range(len(case.stages)):
            state = case.table[k][i].state
            jacobian, total = torch.eye(state.numel()), torch.zeros(state.numel())
            for j in range(k, len(case.stages)):
                if player_of(case.stages[j]) is not None:
                    total = total + eps * jacobian.T @ jacobian
                jacobian = case.table[j][i].f_x @ jacobian
            hessian = terminal_derivatives(case.phi, case.table[-1][i].output, i)[1]
            bare = jacobian.T @ hessian @ jacobian
            assert relative_error(plain.stages[k].V_xx[i], bare) < 1e-11
            assert relative_error(result.stages[k].V_xx[i], bare + total) < 1e-11
            assert relative_error(result.stages[k].V_x[i], plain.stages[k].V_x[i]) < 1e-14


@pytest.mark.parametrize("network", ("mixed", "odd", "conv"))
def test_every_choice_makes_a_different_step(network):
    """Two settings with the same step could not be told apart by a comparison."""
    case, steps = shared(network), {}
    bound = {"mixed": 0.01, "odd": 2e-3, "conv": 0.02}[network]
    for setting in itertools.product(cases.RECURSIONS, ORDERS, REGS, (None, bound)):
        bellman, order, eps, clip = setting
        options = full(bellman=bellman, dynamics_order=order, value_reg=eps, feedback_clip=clip)
        steps[setting] = case.chain_step(options).new
    for (a, one), (b, other) in itertools.combinations(steps.items(), 2):
        assert distance(one, other) > 1e-7, (a, b, distance(one, other))


# --- the package against the oracle --------------------------------------------------------------


def check(case: cases.Case, options: Options) -> None:
    expected = case.chain_step(options)
    comparison.assert_same_step(case, package_step(case, options), expected.new)


@pytest.mark.parametrize(
    "row",
    covering(
        {"network": FULLY_CONNECTED, **OPTIONS},
        [*itertools.combinations(OPTIONS, 3), *(("network", name) for name in OPTIONS)],
    ),
    ids=lambda row: " ".join(map(str, row.values())),
)
def test_fully_connected(row):
    """Any three options in any values, and each network with each value of each."""
    others = dict(row)
    check(shared(others.pop("network")), full(**others))


@pytest.mark.parametrize(
    "row",
    covering(OPTIONS, list(itertools.combinations(OPTIONS, 2))),
    ids=lambda row: " ".join(map(str, row.values())),
)
def test_convolutional(row):
    """Stride, padding, both poolings, flattening, a 1x1 convolution without bias."""
    check(shared("conv"), full(**row))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS)
def test_several_steps(preconditioner, order):
    """M's state, momentum and weight decay from step to step, on a new batch each time."""
    case = fc(nn.Tanh, False)
    options = full(
        preconditioner,
        dynamics_order=order,
        value_reg=0.05,
        feedback_clip=0.1,
        momentum=0.0 if preconditioner == "adam" else 0.9,
        weight_decay=0.01,
    )
    optimizer = comparison.optimizer_for(
        case.model, case.criterion, options, **new_options(options)
    )
    memory: dict[int, dict] = {}
    for step in range(3):
        x, y = torch.randn(3, 3), torch.randint(3, (3,))
        phi = row_losses(case.criterion, case.model(x), y)
        expected = ddp_step(case.stages, x, phi, options, memory)
        before = {p: p.detach().clone() for p in case.model.parameters()}
        comparison.train_step(optimizer, case.model, case.criterion, x, y)
        for name, p in case.model.named_parameters():
            change, want = p.detach() - before[p], expected.new[p] - before[p]
            assert relative_error(change, want) < 1e-8, (step, name)


# --- the package against itself ------------------------------------------------------------------


@pytest.mark.parametrize("rollout", cases.ROLLOUTS)
@pytest.mark.parametrize("bellman", cases.RECURSIONS)
@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS)
def test_plain_full_is_gauss_newton(preconditioner, bellman, rollout):
    """Dense matrices or back-propagated columns of the Hessian's factor: the same steps."""
    case = fc(nn.Tanh, False)
    options = full(preconditioner, bellman=bellman, rollout=rollout, feedback_clip=0.02)
    other = dataclasses.replace(options, terminal="gauss-newton")
    models = [copy.deepcopy(case.model) for _ in range(2)]
    optimizers = [
        comparison.optimizer_for(models[0], case.criterion, options, **new_options(options)),
        comparison.optimizer_for(models[1], case.criterion, other),
    ]
    start = parameter_vector(case.model)
    for _ in range(3):
        x, y = torch.randn(3, 3), torch.randint(3, (3,))
        for model, optimizer in zip(models, optimizers, strict=True):
            comparison.train_step(optimizer, model, case.criterion, x, y)
        moved, known = (parameter_vector(model) - start for model in models)
        assert relative_error(moved, known) < 1e-10


@pytest.mark.parametrize("parts", ([2, 2], [3, 1]))
@pytest.mark.parametrize("bellman", ("share", "joint"))
@pytest.mark.parametrize("preconditioner", ("identity", "adam", "kfac"))
def test_accumulation(preconditioner, bellman, parts):
    """Pieces of a batch, each with its share of the loss, make the whole batch's step."""
    case = fc(nn.Tanh, False, batch=4)
    for order, rollout in ((1, "linear"), (2, "linear"), (2, "nonlinear")):
        options = full(
            preconditioner,
            bellman=bellman,
            rollout=rollout,
            dynamics_order=order,
            value_reg=0.05,
            feedback_clip=0.1,
        )
        whole = package_step(case, options)
        named = {p: whole[name] for name, p in case.model.named_parameters()}
        pieces = package_step(case, options, parts)
        comparison.assert_same_step(case, pieces, named, tolerance=1e-10)
        comparison.assert_same_step(case, pieces, case.chain_step(options).new)


@pytest.mark.parametrize("activation", (nn.Tanh, nn.Sigmoid))
def test_the_second_order_direction_by_hand(activation):
    """M = I, no recursion, no bound, linear rollout: the direction of a player is
    mean_i( V_hh g_x dx [x; 1]^T + V_h [x + dx; 1]^T ), the outer product at the new input."""
    case, lr = fc(activation, False), 0.8
    options = full(bellman="off", dynamics_order=2, lr=lr)
    after = package_step(case, options)
    change = {name: after[name] - p.detach() for name, p in case.model.named_parameters()}
    batch, feedback = len(case.x), 0.0
    for k, layer in enumerate(case.model):
        if not controls(layer):
            continue
        expected = torch.zeros(layer.out_features, layer.in_features + 1)
        for i in range(batch):
            x, dx = input_and_change(case, k, i, change)
            h = layer(x).detach()

            def cost(h: Tensor, i=i, k=k) -> Tensor:
                return case.phi(case.model[k + 1 :](h[None]), i)

            V_h = torch.autograd.functional.jacobian(cost, h)
            V_hh = torch.autograd.functional.hessian(cost, h)
            one = torch.ones(1)
            own = torch.outer(V_hh @ layer.weight.detach() @ dx, torch.cat([x, one]))
            moved = torch.outer(V_h, torch.cat([x + dx, one]))
            expected += (own + moved) / batch
            feedback = max(feedback, float(torch.outer(V_h, dx).norm()))
        direction = -torch.cat([change[f"{k}.weight"], change[f"{k}.bias"][:, None]], 1) / lr
        assert relative_error(direction, expected) < 1e-9
    assert feedback > 1e-3


def input_and_change(
    case: cases.Case, k: int, i: int, change: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What layer k reads for sample i, and its first-order change under the updates before it."""
    x = case.x[i]
    if k == 0:
        return x, torch.zeros_like(x)
    before = case.model[:k]
    nominal = {name: p.detach() for name, p in before.named_parameters()}
    tangent = {name: change[name] for name in nominal}
    return torch.func.jvp(
        lambda parameters: torch.func.functional_call(before, parameters, (x,)),
        (nominal,),
        (tangent,),
    )
