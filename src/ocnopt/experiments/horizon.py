"""Runs in which the integration time of a Neural ODE is trained along with its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ocnopt.errors import NonFiniteError
from ocnopt.experiments import networks
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.setup import correct
from ocnopt.experiments.stopwatch import Stopwatch
from ocnopt.ode import IntegrationTime, NeuralODE

__all__ = ["Horizon", "Point", "train_horizon"]

_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Horizon:
    """What a run does.

    Attributes:
        rule: "fixed", "first-order" or "feedback".
        lr: Learning rate of the time; 0 where it is fixed.
        penalty: c of the penalty c / 2 T^2, in units of the loss per time^2.
        seed: Of weights and order.
        t1: Where the time begins.
        steps: Length.
        every: Steps between two changes of the time, and between two points.
        decay: Smoothing of the time's derivatives.
        channels: Width of the network.
        batch_size: Samples per step.
        weights_lr: Adam's learning rate.
    """

    rule: str
    lr: float
    penalty: float
    seed: int
    t1: float = 1.0
    steps: int = 600
    every: int = 20
    decay: float = 0.9
    channels: int = 12
    batch_size: int = 128
    weights_lr: float = 1e-3

    @property
    def label(self) -> str:
        """Short name."""
        return self.rule if self.rule == "fixed" else f"{self.rule}, lr {self.lr:g}"


@dataclass(frozen=True)
class Point:
    """A moment of a run.

    Attributes:
        step: Steps so far.
        time: t1.
        loss: Mean training loss since the last point.
        evaluations: Evaluations of the field per step since then, forward and backward.
        seconds: CPU seconds of training so far.
    """

    step: int
    time: float
    loss: float
    evaluations: float
    seconds: float


def train_horizon(horizon: Horizon, data: Data) -> dict[str, Any]:
    """Train the narrow image network with Adam, its integration time by a rule.

    Args:
        horizon: The run.
        data: Images, with a test set or what stands for it.

    Returns:
        ``points`` (a list of :class:`Point` as mappings), ``test_loss``, ``test_accuracy`` (None
        where the run diverged), ``diverged`` (the step, or None).
    """
    torch.manual_seed(horizon.seed)
    recipe = networks.OdeCNN(channels=horizon.channels)
    model = networks.ode_cnn(recipe, data.shape, data.classes)
    ode = next(m for m in model.modules() if isinstance(m, NeuralODE))
    ode.t1.fill_(horizon.t1)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=horizon.weights_lr)
    rule = _rule(horizon, ode, optimizer)
    order = DataOrder(len(data.train_y), horizon.batch_size, horizon.seed, torch.device("cpu"))
    points: list[Point] = []
    watch, loss_sum = Stopwatch(), 0.0
    try:
        for step in range(horizon.steps):
            index = order.batch(step)
            x, y = data.train_x[index], data.train_y[index]
            watch.start()
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            if rule is not None:
                rule.step()
            watch.stop()
            loss_sum += float(loss.detach())
            if (step + 1) % horizon.every == 0:
                counts = ode.evaluations
                each = (counts.forward + counts.backward) / horizon.every
                mean = loss_sum / horizon.every
                points.append(Point(step + 1, float(ode.t1), mean, each, watch.cpu_seconds))
                ode.reset_evaluations()
                loss_sum = 0.0
    except NonFiniteError:
        return _result(points, None, None, len(points) * horizon.every + 1)
    test_loss, accuracy = _evaluate(model, criterion, data)
    return _result(points, test_loss, accuracy, None)


def _rule(
    horizon: Horizon, ode: NeuralODE, optimizer: torch.optim.Optimizer
) -> IntegrationTime | None:
    if horizon.rule == "fixed":
        return None
    return IntegrationTime(
        ode,
        optimizer,
        lr=horizon.lr,
        penalty=horizon.penalty,
        rule=horizon.rule,
        every=horizon.every,
        decay=horizon.decay,
    )


def _evaluate(model: nn.Module, criterion: nn.Module, data: Data) -> tuple[float, float]:
    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(data.test_y), _EVALUATION_BATCH):
            part = slice(start, start + _EVALUATION_BATCH)
            outputs = model(data.test_x[part])
            loss += float(criterion(outputs, data.test_y[part])) * len(outputs)
            right += int(correct(outputs, data.test_y[part]).sum())
    return loss / len(data.test_y), right / len(data.test_y)


def _result(
    points: list[Point], loss: float | None, accuracy: float | None, diverged: int | None
) -> dict[str, Any]:
    return {
        "points": [asdict(p) for p in points],
        "test_loss": loss,
        "test_accuracy": accuracy,
        "diverged": diverged,
    }
