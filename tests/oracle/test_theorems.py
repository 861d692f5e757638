"""The propositions that the papers rest on: by the package's steps where those show them.

Sources: Propositions 2 and 3 and Lemma 5 of DDPNOpt (Liu, Chen, Theodorou, ICLR 2021); Theorem 1
of OCNOpt (Liu, Chen, Theodorou, arXiv 2510.14168).
"""

from __future__ import annotations

import copy

import cases
import comparison
import pytest
import torch
from oracles import (
    Options,
    distance,
    parameter_vector,
    player_of,
    relative_error,
    run_stage,
    second_order_backward,
    split_vector,
    terminal_derivatives,
)
from torch import Tensor, nn
from torch.func import jacrev

import ocnopt


def states_of(stages: list[nn.Module], x: Tensor) -> list[Tensor]:
    """x_0 to x_T of one sample, each a leaf that remembers the graph from the one before."""
    states = [x.detach().requires_grad_()]
    for stage in stages:
        states.append(stage(states[-1]))
    return states


# --- Proposition 2 -------------------------------------------------------------------------------


def linear_cost(outputs: Tensor, target: Tensor) -> Tensor:
    """A terminal cost without curvature: phi_xx = 0, hence Q_ux = 0 at every stage."""
    return (outputs * target).sum() / len(outputs)


LENDERS = {
    "identity": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
}
LENDER_OPTIONS = {
    "identity": {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01},
    "rmsprop": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01},
    "adam": {"lr": 0.01, "weight_decay": 0.01},
}


@pytest.mark.parametrize("preconditioner", LENDERS)
@pytest.mark.parametrize(
    "switches",
    [
        {"bellman": "off", "rollout": "off"},
        *(
            {"bellman": bellman, "rollout": rollout, "terminal": terminal}
            for bellman in ("literal", "sample", "share", "joint")
            for rollout in ("linear", "nonlinear")
            for terminal in ("gauss-newton", "matched")
        ),
    ],
    ids=lambda switches: " ".join(switches.values()),
)
def test_proposition_2_package(switches, preconditioner):
    """Where every Q_ux vanishes, DDPNOpt *is* the optimizer that lent M, with every switch on.

    With ``bellman="off", rollout="off"`` Q_ux is dropped whatever the cost; otherwise the cost is
    linear in the output, so that V_xx, and with it Q_ux, is zero throughout.
    """
    dropped = switches["bellman"] == "off"
    criterion = nn.CrossEntropyLoss() if dropped else ocnopt.Criterion(linear_cost)
    case = cases.fc_chain(criterion)
    other = copy.deepcopy(case.model)
    mine = ocnopt.DDPNOpt(
        case.model,
        criterion,
        preconditioner=preconditioner,
        **LENDER_OPTIONS[preconditioner],
        **switches,
    )
    theirs = LENDERS[preconditioner](other.parameters())
    start = parameter_vector(case.model)
    for _ in range(5):
        x = torch.randn(3, 3)
        y = torch.randint(3, (3,)) if dropped else torch.randn(3, 3)
        comparison.train_step(mine, case.model, criterion, x, y)
        comparison.train_step(theirs, other, criterion, x, y)
        moved = parameter_vector(other) - start
        assert relative_error(parameter_vector(case.model) - start, moved) < 1e-10


def test_proposition_2_needs_its_premise():
    """The same switches with a curved cost leave the lender's step: the test above can fail."""
    case = cases.fc_chain()
    options = Options(lr=0.2, terminal="gauss-newton")
    baseline = Options(lr=0.2, bellman="off", rollout="off")
    steps = [case.chain_step(o) for o in (options, baseline)]
    assert distance(steps[0].new, steps[1].new) > 1e-2
    assert any(float(q.abs().max()) > 1e-2 for stage in steps[0].stages for q in stage.Q_ux)


def hessian_in_player(
    stages: list[nn.Module], k: int, x: Tensor, phi, i: int
) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of sample i's cost in the parameters of stage k alone, by autograd."""
    player = player_of(stages[k])
    u = parameter_vector(player)

    def cost(v: Tensor) -> Tensor:
        state = x[i : i + 1]
        for j, stage in enumerate(stages):
            state = run_stage(stage, state, v if j == k else None)
        return phi(state, i)

    return (
        torch.autograd.functional.jacobian(cost, u),
        torch.autograd.functional.hessian(cost, u),
    )


