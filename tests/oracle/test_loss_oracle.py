"""Ways to write the loss: weights per sample, several calls of the criterion, sums, none at all.

Whatever the loop does with the criterion's value, the sample's cost is what its output adds to the
loss that is back-propagated, times the batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import cases
import comparison
import pytest
import torch
import torch.nn.functional as F
from oracles import Options, distance, row_losses
from torch import Tensor, nn

WEIGHTS = (0.5, 2.0, 0.25)
CLASSES = nn.CrossEntropyLoss()
EACH = nn.CrossEntropyLoss(reduction="none")
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def weighted(criterion: nn.Module, outputs: Tensor, target: Tensor) -> Tensor:
    return (torch.tensor(WEIGHTS) * criterion(outputs, target)).mean()


def normalised(criterion: nn.Module, outputs: Tensor, target: Tensor) -> Tensor:
    values = torch.tensor(WEIGHTS) * criterion(outputs, target)
    return values.sum() / sum(WEIGHTS)


def one_left_out(criterion: nn.Module, outputs: Tensor, target: Tensor) -> Tensor:
    return (torch.tensor([1.0, 0.0, 1.0]) * criterion(outputs, target)).sum() / 2


def auxiliary(criterion: nn.Module, outputs: Tensor, target: Tensor) -> Tensor:
    return criterion(outputs[:, :3], target) + 0.3 * criterion(outputs[:, 3:], target)


WAYS: dict[str, tuple[nn.Module, Loss]] = {
    "weights per sample": (EACH, weighted),
    "normalised weights": (EACH, normalised),
    "one sample left out": (EACH, one_left_out),
    "an auxiliary term": (CLASSES, auxiliary),
}


def build(loss: Loss, criterion: nn.Module) -> cases.Case:
    """The chain, two heads for an auxiliary term; phi_i from the whole expression of the loss."""
    case = cases.fc_chain()
    if loss is auxiliary:
        case.model[-1] = nn.Linear(5, 6)
        cases.livelier(case.model[-1], 1.6)
    case.stages = list(case.model)
    case.phi = row_losses(lambda o, y: loss(criterion, o, y), case.model(case.x), case.y)
    return case


def step_with(
    case: cases.Case, criterion: nn.Module | None, loss: Loss, options: Options, **others
) -> dict[str, Tensor]:
    """One step of the package where the loop's loss is `loss`."""
    model = copy.deepcopy(case.model)
    called = copy.deepcopy(criterion)
    optimizer = comparison.optimizer_for(model, called, options, **others)
    optimizer.zero_grad()
    loss(called, model(case.x), case.y).backward()
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("preconditioner", ["identity", "rmsprop"])
@pytest.mark.parametrize("bellman", ["share", "joint"])
@pytest.mark.parametrize("terminal", ["matched", "gauss-newton"])
@pytest.mark.parametrize("name", WAYS)
def test_the_loss_as_the_loop_writes_it(name, terminal, bellman, preconditioner):
    criterion, loss = WAYS[name]
    case = build(loss, criterion)
    options = cases.options_for(preconditioner, terminal=terminal, bellman=bellman)
    expected = case.chain_step(options)
    plain = cases.options_for(preconditioner, bellman="off", rollout="off")
    assert distance(expected.new, case.chain_step(plain).new) > 1e-2, "feedback must matter here"
    actual = step_with(case, criterion, loss, options)
    comparison.assert_same_step(case, actual, expected.new)


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("bellman", cases.RECURSIONS)
def test_without_a_criterion(bellman, rollout):
    """A loss that the optimizer never sees: the outer product needs its gradients alone."""

    def loss(_criterion: None, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target)

    case = cases.fc_chain()
    options = Options(lr=0.8, terminal="outer-product", bellman=bellman, rollout=rollout)
    actual = step_with(case, None, loss, options)
    comparison.assert_same_step(case, actual, case.chain_step(options).new)
    default = step_with(case, None, loss, options, terminal=None)
    assert all(torch.equal(default[name], actual[name]) for name in actual)


@pytest.mark.parametrize("terminal", cases.TERMINALS)
def test_a_summed_loss(terminal):
    """A sum over the batch with the learning rate of the mean divided by B is the mean's step."""
    case = cases.fc_chain()
    total = nn.CrossEntropyLoss(reduction="sum")
    for bellman in ("share", "joint"):
        options = Options(lr=0.9, terminal=terminal, bellman=bellman)
        expected = case.chain_step(options)

        def loss(criterion: nn.Module, outputs: Tensor, target: Tensor) -> Tensor:
            return criterion(outputs, target)

        actual = step_with(case, total, loss, options, lr=options.lr / len(case.x))
        comparison.assert_same_step(case, actual, expected.new)
