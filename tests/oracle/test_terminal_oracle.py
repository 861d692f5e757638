"""The terminal cost: whatever the criterion counts, its curvature is that of the dense Hessian.

Nothing here knows how the package finds the Hessian: the criterion's own second derivative by
autograd is the judge, through a whole step whose every player depends on it.
"""

from __future__ import annotations

import cases
import comparison
import pytest
import torch
from oracles import Options, distance
from torch import nn

import ocnopt


def class_targets() -> torch.Tensor:
    return torch.tensor([0, 2, 1])


CRITERIA = {
    "cross-entropy": (lambda: nn.CrossEntropyLoss(), class_targets),
    "class weights": (
        lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0])),
        class_targets,
    ),
    "label smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=0.2), class_targets),
    "weights and smoothing": (
        lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.2),
        class_targets,
    ),
    "ignored target": (lambda: nn.CrossEntropyLoss(), lambda: torch.tensor([0, -100, 1])),
    "ignored class, weighted": (
        lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]), ignore_index=2),
        class_targets,
    ),
    "soft targets": (
        lambda: nn.CrossEntropyLoss(),
        lambda: torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.3, 0.4], [1.0, 0.0, 0.0]]),
    ),
    "squared error": (
        lambda: nn.MSELoss(),
        lambda: torch.tensor([[0.1, 0.7, -0.2], [0.3, -1.3, 0.4], [1.0, 0.0, 0.0]]),
    ),
    "binary cross-entropy": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5])),
        lambda: torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
    ),
    "log cosh of one's own": (
        lambda: ocnopt.Criterion(cases.log_cosh),
        lambda: torch.tensor([[0.1, 0.7, -0.2], [0.3, -1.3, 0.4], [1.0, 0.0, 0.0]]),
    ),
    "a wrapped function": (
        lambda: ocnopt.Criterion(nn.functional.cross_entropy),
        class_targets,
    ),
}


def build(name: str) -> cases.Case:
    make, target = CRITERIA[name]
    case = cases.fc_chain(make())
    case.y = target()
    return case


@pytest.mark.parametrize("terminal", cases.TERMINALS)
@pytest.mark.parametrize("name", CRITERIA)
def test_curvature_of_the_criterion(name, terminal):
    case = build(name)
    for bellman, rollout in (("share", "linear"), ("literal", "nonlinear")):
        options = Options(lr=0.6, terminal=terminal, bellman=bellman, rollout=rollout)
        expected = case.chain_step(options)
        plain = Options(lr=0.6, bellman="off", rollout="off")
        first_order = case.chain_step(plain)
        assert distance(expected.new, first_order.new) > 1e-2, "curvature must matter here"
        actual = comparison.package_step(case, options)
        comparison.assert_same_step(case, actual, expected.new)


def test_criteria_differ():
    """Each of these criteria leads to its own step: ignoring an option would be seen."""
    steps = {}
    for name in CRITERIA:
        case = build(name)
        options = Options(lr=0.6, terminal="gauss-newton")
        new = case.chain_step(options).new
        steps[name] = [new[p] for p in case.model.parameters()]
    for name, step in steps.items():
        same = [
            other
            for other, theirs in steps.items()
            if all(torch.allclose(a, b, atol=1e-6) for a, b in zip(step, theirs, strict=True))
        ]
        assert same == [name] or set(same) == {"cross-entropy", "a wrapped function"}


@pytest.mark.parametrize("terminal", cases.TERMINALS)
def test_an_ignored_sample_has_no_cost(terminal):
    """Its derivatives vanish: kappa is 0 by definition, and nothing turns into a NaN."""
    case = build("ignored target")
    options = Options(lr=0.6, terminal=terminal)
    result = case.chain_step(options)
    assert all(float(stage.V_x[1].abs().max()) == 0 for stage in result.stages)
    actual = comparison.package_step(case, options)
    assert all(torch.isfinite(value).all() for value in actual.values())
    comparison.assert_same_step(case, actual, result.new)


class PerPosition(nn.Module):
    """Class scores (batch, classes, positions), as in segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).reshape(-1, 3, 2)


@pytest.mark.parametrize("terminal", cases.TERMINALS)
@pytest.mark.parametrize("weighted", [False, True])
def test_several_targets_per_sample(terminal, weighted):
    """A sample's cost is the sum over its positions, each with its share of the mean."""
    torch.manual_seed(3)
    model = PerPosition()
    cases.livelier(model, 1.6)
    weight = torch.tensor([0.5, 2.0, 1.0]) if weighted else None
    y = torch.tensor([[0, 2], [1, -100], [2, 2]])
    case = cases.Case(model, [], torch.randn(3, 3), y, nn.CrossEntropyLoss(weight=weight))
    options = Options(lr=0.6, terminal=terminal)
    expected = case.graph_step(options)
    plain = Options(lr=0.6, bellman="off", rollout="off")
    first_order = case.graph_step(plain)
    assert distance(expected.new, first_order.new) > 1e-2, "curvature must matter here"
    comparison.assert_same_step(case, comparison.package_step(case, options), expected.new)
