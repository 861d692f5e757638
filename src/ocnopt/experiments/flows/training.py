"""Train a flow against the clock."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Generator, Tensor

from ocnopt import SNOpt
from ocnopt.errors import NonFiniteError
from ocnopt.experiments.data import densities
from ocnopt.experiments.data.densities import PlaneName
from ocnopt.experiments.data.density_sets import DENSITIES
from ocnopt.experiments.data.tabular import Density, load_density
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.flows.network import build, exactly
from ocnopt.experiments.flows.run import FlowRun
from ocnopt.experiments.flows.unseen import unseen
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.stopwatch import Stopwatch
from ocnopt.ode import ContinuousFlow

__all__ = ["SIDE", "load", "mesh", "train_flow"]

#: Densities in the plane lie in [-SIDE, SIDE]^2, up to tails.
SIDE = 4.5
#: Points of a density in the plane: trained on, validated on, tested on.
SIZES = (20_000, 2_000, 2_000)
#: Points that are evaluated at once.
_PART = 4096
#: Points whose gradient is looked at.
_UNSEEN = 32
#: Of the points of a density in the plane: the same for all runs.
_DATA_SEED = 2**20


def load(name: str, root: Path | None = None) -> Density:
    """The points of a density: drawn, or read from a table's file.

    Args:
        name: One of the plane (``PlaneName``) or a table (``DENSITIES``).
        root: Folder that holds the tables; None as in ``data_folder``.

    Raises:
        InputError: There is no such density, or its file is missing or damaged.
    """
    planes: tuple[PlaneName, ...] = get_args(PlaneName)
    for plane in planes:
        if name == plane:
            generator = Generator().manual_seed(_DATA_SEED)
            return Density(*(densities.sample(plane, n, generator) for n in SIZES))
    for table in DENSITIES:
        if name == table:
            return load_density(table, root)
    known = ", ".join([*planes, *DENSITIES])
    raise InputError(f"there is no density {name!r}; choose from {known}")


def train_flow(run: FlowRun, data: Density, *, device: str = "cpu") -> dict[str, Any]:
    """Minimize the mean negative log-density of the training points.

    Evaluations are exact: exact divergences and tighter tolerances, with the clock stopped.

    Args:
        run: What to do.
        data: Its points.
        device: Where to compute. Seconds of a GPU are wall-clock seconds.

    Returns:
        Plain values: ``points``, one mapping per evaluation (``step``, ``cpu_seconds`` and
        ``seconds`` of training until then, ``nll`` in nats on the held points, ``evaluations`` of
        the field until then, forward and backward ones and those of statistics); ``diverged_step``,
        the step, counted from 1, that came to no number, or None; ``parameters``, their count; and
        where ``run.mesh`` asks for it, else None, ``mesh``, the log-density there, row by row from
        below, and ``unseen``, as in :func:`~ocnopt.experiments.flows.unseen.unseen`.

    Raises:
        InputError: An unknown optimizer, or fewer points than a batch.
    """
    torch.manual_seed(run.seed)
    train = data.train[: round(run.share * len(data.train))].to(device)
    held = (data.test if run.held == "test" else data.validation).to(device)
    if len(train) < run.batch_size:
        raise InputError(
            f"{run.density} has {len(train)} training points, fewer than a batch of"
            f" {run.batch_size}; choose a smaller batch"
        )
    flow = build(run.network, train.shape[1]).to(device)
    optimizer = _optimizer(run, flow)
    order = DataOrder(len(train), run.batch_size, run.seed, train.device)
    watch, points, diverged = Stopwatch(), [_point(0, Stopwatch(), flow, held)], None
    for step in range(1, run.steps + 1):
        try:
            _step(flow, optimizer, train[order.batch(step - 1)], watch)
            if step % run.every == 0 or step == run.steps:
                points.append(_point(step, watch, flow, held))
        except NonFiniteError:
            diverged = step
            break
    kept = run.mesh > 0 and diverged is None
    return {
        "points": points,
        "diverged_step": diverged,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "mesh": _log_density(flow, mesh(run.mesh).to(device)).tolist() if kept else None,
        "unseen": unseen(flow, held[:_UNSEEN]) if kept else None,
    }


def mesh(side: int) -> Tensor:
    """Points of a square grid, row by row from below, (side^2, 2)."""
    line = torch.linspace(-SIDE, SIDE, side)
    return torch.cartesian_prod(line, line).flip(1)


def _optimizer(run: FlowRun, flow: ContinuousFlow) -> torch.optim.Optimizer:
    if run.optimizer == "snopt":
        return SNOpt(flow, lr=run.lr, **run.options)
    if run.optimizer == "adam":
        return torch.optim.Adam(flow.parameters(), lr=run.lr, **run.options)
    if run.optimizer == "sgd":
        return torch.optim.SGD(flow.parameters(), lr=run.lr, **run.options)
    raise InputError(f"there is no optimizer {run.optimizer!r}; choose adam, sgd or snopt")


def _step(
    flow: ContinuousFlow, optimizer: torch.optim.Optimizer, x: Tensor, watch: Stopwatch
) -> None:
    watch.start()
    try:
        optimizer.zero_grad()
        loss = -flow(x).mean()
        loss.backward()
        _require_finite(float(loss.detach()))  # waits for a GPU
        optimizer.step()
    finally:
        watch.stop()


def _point(step: int, watch: Stopwatch, flow: ContinuousFlow, held: Tensor) -> dict[str, Any]:
    nll = -float(_log_density(flow, held).mean())
    _require_finite(nll)
    counts = [sum(leg.evaluations) for leg in flow.legs]
    return {
        "step": step,
        "cpu_seconds": watch.cpu_seconds,
        "seconds": watch.seconds,
        "nll": nll,
        "evaluations": sum(counts),
    }


@torch.no_grad()
def _log_density(flow: ContinuousFlow, x: Tensor) -> Tensor:
    exact = exactly(flow)
    return torch.cat([exact(part) for part in x.split(_PART)]).double().cpu()


def _require_finite(value: float) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(f"the mean log-density is {value}")
