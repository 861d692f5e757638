"""Small networks, batches and criteria that the oracle tests share; float64 throughout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from oracles import (
    Columns,
    GraphResult,
    Linearised,
    Options,
    Part,
    Plain,
    Result,
    RowLoss,
    back_propagate,
    ddp_step,
    graph_step,
    linearise,
    row_losses,
)
from torch import Tensor, nn

TERMINALS = ("outer-product", "matched", "gauss-newton")
RECURSIONS = ("off", "literal", "sample", "share", "joint")
ROLLOUTS = ("off", "linear", "nonlinear")
PRECONDITIONERS = ("identity", "rmsprop", "adam", "kfac", "ekfac")

# Large enough that the feedback and the recursion change the step by more than a percent.
LR = {"identity": 0.8, "rmsprop": 0.002, "adam": 0.02, "kfac": 0.4, "ekfac": 0.3}

# A bound on the feedback that some samples reach and others do not.
CLIP = {"identity": 0.02, "rmsprop": 0.004, "adam": 0.004, "kfac": 0.02, "ekfac": 0.02}


def players_in_call_order(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The modules with trained parameters of their own, each at its first call."""
    called: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, _inputs, _output: called.append(module))
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(called))


@dataclasses.dataclass
class Case:
    """A network, its stages in order (the same modules), a batch and a criterion."""

    model: nn.Module
    stages: list[nn.Module]
    x: Tensor
    y: Tensor
    criterion: nn.Module

    @functools.cached_property
    def players(self) -> list[nn.Module]:
        """Modules with parameters, in the order of their first calls."""
        return players_in_call_order(self.model, self.x)

    @functools.cached_property
    def phi(self) -> RowLoss:
        return row_losses(self.criterion, self.model(self.x), self.y)

    @functools.cached_property
    def table(self) -> list[list[Linearised]]:
        return linearise(self.stages, self.x)

    @functools.cached_property
    def _columns(self) -> dict[str, Columns]:
        return {}

    def chain_step(self, options: Options) -> Result:
        """The dense oracle's step; the Jacobians are computed once per case."""
        return ddp_step(self.stages, self.x, self.phi, options, table=self.table)

    def graph_step(self, options: Options) -> GraphResult:
        """The graph oracle's step; the columns are back-propagated once per case and terminal."""
        if options.terminal not in self._columns:
            self._columns[options.terminal] = back_propagate(
                self.model, self.players, self.x, self.phi, options.terminal
            )
        columns = self._columns[options.terminal]
        return graph_step(self.model, self.players, self.x, self.phi, options, table=columns)


def in_float64(build: Callable[..., Case]) -> Callable[..., Case]:
    """Build under float64 from a seed of its own: a case is the same wherever it is used."""

    @functools.wraps(build)
    def wrapper(*args, **kwargs) -> Case:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            case = build(*args, **kwargs)
        torch.set_default_dtype(before)
        return case

    return wrapper