def test_proposition_2():
    """Q_ux = 0 => V_x = J_x, Q_u = J_u, Q_uu = J_uu (Eq. 10), policy = stage-wise Newton."""
    case = cases.fc_chain()
    stages = [
        m for m in case.stages if not isinstance(m, nn.ReLU)
    ]  # smooth, so that J has a Hessian
    outputs = nn.Sequential(*stages)(case.x)
    assert outputs.shape == (3, 3)
    for i in range(len(case.x)):
        states = states_of(stages, case.x[i : i + 1])
        J_x = torch.autograd.grad(case.phi(states[-1], i), states)
        collapsed = second_order_backward(stages, case.x, case.phi, i, drop_q_ux=True)
        seen = 0
        for k, (stage, terms) in enumerate(zip(stages, collapsed, strict=True)):
            assert relative_error(terms.Q_x, J_x[k].reshape(-1)) < 1e-10
            if player_of(stage) is None:
                continue
            J_u, J_uu = hessian_in_player(stages, k, case.x, case.phi, i)
            assert relative_error(terms.Q_u, J_u) < 1e-10
            assert relative_error(terms.Q_uu, J_uu) < 1e-9
            damped = J_uu + 0.1 * torch.eye(len(J_u))  # J_uu is singular in a layer's parameters
            newton = -torch.linalg.solve(damped, J_u)
            policy = -torch.linalg.solve(terms.Q_uu + 0.1 * torch.eye(len(J_u)), terms.Q_u)
            assert relative_error(policy, newton) < 1e-8
            seen += 1
        assert seen == 4
        # the premise counts: Q_ux itself is not zero here, keeping it gives other values
        assert max(float(t.Q_ux.abs().max()) for t in collapsed if t.Q_ux is not None) > 1e-2


# --- Proposition 3 -------------------------------------------------------------------------------


def factorised_step(case: cases.Case, lr: float, factors: list[Tensor]) -> dict:
    """Eq. 16 and 17 as printed, rank r: only q_u, q_x and z are formed; M = I, Q_uu = I/lr.

    `factors` are the Z_T (n, r) of the samples, phi_xx = Z_T Z_T^T; the policy is applied with the
    linear state differential.
    """
    stages, table, batch = case.stages, case.table, len(case.x)
    V_x = [terminal_derivatives(case.phi, r.output, i)[0] for i, r in enumerate(table[-1])]
    z = list(factors)
    policy: list[list[tuple[Tensor, Tensor, Tensor]] | None] = [None] * len(stages)
    for k in reversed(range(len(stages))):
        q_x = [r.f_x.T @ zi for r, zi in zip(table[k], z, strict=True)]
        Q_x = [r.f_x.T @ v for r, v in zip(table[k], V_x, strict=True)]
        if player_of(stages[k]) is None:
            z, V_x = q_x, Q_x
            continue
        q_u = [r.f_u.T @ zi for r, zi in zip(table[k], z, strict=True)]
        Q_u = [r.f_u.T @ v for r, v in zip(table[k], V_x, strict=True)]
        policy[k] = list(zip(Q_u, q_u, q_x, strict=True))
        rest = [torch.eye(q.shape[1]) - lr * q.T @ q for q in q_u]
        roots = []
        for matrix in rest:
            eigenvalues, vectors = torch.linalg.eigh(matrix)
            assert eigenvalues.min() > 0, "Eq. 17 asks for q_u^T Q_uu^-1 q_u < 1"
            roots.append(vectors @ torch.diag(eigenvalues.sqrt()) @ vectors.T)
        V_x = [a - lr * x_ @ (u_.T @ b) for a, x_, u_, b in zip(Q_x, q_x, q_u, Q_u, strict=True)]
        z = [x_ @ root for x_, root in zip(q_x, roots, strict=True)]
    new: dict[nn.Parameter, Tensor] = {}
    dx = [torch.zeros(r.state.numel()) for r in table[0]]
    for k, stage in enumerate(stages):
        du = None
        if policy[k] is not None:
            d = sum(
                Q_u + q_u @ (q_x.T @ e) for (Q_u, q_u, q_x), e in zip(policy[k], dx, strict=True)
            )
            du = -lr * d / batch
            player = player_of(stage)
            values = split_vector(player, parameter_vector(player) + du)
            new.update({p: values[name] for name, p in player.named_parameters()})
        dx = [
            r.f_x @ e + (0 if du is None else r.f_u @ du) for r, e in zip(table[k], dx, strict=True)
        ]
    return new


def softmax_factor(outputs: Tensor) -> Tensor:
    """Z = diag(sqrt p) - p sqrt(p)^T, whose Z Z^T is cross-entropy's Hessian."""
    p = outputs.softmax(-1)
    return torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())


