"""A rollout predicts the loss change of the earlier updates; its error is of second order."""

from __future__ import annotations

import copy

import cases
import comparison
import pytest
import torch
from oracles import Options, directional_loss_change, row_losses
from torch import Tensor, nn
from torch.func import functional_call

GRAPHS = {
    "chain": cases.fc_chain,
    "identity shortcut": lambda: cases.residual(False),
    "projection": lambda: cases.residual(True),
    "branches": cases.branching,
    "used twice": cases.used_twice,
}
FOURFOLD = pytest.approx(4, rel=0.2)


def smooth(case: cases.Case) -> cases.Case:
    """ReLU has kinks, at which no expansion holds: softplus instead."""
    if isinstance(case.model, nn.Sequential):
        for k, module in enumerate(case.model):
            if isinstance(module, nn.ReLU):
                case.model[k] = nn.Softplus()
    return case


def one_sample(case: cases.Case, i: int) -> cases.Case:
    return cases.Case(case.model, [], case.x[i : i + 1], case.y[i : i + 1], case.criterion)


def delta_of(case: cases.Case, options: Options) -> dict[str, Tensor]:
    """The package's step, as a change by parameter name."""
    new = comparison.package_step(case, options)
    return {name: new[name] - p.detach() for name, p in case.model.named_parameters()}


def predictions(case: cases.Case, rollout: str, lr: float) -> dict[nn.Module, float]:
    """rho_t as the package used it, read off its step.

    With one sample, M = I, V_xx = phi_x phi_x^T and no recursion, player t's step is
    -lr J_u (1 + rho_t), and without a rollout -lr J_u.
    """
    shared = {"lr": lr, "terminal": "outer-product", "bellman": "off"}
    with_feedback = delta_of(case, Options(rollout=rollout, **shared))
    without = delta_of(case, Options(rollout="off", **shared))
    rho = {}
    for prefix, module in case.model.named_modules():
        if module in case.players:
            names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
            a = torch.cat([with_feedback[n].reshape(-1) for n in names])
            b = torch.cat([without[n].reshape(-1) for n in names])
            rho[module] = float(a @ b / (b @ b)) - 1
            assert (a - (1 + rho[module]) * b).norm() < 1e-10 * b.norm()
    return rho


def true_change(case: cases.Case, lr: float, rollout: str, until: nn.Module) -> float:
    """What the updates of the players before `until` really do to the sample's loss."""
    delta = delta_of(case, Options(lr=lr, terminal="outer-product", bellman="off", rollout=rollout))
    earlier = case.players[: case.players.index(until)]
    moved = copy.deepcopy(case.model)
    with torch.no_grad():
        names = {p: name for name, p in case.model.named_parameters()}
        for module in earlier:
            for p in module.parameters():
                moved.get_parameter(names[p]).add_(delta[names[p]])
    return float(
        (
            case.criterion(moved(case.x), case.y) - case.criterion(case.model(case.x), case.y)
        ).detach()
    )


@pytest.mark.parametrize(
    ("name", "rollout"),
    [
        *((name, "linear") for name in GRAPHS),
        *((name, "nonlinear") for name in GRAPHS if name != "used twice"),
    ],
)
def test_predicted_change_is_right_to_second_order(name, rollout):
    """Halving the learning rate divides the error of every player's prediction by four."""
    case = one_sample(smooth(GRAPHS[name]()), 2 if name == "branches" else 1)
    errors = []
    for lr in (2e-3, 1e-3):
        predicted = predictions(case, rollout, lr)
        assert abs(predicted[case.players[0]]) < 1e-12, "nothing has happened before the first"
        pairs = [
            (predicted[player], true_change(case, lr, rollout, player))
            for player in case.players[1:]
        ]
        assert all(abs(change) > 1e-5 for _, change in pairs)
        assert all(abs(p - c) < 0.2 * abs(c) for p, c in pairs)
        errors.append([abs(p - c) for p, c in pairs])
    for first, second in zip(*errors, strict=True):
        assert first / second == FOURFOLD


@pytest.mark.parametrize("name", ["chain", "identity shortcut", "projection", "branches"])
def test_rollouts_agree_to_second_order(name):
    """The two rollouts' state differentials differ by O(lr^2), so their steps by O(lr^3)."""
    case = smooth(GRAPHS[name]())
    gaps = []
    for lr in (4e-3, 2e-3):
        one, other = (
            delta_of(case, Options(lr=lr, terminal="gauss-newton", rollout=rollout))
            for rollout in ("linear", "nonlinear")
        )
        gaps.append(torch.cat([(one[n] - other[n]).reshape(-1) for n in one]).norm())
    assert float(gaps[0] / gaps[1]) == pytest.approx(8, rel=0.2)


def decreases(case: cases.Case, lr: float, **options) -> tuple[float, float]:
    """What the package says that its step will do to the loss, and what it measures."""
    model, criterion = copy.deepcopy(case.model), copy.deepcopy(case.criterion)
    optimizer = comparison.optimizer_for(
        model, criterion, Options(lr=lr, terminal="gauss-newton"), measure_every=1, **options
    )
    before = comparison.train_step(optimizer, model, criterion, case.x, case.y)
    after = criterion(model(case.x), case.y).detach()
    total = optimizer.diagnostics.total
    assert total.actual_decrease == pytest.approx(float(before - after), rel=1e-9)
    return total.predicted_decrease, total.actual_decrease


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("preconditioner", ["identity", "kfac"])
def test_diagnostics_predict_the_decrease_to_second_order(name, preconditioner):
    """The decrease that the optimizer reports as predicted misses the true one by O(lr^2)."""
    case = smooth(GRAPHS[name]())
    errors = []
    for lr in (2e-3, 1e-3):
        predicted, actual = decreases(case, lr, preconditioner=preconditioner)
        assert actual > 1e-6
        errors.append(abs(predicted - actual))
    assert errors[0] / errors[1] == FOURFOLD


def test_diagnostics_are_exact_where_the_model_of_the_cost_is():
    """One layer and a quadratic cost: nothing is left out, at any learning rate."""
    model = nn.Linear(3, 2)
    case = cases.Case(model, [], torch.randn(4, 3), torch.randn(4, 2), nn.MSELoss())
    for lr in (0.1, 1.0):
        predicted, actual = decreases(case, lr)
        assert abs(actual) > 1e-2
        assert predicted == pytest.approx(actual, rel=1e-10)


@pytest.mark.parametrize("name", GRAPHS)
def test_whole_step_moves_every_sample_as_predicted(name):
    """A whole step of the package changes phi_i by its directional derivative up to O(lr^2)."""
    case = smooth(GRAPHS[name]())
    phi = row_losses(case.criterion, case.model(case.x), case.y)
    errors = []
    for lr in (4e-3, 2e-3):
        delta = delta_of(case, Options(lr=lr, terminal="gauss-newton"))
        predicted = directional_loss_change(case.model, phi, case.x, delta)
        moved = {n: p.detach() + delta[n] for n, p in case.model.named_parameters()}
        actual = torch.stack(
            [
                phi(functional_call(case.model, moved, (case.x[i : i + 1],)), i)
                - phi(case.model(case.x[i : i + 1]), i)
                for i in range(len(case.x))
            ]
        ).detach()
        assert predicted.abs().max() > 1e-4
        errors.append(float((predicted - actual).norm()))
    assert errors[0] / errors[1] == FOURFOLD
