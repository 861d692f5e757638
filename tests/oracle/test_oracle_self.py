"""The oracles against each other, autograd and closed forms, before they judge anything."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from oracles import (
    Options,
    directional_loss_change,
    distance,
    relative_error,
    row_losses,
    terminal_derivatives,
)
from torch import nn

CHAIN = {
    "fc": cases.fc_chain,
    "conv": cases.conv_chain,
    "grouped conv": lambda: cases.conv_chain(groups=2),
    "identity shortcut": lambda: cases.residual(False),
    "projection": lambda: cases.residual(True),
    "branches": cases.branching,
}


@pytest.mark.parametrize("name", CHAIN)
def test_stages_compute_what_the_model_computes(name):
    case = CHAIN[name]()
    ends = torch.cat([row.output for row in case.table[-1]])
    assert relative_error(ends, case.model(case.x)) < 1e-12


@pytest.mark.parametrize("name", CHAIN)
def test_value_gradient_without_recursion_is_autograd(name):
    case = CHAIN[name]()
    result = case.chain_step(Options(lr=0.3, bellman="off", rollout="off"))
    loss = case.criterion(case.model(case.x), case.y)
    for p, g in zip(
        case.model.parameters(),
        torch.autograd.grad(loss, list(case.model.parameters())),
        strict=True,
    ):
        assert relative_error(p.detach() - result.new[p], 0.3 * g) < 1e-10


@pytest.mark.parametrize(
    ("name", "preconditioner"),
    [
        (name, preconditioner)
        for name, preconditioner in itertools.product(CHAIN, cases.PRECONDITIONERS)
        if name != "grouped conv" or "kfac" not in preconditioner  # no factors specified there
    ],
)
def test_dense_recursion_equals_coefficients(name, preconditioner):
    """Alg. 3 with dense matrices == back-propagated columns with r x r coefficients (Prop. 3)."""
    case = CHAIN[name]()
    recursions = cases.RECURSIONS if name == "fc" else ("share", "joint")
    for terminal, bellman, clip in itertools.product(cases.TERMINALS, recursions, (None, 0.1)):
        options = cases.options_for(
            preconditioner,
            terminal=terminal,
            bellman=bellman,
            feedback_clip=clip,
            weight_decay=0.01,
            momentum=0.9,
        )
        dense = case.chain_step(options)
        graph = case.graph_step(options)
        assert set(dense.new) == set(graph.new) == set(case.model.parameters())
        assert distance(graph.new, dense.new) < 1e-9, (terminal, bellman, clip)


def test_coefficients_carry_the_predicted_loss_change():
    """rho of player t is the derivative of the sample's own loss along the earlier updates."""
    case = cases.used_twice()
    result = case.graph_step(Options(lr=0.4, terminal="outer-product", feedback_clip=None))
    names = [n for n in result.delta if not n.startswith("head")]
    assert len(names) == 4
    earlier = {n: result.delta[n] for n in names}
    expected = directional_loss_change(case.model, case.phi, case.x, earlier)
    assert relative_error(torch.cat(result.rho[-1]), expected) < 1e-12
    assert expected.abs().max() > 1e-3


def test_linear_differential_is_the_derivative_of_the_nonlinear_one():
    """dx of the two rollouts differ by O(lr^2): halving lr divides the difference by four."""
    case = cases.fc_chain()
    gaps = []
    for lr in (4e-3, 2e-3):
        ends = [
            case.chain_step(Options(lr=lr, rollout=rollout, terminal="gauss-newton")).stages[-1].dx
            for rollout in ("linear", "nonlinear")
        ]
        gaps.append(max(float((a - b).norm()) for a, b in zip(*ends, strict=True)))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_terminal_derivatives_of_cross_entropy():
    """phi_x = p - e_y and phi_xx = diag(p) - p p^T, per sample and without the 1/B."""
    outputs, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    phi = row_losses(nn.CrossEntropyLoss(), outputs, y)
    for i in range(4):
        p = outputs[i].softmax(0)
        gradient, hessian = terminal_derivatives(phi, outputs[i : i + 1], i)
        assert relative_error(gradient, p - torch.eye(3)[y[i]]) < 1e-12
        assert relative_error(hessian, torch.diag(p) - torch.outer(p, p)) < 1e-12


@pytest.mark.parametrize(
    ("build", "preconditioner"),
    [
        *itertools.product([cases.fc_chain], cases.PRECONDITIONERS),
        (cases.conv_chain, "identity"),
        (cases.conv_chain, "kfac"),
    ],
)
def test_every_choice_makes_a_different_step(build, preconditioner):
    """Two options with the same step could not be told apart by a comparison."""
    case = build()
    steps = {}
    for terminal, bellman, rollout, clip in itertools.product(
        cases.TERMINALS,
        cases.RECURSIONS,
        ("linear", "nonlinear"),
        (None, cases.CLIP[preconditioner]),
    ):
        options = cases.options_for(
            preconditioner, terminal=terminal, bellman=bellman, rollout=rollout, feedback_clip=clip
        )
        result = case.chain_step(options)
        steps[terminal, bellman, rollout, clip] = result.new
    for (a, one), (b, other) in itertools.combinations(steps.items(), 2):
        assert distance(one, other) > 1e-7, (a, b, distance(one, other))
    open_loop = Options(
        lr=cases.LR[preconditioner],
        preconditioner=preconditioner,
        bellman="off",
        rollout="off",
    )
    baseline = case.chain_step(open_loop).new
    assert min(distance(step, baseline) for step in steps.values()) > 2e-3