@pytest.mark.parametrize("build", [cases.fc_chain, cases.conv_chain])
@pytest.mark.parametrize("terminal", ["outer-product", "gauss-newton"])
def test_proposition_3(terminal, build):
    """phi_xx = Z Z^T => Q_ux = q_u q_x^T, Q_xx = q_x q_x^T, V_xx = z z^T throughout (Eq. 16, 17).

    The factorised recursion, the dense one and the package take the same step; rank 1 as printed,
    and rank r = number of classes, where the square root becomes that of an r x r matrix.
    """
    case = build()
    factors = []
    for i, row in enumerate(case.table[-1]):
        gradient, hessian = terminal_derivatives(case.phi, row.output, i)
        if terminal == "outer-product":
            factors.append(gradient[:, None])
        else:
            factors.append(softmax_factor(row.output.reshape(-1)))
            assert relative_error(factors[-1] @ factors[-1].T, hessian) < 1e-12
    lr = 0.05
    options = Options(lr=lr, terminal=terminal, bellman="literal")
    dense = case.chain_step(options)
    factorised = factorised_step(case, lr, factors)
    assert distance(factorised, dense.new) < 1e-12
    without = case.chain_step(Options(lr=lr, bellman="off", rollout="off"))
    assert distance(dense.new, without.new) > 1e-3
    comparison.assert_same_step(case, comparison.package_step(case, options), factorised)
    # V_xx keeps the terminal rank at every stage
    rank = factors[0].shape[1] if terminal == "outer-product" else factors[0].shape[1] - 1
    for stage in dense.stages:
        for V_xx in stage.V_xx:
            eigenvalues = torch.linalg.eigvalsh(V_xx).flip(0)
            assert eigenvalues[rank - 1 :][0] > 0
            assert eigenvalues[rank:].abs().max() < 1e-12


# --- Theorem 1 -----------------------------------------------------------------------------------


def minimise_quadratic(q, size: int) -> Tensor:
    """argmin of a strictly convex quadratic, by one Newton step from elsewhere."""
    start = torch.ones(size)
    gradient = torch.autograd.functional.jacobian(q, start)
    hessian = torch.autograd.functional.hessian(q, start)
    return start - torch.linalg.solve(hessian, gradient)


@pytest.mark.parametrize("preconditioner", ["identity", "rmsprop"])
def test_theorem_1(preconditioner):
    """BP = DP with Q_k(dx, dtheta) ~ Q + Q_x dx + Q_theta dtheta + (1/2 eta) |dtheta|^2_M.

    The expansion is minimised numerically at every stage; its value's gradient is
    back-propagation's state gradient dL/dx_k, its minimiser is the baseline's step, and both are
    the package's with feedback off.
    """
    case, lr = cases.fc_chain(), 0.3
    batch = len(case.x)
    V_x = [terminal_derivatives(case.phi, r.output, i)[0] for i, r in enumerate(case.table[-1])]
    minimisers: dict[int, Tensor] = {}
    gradients: list[list[Tensor]] = []
    for k in reversed(range(len(case.stages))):
        rows, player = case.table[k], player_of(case.stages[k])
        if player is not None:
            Q_theta = sum(r.f_u.T @ v for r, v in zip(rows, V_x, strict=True)) / batch
            m = torch.ones_like(Q_theta)
            if preconditioner == "rmsprop":
                m = (0.01 * Q_theta**2).sqrt() + 1e-8

            def expansion(dtheta: Tensor, Q_theta=Q_theta, m=m) -> Tensor:
                return Q_theta @ dtheta + (m * dtheta**2).sum() / (2 * lr)

            minimisers[k] = minimise_quadratic(expansion, len(Q_theta))
        new = []
        for r, v in zip(rows, V_x, strict=True):
            du = None if player is None else minimisers[k]

            def value(dx: Tensor, r=r, v=v, du=du) -> Tensor:
                """V_k near x_k: the expansion at its minimiser, which does not depend on dx."""
                control = 0.0 if du is None else v @ (r.f_u @ du)
                return v @ (r.f_x @ dx) + control

            new.append(jacrev(value)(torch.zeros(r.state.numel())))
        V_x = new
        gradients.insert(0, V_x)
    for i in range(batch):
        states = states_of(case.stages, case.x[i : i + 1])
        J_x = torch.autograd.grad(case.phi(states[-1], i), states)
        for k in range(len(case.stages)):
            assert relative_error(gradients[k][i], J_x[k].reshape(-1)) < 1e-12
    expected = {}
    for k, du in minimisers.items():
        player = player_of(case.stages[k])
        values = split_vector(player, parameter_vector(player) + du)
        expected.update({p: values[name] for name, p in player.named_parameters()})
    off = Options(lr=lr, preconditioner=preconditioner, bellman="off", rollout="off")
    comparison.assert_same_step(case, comparison.package_step(case, off), expected)
    # Keeping Q_theta,x and Q_xx gives another method: the theorem is about the first order.
    on = Options(lr=lr, preconditioner=preconditioner, bellman="share", rollout="linear")
    kept = case.chain_step(on)
    assert distance(kept.new, expected) > 1e-2