def livelier(model: nn.Module, gain: float) -> None:
    """Larger weights than the default: costs and curvatures of order one."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)


@in_float64
def fc_chain(criterion: nn.Module | None = None) -> Case:
    """Four players; tanh, sigmoid, ReLU and a layer without bias between 3 inputs and 3 classes."""
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.Tanh(),
        nn.Linear(4, 4, bias=False),
        nn.Sigmoid(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    livelier(model, 1.6)
    x, y = torch.randn(3, 3), torch.tensor([0, 2, 1])
    return Case(model, list(model), x, y, criterion or nn.CrossEntropyLoss())


@in_float64
def conv_chain(groups: int = 1) -> Case:
    """Convolutions with stride, padding and groups, both poolings, and a head."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(2, 4, (3, 2), padding=(1, 0), groups=groups),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(4, 2, 1, bias=False),
        nn.AvgPool2d(2, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    livelier(model, 1.6)
    x, y = torch.randn(2, 1, 7, 7), torch.tensor([0, 2])
    return Case(model, list(model), x, y, nn.CrossEntropyLoss())


class Residual(nn.Module):
    """One residual block between two layers; the shortcut is the identity or a projection."""

    def __init__(self, projection: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 3)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 3)
        self.shortcut = nn.Linear(3, 3, bias=False) if projection else None
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.enter(x))
        r = z if self.shortcut is None else self.shortcut(z)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(z))) + r))

    def stages(self) -> list[nn.Module]:
        """The chain that the block is on the state [shortcut, main path], in call order."""
        fork = [self.enter, nn.Tanh(), Plain(lambda s: torch.cat([s, s], 1))]
        shortcut = [] if self.shortcut is None else [Part(self.shortcut, 0, 3)]
        return [
            *fork,
            *shortcut,
            Part(self.first, 3, 6),
            Plain(lambda s: torch.cat([s[:, :3], torch.tanh(s[:, 3:])], 1)),
            Part(self.second, 3, 7),
            Plain(lambda s: torch.tanh(s[:, :3] + s[:, 3:])),
            self.head,
        ]


@in_float64
def residual(projection: bool) -> Case:
    """The block before a head, with either shortcut."""
    model = Residual(projection)
    livelier(model, 1.6)
    x, y = torch.randn(3, 3), torch.tensor([0, 2, 1])
    return Case(model, model.stages(), x, y, nn.CrossEntropyLoss())


class Branching(nn.Module):
    """Two branches of different depth from one tensor, merged by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 3)
        self.short = nn.Linear(3, 2)
        self.long_1 = nn.Linear(3, 4)
        self.long_2 = nn.Linear(4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.enter(x))
        left = torch.sigmoid(self.short(z))
        right = torch.tanh(self.long_2(F.softplus(self.long_1(z))))
        return self.head(torch.cat([left, right], dim=1))

    def stages(self) -> list[nn.Module]:
        """The chain that the branches are on the state [left, right], in call order."""
        return [
            self.enter,
            nn.Tanh(),
            Plain(lambda s: torch.cat([s, s], 1)),
            Part(self.short, 0, 3),
            Plain(lambda s: torch.cat([torch.sigmoid(s[:, :2]), s[:, 2:]], 1)),
            Part(self.long_1, 2, 5),
            Plain(lambda s: torch.cat([s[:, :2], F.softplus(s[:, 2:])], 1)),
            Part(self.long_2, 2, 6),
            Plain(lambda s: torch.cat([s[:, :2], torch.tanh(s[:, 2:])], 1)),
            self.head,
        ]


@in_float64
def branching() -> Case:
    """The branches before a head."""
    model = Branching()
    livelier(model, 2.4)
    x, y = torch.randn(3, 3), torch.tensor([0, 2, 1])
    return Case(model, model.stages(), x, y, nn.CrossEntropyLoss())


class Twice(nn.Module):
    """A module used twice, with another player between its uses."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.between = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.between(torch.tanh(self.shared(x))))
        return self.head(torch.tanh(self.shared(z)))


@in_float64
def used_twice() -> Case:
    """No chain of stages has this player in one place: only the graph oracle applies."""
    model = Twice()
    livelier(model, 1.6)
    return Case(model, [], torch.randn(3, 3), torch.tensor([0, 2, 1]), nn.CrossEntropyLoss())


def log_cosh(outputs: Tensor, target: Tensor) -> Tensor:
    """A criterion that no library knows: mean over samples of the summed log cosh of the error."""
    error = outputs - target
    return (error + F.softplus(-2 * error) - torch.log(torch.tensor(2.0).to(error))).sum() / len(
        outputs
    )


def options_for(preconditioner: str, **others) -> Options:
    """Options with the learning rate that suits the preconditioner."""
    return Options(**{"lr": LR[preconditioner], "preconditioner": preconditioner, **others})
