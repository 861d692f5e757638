"""Every kind of layer as a player; P_u from autograd, not from formulas, is the judge."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import cases
import comparison
import pytest
import torch
from oracles import Options, distance
from torch import Tensor, nn


class Sandwich(nn.Module):
    """`layer` between another layer and a head, all of them players."""

    def __init__(self, before: nn.Module | None, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.before, self.layer, self.head = before, layer, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        value = x if self.before is None else torch.tanh(self.before(x))
        return self.head(torch.tanh(self.layer(value)).flatten(1))


def frozen(layer: nn.Module, name: str) -> nn.Module:
    """The layer with one parameter that is not trained."""
    layer.get_parameter(name).requires_grad_(False)
    return layer


class Folded(nn.Module):
    """A Linear that is handed positions as rows: (B, T, n) as (B * T, n)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.inner(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], -1)


LAYERS = {
    "Linear on folded rows": lambda: (nn.Linear(3, 3), Folded(3, 2), 8, (3, 4, 3)),
    "Linear on sequences": lambda: (nn.Linear(3, 3), nn.Linear(3, 2), 8, (3, 4, 3)),
    "Linear on a grid": lambda: (nn.Linear(2, 2), nn.Linear(2, 2), 12, (3, 2, 3, 2)),
    "Linear without bias": lambda: (nn.Linear(3, 3), nn.Linear(3, 4, bias=False), 4, (3, 3)),
    "Conv1d": lambda: (nn.Conv1d(2, 2, 1), nn.Conv1d(2, 3, 3, stride=2, padding=1), 9, (3, 2, 6)),
    "Conv1d, grouped": lambda: (nn.Conv1d(2, 2, 1), nn.Conv1d(2, 4, 2, groups=2), 12, (3, 2, 4)),
    "Conv2d, dilated": lambda: (
        nn.Conv2d(1, 2, 1),
        nn.Conv2d(2, 2, 2, dilation=2, padding=1),
        32,
        (3, 1, 4, 4),
    ),
    "Conv2d, depthwise": lambda: (
        nn.Conv2d(2, 2, 1, bias=False),
        nn.Conv2d(2, 2, (3, 2), groups=2, bias=False),
        12,
        (3, 2, 5, 3),
    ),
    "Conv2d, padding same": lambda: (
        nn.Conv2d(1, 2, 1),
        nn.Conv2d(2, 2, (1, 3), padding="same"),
        18,
        (3, 1, 3, 3),
    ),
    "Conv2d, circular": lambda: (
        nn.Conv2d(1, 2, 1),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        18,
        (3, 1, 3, 3),
    ),
    "Conv2d, wide": lambda: (nn.Conv2d(1, 8, 1), nn.Conv2d(8, 10, 2), 20, (3, 1, 2, 3)),
    "Conv2d, wide, grouped": lambda: (
        nn.Conv2d(1, 8, 1),
        nn.Conv2d(8, 12, 2, groups=2),
        24,
        (3, 1, 2, 3),
    ),
    "Linear, wide": lambda: (nn.Linear(2, 12), nn.Linear(12, 11), 22, (3, 2, 2)),
    "frozen weight": lambda: (nn.Linear(3, 3), frozen(nn.Linear(3, 4), "weight"), 4, (3, 3)),
    "frozen bias": lambda: (nn.Linear(3, 3), frozen(nn.Linear(3, 4), "bias"), 4, (3, 3)),
    "frozen kernel": lambda: (
        nn.Conv2d(2, 2, 1),
        frozen(nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), dilation=(2, 1)), "weight"),
        18,
        (3, 2, 6, 4),
    ),
    "frozen shift": lambda: (nn.Linear(4, 4), frozen(nn.LayerNorm(4), "bias"), 4, (3, 4)),
    "Conv3d": lambda: (nn.Conv3d(1, 1, 1), nn.Conv3d(1, 2, 2), 16, (3, 1, 3, 3, 3)),
    "LayerNorm": lambda: (nn.Linear(4, 4), nn.LayerNorm(4), 4, (3, 4)),
    "LayerNorm on sequences": lambda: (nn.Linear(4, 4), nn.LayerNorm(4), 12, (3, 3, 4)),
    "LayerNorm over two axes": lambda: (nn.Linear(4, 4), nn.LayerNorm((3, 4)), 12, (3, 3, 4)),
    "GroupNorm": lambda: (nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), 16, (3, 1, 2, 2)),
    "Embedding": lambda: (None, nn.Embedding(5, 2), 8, 5),
    "Embedding with padding": lambda: (None, nn.Embedding(5, 2, padding_idx=1), 8, 5),
}
# Kinds whose Kronecker factors are specified: one location axis and ungrouped.
FACTORED = (
    "Linear on folded rows",
    "Linear on sequences",
    "Linear without bias",
    "Linear on a grid",
    "Linear, wide",
    "Conv2d, dilated",
    "Conv2d, wide",
)


@functools.cache
def build(name: str) -> cases.Case:
    before_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    before, layer, features, shape = LAYERS[name]()
    model = Sandwich(before, layer, features)
    cases.livelier(model, 1.6)
    if isinstance(shape, int):
        x = torch.tensor([[0, 1, 2, 0], [4, 4, 4, 1], [3, 0, 1, 2]])
    else:
        x = torch.randn(shape)
    torch.set_default_dtype(before_dtype)
    return cases.Case(model, [], x, torch.tensor([0, 2, 1]), nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("name", "preconditioner"),
    [
        *itertools.product(LAYERS, ("identity", "rmsprop")),
        *itertools.product(FACTORED, ("kfac", "ekfac")),
    ],
)
def test_layer(name, preconditioner):
    """The layer takes the oracle's step, and so do its neighbours, whose feedback it passes."""
    case = build(name)
    optimizer = comparison.optimizer_for(case.model, case.criterion, Options(lr=0.1))
    assert {row.treatment for row in optimizer.coverage()} == {"player"}
    del optimizer
    for terminal, bellman, clip in itertools.product(
        ("matched", "gauss-newton"), ("share", "joint"), (None, 0.01)
    ):
        # a generous eps: M must not turn the rounding of a zero gradient into the answer
        options = cases.options_for(
            preconditioner, terminal=terminal, bellman=bellman, feedback_clip=clip, eps=1e-3
        )
        expected = case.graph_step(options)
        without = dataclasses.replace(options, rollout="off", bellman="off")
        first_order = case.graph_step(without)
        assert distance(expected.new, first_order.new) > 1e-3, "feedback must matter here"
        actual = comparison.package_step(case, options)
        comparison.assert_same_step(case, actual, expected.new)