# --- Lemma 5 -------------------------------------------------------------------------------------


def hamiltonian(stage: nn.Module, state: Tensor, p_next: Tensor, u: Tensor | None) -> Tensor:
    """H_t = p_{t+1}^T f_t(x_t, u_t), without the running cost (Eq. 20)."""
    return (p_next * run_stage(stage, state, u)).sum()


@pytest.mark.parametrize("build", [cases.fc_chain, cases.conv_chain])
def test_lemma_5_adjoint_equation(build):
    """p_t = dL/dx_t of back-propagation satisfies p_t = dH/dx_t, p_T = phi_x (Eq. 19b), and
    u - eta dH/du is the gradient step (Eq. 22), which is DDPNOpt's step without feedback."""
    case, lr = build(), 0.3
    batch = len(case.x)
    slope = {k: torch.zeros(0) for k in range(len(case.stages))}
    for i in range(batch):
        states = states_of(case.stages, case.x[i : i + 1])
        p = torch.autograd.grad(case.phi(states[-1], i), states)  # back-propagation
        end = terminal_derivatives(case.phi, states[-1], i)[0]
        assert relative_error(p[-1].reshape(-1), end) < 1e-12
        for k, stage in enumerate(case.stages):
            player = player_of(stage)
            u = None if player is None else parameter_vector(player)
            state = states[k].detach().requires_grad_()
            H = hamiltonian(stage, state, p[k + 1], u)
            assert relative_error(torch.autograd.grad(H, state)[0], p[k]) < 1e-12
            if player is not None:
                v = u.clone().requires_grad_()
                H_u = torch.autograd.grad(hamiltonian(stage, state.detach(), p[k + 1], v), v)[0]
                slope[k] = H_u if i == 0 else slope[k] + H_u
    expected = {}
    for k, stage in enumerate(case.stages):
        player = player_of(stage)
        if player is not None:
            values = split_vector(player, parameter_vector(player) - lr * slope[k] / batch)
            expected.update({p: values[name] for name, p in player.named_parameters()})
    off = Options(lr=lr, bellman="off", rollout="off")
    comparison.assert_same_step(case, comparison.package_step(case, off), expected)


def test_lemma_5_gradient_descent_solves_the_minimum_condition():
    """Iterated, the step without feedback reaches u_t = argmin_v H_t(x_t, p_{t+1}, v) (Eq. 19c).

    With l_t = (gamma/2)|u|^2 and layers affine in u, H is strictly convex in u: its minimiser at
    the final trajectory is -E[g_u^T p]/gamma, and the weights must have come to stand there.
    """
    gamma, lr = 0.1, 0.5
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    criterion = nn.MSELoss()
    optimizer = ocnopt.DDPNOpt(
        model, criterion, lr=lr, bellman="off", rollout="off", weight_decay=gamma
    )

    def gap() -> float:
        """Distance of the controls to the minimiser of the Hamiltonian at their own trajectory."""
        hidden = model[1](model[0](x))
        out = model[2](hidden)
        p_out = torch.autograd.grad(criterion(out, y), out, retain_graph=True)[0]
        p_pre = (p_out @ model[2].weight) * (1 - hidden**2)
        total = 0.0
        for layer, a, p in ((model[0], x, p_pre), (model[2], hidden.detach(), p_out)):
            p = p.detach()
            best_weight, best_bias = -(p.T @ a) / gamma, -p.sum(0) / gamma
            total += float((layer.weight.detach() - best_weight).norm())
            total += float((layer.bias.detach() - best_bias).norm())
        return total

    first = gap()
    for _ in range(1200):
        comparison.train_step(optimizer, model, criterion, x, y)
    assert first > 1
    assert gap() < 1e-5
    assert model[2].weight.norm() > 1, "not the trivial minimum"
