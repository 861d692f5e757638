"""DDPNOpt on graphs: skips, branches, shared modules and random graphs against brute force.

The linear rollout is judged by explicit per-sample gradients and ``torch.func.jvp``, which know
nothing of layers; the nonlinear one by the dense chain on the state that holds every tensor alive.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import cases
import comparison
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from oracles import Options, distance
from torch import Tensor, nn

GRAPHS = {
    "identity shortcut": functools.cache(lambda: cases.residual(False)),
    "projection": functools.cache(lambda: cases.residual(True)),
    "branches": functools.cache(cases.branching),
    "used twice": functools.cache(cases.used_twice),
}


@pytest.mark.parametrize(
    ("name", "preconditioner"),
    [
        (name, preconditioner)
        for name, preconditioner in itertools.product(GRAPHS, cases.PRECONDITIONERS)
        if name != "used twice" or "kfac" not in preconditioner  # no factors specified there
    ],
)
@pytest.mark.parametrize("terminal", cases.TERMINALS)
def test_linear_rollout(name, terminal, preconditioner):
    case = GRAPHS[name]()
    for bellman, clip in itertools.product(cases.RECURSIONS, (None, cases.CLIP[preconditioner])):
        options = cases.options_for(
            preconditioner, terminal=terminal, bellman=bellman, feedback_clip=clip
        )
        expected = case.graph_step(options)
        without = dataclasses.replace(options, rollout="off")
        open_loop = case.graph_step(without)
        assert distance(expected.new, open_loop.new) > 1e-3, "the feedback must matter here"
        actual = comparison.package_step(case, options)
        comparison.assert_same_step(case, actual, expected.new, tolerance=1e-8)


@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS)
@pytest.mark.parametrize("terminal", cases.TERMINALS)
@pytest.mark.parametrize("name", ["identity shortcut", "projection", "branches"])
def test_nonlinear_rollout(name, terminal, preconditioner):
    """The state at a player is every tensor alive there, the shortcut's included."""
    case = GRAPHS[name]()
    for bellman, clip in itertools.product(
        ("off", "share", "joint"), (None, cases.CLIP[preconditioner])
    ):
        options = cases.options_for(
            preconditioner,
            terminal=terminal,
            bellman=bellman,
            rollout="nonlinear",
            feedback_clip=clip,
        )
        expected = case.chain_step(options)
        changed = {"rollout": "linear"} if clip is None else {"feedback_clip": None}
        neighbour = dataclasses.replace(options, **changed)
        other = case.chain_step(neighbour)
        assert distance(expected.new, other.new) > 1e-5, "rollout and bound must matter here"
        actual = comparison.package_step(case, options)
        comparison.assert_same_step(case, actual, expected.new, tolerance=1e-8)


@dataclasses.dataclass(frozen=True)
class Node:
    """layer(sum of the values at `sources`), squashed or not; value 0 is the input."""

    sources: tuple[int, ...]
    layer: int
    squash: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """A graph: its nodes in call order, and a seed for its weights and its batch."""

    width: int
    nodes: tuple[Node, ...]
    seed: int


class Dag(nn.Module):
    """The network of a plan; its head reads every value that no node reads."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        used = {s for node in plan.nodes for s in node.sources}
        self.ends = [k + 1 for k in range(len(plan.nodes)) if k + 1 not in used]
        self.head = nn.Linear(plan.width * len(self.ends), 2)
        count = 1 + max(node.layer for node in plan.nodes)
        self.layers = nn.ModuleList(
            nn.Linear(plan.width, plan.width, bias=k % 2 == 0) for k in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for node in self.plan.nodes:
            total = torch.stack([values[s] for s in node.sources]).sum(0)
            value = self.layers[node.layer](total)
            values.append(torch.tanh(value) if node.squash else value)
        return self.head(torch.cat([values[k] for k in self.ends], dim=1))


@st.composite
def plans(draw) -> Plan:
    """Up to six nodes with one to three sources each; a layer may be used again."""
    nodes: list[Node] = []
    layers = 0
    for k in range(draw(st.integers(2, 6))):
        sources = draw(st.sets(st.integers(0, k), min_size=1, max_size=3))
        layer = draw(st.integers(0, layers))
        layers = max(layers, layer + 1)
        nodes.append(Node(tuple(sorted(sources)), layer, draw(st.booleans())))
    return Plan(draw(st.integers(2, 3)), tuple(nodes), draw(st.integers(0, 10_000)))


@given(
    plan=plans(),
    terminal=st.sampled_from(cases.TERMINALS),
    bellman=st.sampled_from(cases.RECURSIONS),
    clip=st.sampled_from((None, 0.02, 0.5)),
    preconditioner=st.sampled_from(("identity", "rmsprop")),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_random_graphs(plan, terminal, bellman, clip, preconditioner):
    """Whatever the graph, the linear rollout equals an oracle of per-sample gradients alone."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(plan.seed)
    model = Dag(plan)
    x, y = torch.randn(3, plan.width), torch.tensor([0, 1, 1])
    case = cases.Case(model, [], x, y, nn.CrossEntropyLoss())
    # a generous eps: M must not turn the rounding of a tiny gradient into the answer
    options = Options(
        lr=0.3 if preconditioner == "identity" else 0.01,
        preconditioner=preconditioner,
        terminal=terminal,
        bellman=bellman,
        feedback_clip=clip,
        eps=1e-2,
    )
    expected = case.graph_step(options)
    actual = comparison.package_step(case, options)
    for name, p in model.named_parameters():
        assert torch.allclose(actual[name], expected.new[p], rtol=1e-9, atol=1e-10), name


def test_random_graphs_have_feedback_and_sharing():
    """What the strategy draws is worth drawing: branches, reuse, feedback that moves weights."""
    plan = Plan(2, (Node((0,), 0, True), Node((0, 1), 1, True), Node((1, 2), 0, False)), 3)
    torch.manual_seed(plan.seed)
    model = Dag(plan)
    case = cases.Case(model, [], torch.randn(3, 2), torch.tensor([0, 1, 1]), nn.CrossEntropyLoss())
    assert case.players == [model.layers[0], model.layers[1], model.head]
    with_feedback, without = (
        case.graph_step(Options(lr=0.3, rollout=rollout)) for rollout in ("linear", "off")
    )
    assert distance(with_feedback.new, without.new) > 1e-3
