"""Fig. 6 and 10 to 12 of Liu et al., ICLR 2021: training nine sigmoid layers.

Every run is kept in ``vanishing.jsonl`` of the output folder as soon as it is over: an interrupted
figure goes on where it was, and the figures that share a folder share their runs.
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.curvature import EKFAC as EKFACPreconditioner
from ocnopt.errors import NonFiniteError
from ocnopt.experiments import networks
from ocnopt.experiments.datasets import load
from ocnopt.experiments.figures.vanishing import Runs, save_vanishing
from ocnopt.experiments.files import without_non_finite
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.losses import MMCLoss, VanishingGradientRegularizer
from ocnopt.optim import EKFAC, DDPNOpt

__all__ = ["FIGURES", "Figure", "Method", "Panel", "Task", "run", "run_task"]

WIDTHS = (20,) * 8
BATCH = 16
#: |mu| such that the loss of the best constant output is 10, where the paper's curves begin.
RADIUS = math.sqrt(20)
STEPS, QUICK_STEPS = 4000, 300
#: Steps that a stored loss is the mean of.
EVERY = 20
#: Damping of EKFAC and of DDPNOpt's preconditioner alike.
DAMPING = 3e-3
#: Weight of the regularizer in SGD-VGR.
WEIGHT = 1.0
#: A run has left the plateau once its loss is below this share of it.
LEFT = 0.9


@dataclass(frozen=True)
class Method:
    """An optimizer with its options.

    Attributes:
        name: As the figures call it.
        lr: Learning rate.
        damping: Of an EKFAC preconditioner.
    """

    name: str
    lr: float
    damping: float = DAMPING

    @property
    def label(self) -> str:
        """Name, learning rate, and what else is not the rule."""
        extra = "" if self.damping == DAMPING else f", damping {self.damping:g}"
        return f"{self.name}, lr {self.lr:g}{extra}"


@dataclass(frozen=True)
class Panel:
    """What is compared.

    Attributes:
        title: Heading.
        loss: "MMC" or "CE".
        activation: "sigmoid" or "relu".
        methods: The methods.
    """

    title: str
    loss: str
    activation: str
    methods: tuple[Method, ...]

    @property
    def plateau(self) -> float:
        """Loss of the best constant output, where classes are balanced."""
        return RADIUS**2 / 2 if self.loss == "MMC" else math.log(10)


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    Attributes:
        title: Heading.
        claim: What the paper says.
        panels: Its panels.
    """

    title: str
    claim: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Task:
    """One run."""

    method: Method
    loss: str
    activation: str
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """What tells it apart."""
        setting = {"widths": WIDTHS, "batch": BATCH, "radius": RADIUS, "weight": WEIGHT}
        return json.dumps({**asdict(self), **setting}, sort_keys=True)


SGD_VGR, KRONECKER, DDP, DDP2 = "SGD-VGR", "EKFAC", "DDPNOpt", "DDPNOpt2nd"
_FOUR = (Method(SGD_VGR, 0.1), Method(KRONECKER, 0.03), Method(DDP, 0.03), Method(DDP2, 0.03))

#: DDPNOpt without one of its parts: what differs from the full form with its defaults.
PARTS: dict[str, dict[str, Any]] = {
    "rank one": {"terminal": None},
    "no feedback": {"rollout": "off"},
    "no bound": {"feedback_clip": None},
    "M = I": {"preconditioner": "identity"},
}

FIGURES: dict[str, Figure] = {
    "figure6": Figure(
        "Nine sigmoid layers on DIGITS, MMC loss (Fig. 6)",
        "SGD-VGR and EKFAC make no progress; DDPNOpt leaves the plateau, with second-order "
        "dynamics sooner; its updates are typically 5 to 10 times larger.",
        (
            Panel("MMC loss, sigmoid", "MMC", "sigmoid", _FOUR),
            Panel(
                "the same, other damping",
                "MMC",
                "sigmoid",
                tuple(Method(n, 0.03, d) for d in (1e-2, 1e-3) for n in (KRONECKER, DDP)),
            ),
            Panel(
                "DDPNOpt in part",
                "MMC",
                "sigmoid",
                tuple(Method(name, 0.03) for name in PARTS),
            ),
        ),
    ),
    "figure10": Figure(
        "Other losses and activations (Fig. 10)",
        "(a) With cross-entropy no method leaves the plateau. (b) With ReLU there is none.",
        (
            Panel("(a) cross-entropy, sigmoid", "CE", "sigmoid", _FOUR),
            Panel("(b) MMC loss, ReLU", "MMC", "relu", _FOUR),
        ),
    ),
    "figure11": Figure(
        "Adaptive diagonal preconditioners (Fig. 11)",
        "Adaptive first-order methods are more likely to leave the plateau than SGD; DDPNOpt with "
        "such a preconditioner (DDPNOpt*) converges faster.",
        (
            Panel(
                "MMC loss, sigmoid",
                "MMC",
                "sigmoid",
                (
                    Method("SGD", 0.1),
                    Method("Adam", 0.003),
                    Method("RMSprop", 0.003),
                    Method("DDPNOpt*", 0.003),
                ),
            ),
        ),
    ),
    "figure12": Figure(
        "Learning rates of Fig. 6 (Fig. 12)",
        "SGD-VGR and EKFAC stay whatever the learning rate, SGD-VGR unsteadily at large ones; "
        "DDPNOpt and DDPNOpt2nd leave the plateau at all of them.",
        (
            Panel(
                "(a) SGD-VGR",
                "MMC",
                "sigmoid",
                tuple(Method(SGD_VGR, r) for r in (0.5, 0.3, 0.1, 0.05)),
            ),
            *(
                Panel(
                    f"({c}) lr {r:g}",
                    "MMC",
                    "sigmoid",
                    tuple(Method(n, r) for n in (KRONECKER, DDP, DDP2)),
                )
                for c, r in (("b", 0.05), ("c", 0.03), ("d", 0.01))
            ),
        ),
    ),
}


def build(
    method: Method, model: nn.Module, criterion: nn.Module
) -> tuple[torch.optim.Optimizer, VanishingGradientRegularizer | None]:
    """The optimizer of a method, and the penalty that belongs to it."""
    lr, factored = method.lr, EKFACPreconditioner(damping=method.damping)
    if method.name == SGD_VGR:
        penalty = VanishingGradientRegularizer(model, weight=WEIGHT)
        return torch.optim.SGD(model.parameters(), lr), penalty
    if method.name == KRONECKER:
        return EKFAC(model, criterion, lr=lr, damping=method.damping), None
    if method.name == "DDPNOpt*":
        return DDPNOpt(model, criterion, lr=lr, terminal="full", preconditioner="rmsprop"), None
    if method.name in (DDP, DDP2):
        order = 1 if method.name == DDP else 2
        full = DDPNOpt(
            model,
            criterion,
            lr=lr,
            terminal="full",
            preconditioner=factored,
            dynamics_order=order,
        )
        return full, None
    if method.name in PARTS:
        options = {"terminal": "full", "preconditioner": factored, **PARTS[method.name]}
        return DDPNOpt(model, criterion, lr=lr, **options), None
    kinds = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "RMSprop": torch.optim.RMSprop}
    return kinds[method.name](model.parameters(), lr=lr), None


def run_task(task: Task) -> dict[str, Any]:
    """One run; its losses, update norms and accuracy."""
    torch.set_num_threads(1)
    data = load("digits")
    torch.manual_seed(task.seed)
    recipe = networks.FCN(widths=WIDTHS, activation=task.activation)  # type: ignore[arg-type]
    model = networks.fcn(recipe, data.shape, data.classes)
    criterion = MMCLoss(10, radius=RADIUS) if task.loss == "MMC" else nn.CrossEntropyLoss()
    optimizer, penalty = build(task.method, model, criterion)
    order = DataOrder(len(data.train_x), BATCH, task.seed, torch.device("cpu"))
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    losses: list[float] = []
    norms = torch.zeros(len(layers))
    failed = ""
    for step in range(task.steps):
        index = order.batch(step)
        optimizer.zero_grad()
        loss = criterion(model(data.train_x[index]), data.train_y[index])
        (loss if penalty is None else loss + penalty(loss)).backward()
        before = [_flat(layer).clone() for layer in layers]
        try:
            optimizer.step()
        except NonFiniteError as error:
            failed = str(error)
            break
        value = float(loss.detach())
        if not math.isfinite(value):
            failed = "the loss is not finite"
            break
        losses.append(value)
        moved = [(_flat(layer) - old).norm() for layer, old in zip(layers, before, strict=True)]
        norms += torch.stack(moved)
    parts = range(0, len(losses), EVERY)
    return {
        **asdict(task),
        "key": task.key,
        "losses": [round(fmean(losses[k : k + EVERY]), 4) for k in parts],
        "norms": [float(f"{n:.3g}") for n in (norms / max(1, len(losses))).tolist()],
        "accuracy": _accuracy(model, criterion, data.test_x, data.test_y),
        "failed": failed,
    }


def _flat(layer: nn.Linear) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in layer.parameters()])


@torch.no_grad()
def _accuracy(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> float:
    output = model(x)
    found = criterion.predict(output) if isinstance(criterion, MMCLoss) else output.argmax(1)
    return float((found == y).double().mean())


def run(settings: Settings, watcher: Watcher) -> Report:
    """Run what is missing, draw, and write the page."""
    figure = FIGURES[settings.name]
    steps = QUICK_STEPS if settings.quick else STEPS
    seeds = settings.seeds or (1 if settings.quick else 3)
    tasks = {
        task.key: task
        for panel in figure.panels
        for method in panel.methods
        for seed in range(seeds)
        for task in [Task(method, panel.loss, panel.activation, seed, steps)]
    }
    processes = settings.processes or os.cpu_count() or 1
    rows = _finish(tasks, settings.output / "vanishing.jsonl", watcher, processes)
    panels: dict[str, dict[str, Runs]] = {}
    table: list[list[str]] = []
    for panel in figure.panels:
        panels[panel.title] = {}
        for method in panel.methods:
            mine = _of(rows, panel, method)
            panels[panel.title][method.label] = Runs(
                method.name, [row["losses"] for row in mine], [row["norms"] for row in mine]
            )
            table.append(_row(panel, method, mine))
    save_vanishing(
        settings.picture,
        figure.title,
        panels,
        {panel.title: panel.plateau for panel in figure.panels},
        EVERY,
    )
    sentence = _sentence(figure, rows)
    return Report(
        columns=[_COLUMNS[i] for i in _SHORT],
        table=[[line[i] for i in _SHORT] for line in table],
        sentence=sentence,
        page=_page(settings, figure, rows, table, sentence, seeds, steps),
        rows=list(rows.values()),
        facts={
            "widths": list(WIDTHS),
            "batch": BATCH,
            "steps": steps,
            "seeds": seeds,
            "mmc_radius": RADIUS,
            "vgr_weight": WEIGHT,
        },
    )


def _finish(
    tasks: dict[str, Task], path: Path, watcher: Watcher, processes: int
) -> dict[str, dict[str, Any]]:
    """Rows of all tasks: those on file, and the others run side by side."""
    done: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # an interrupted write
                continue
            if row.get("key") in tasks:
                done[row["key"]] = row
    watcher.start(len(tasks))
    for key in done:
        watcher.advance(tasks[key].method.label)
    missing = [task for key, task in tasks.items() if key not in done]
    if not missing:
        return {key: done[key] for key in tasks}
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        path.open("a") as file,
    ):
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # after a line that an interruption has cut short
        for row in pool.map(run_task, missing):
            kept = without_non_finite(row)
            file.write(json.dumps(kept) + "\n")
            file.flush()
            done[kept["key"]] = kept
            watcher.advance(tasks[kept["key"]].method.label)
    return {key: done[key] for key in tasks}


_COLUMNS = (
    "panel",
    "method",
    "below: first at",
    "for good from",
    "lowest loss",
    "last loss",
    "test accuracy %",
    "update norm, layers 1 / 5 / 9",
)
#: The columns that fit a terminal.
_SHORT = (0, 1, 2, 3, 5)


def _row(panel: Panel, method: Method, runs: list[dict[str, Any]]) -> list[str]:
    limit = LEFT * panel.plateau
    lowest = [min(run["losses"]) for run in runs if run["losses"]]
    last = [fmean(run["losses"][-5:]) for run in runs if run["losses"] and not run["failed"]]
    failed = sum(bool(run["failed"]) for run in runs)
    norms = [fmean(run["norms"][i] for run in runs) for i in (0, 4, 8)]
    return [
        panel.title,
        method.label,
        _when([_first(run["losses"], limit) for run in runs]),
        _when([_for_good(run["losses"], limit) for run in runs]),
        _range(lowest),
        _range(last) + (f", {failed} failed" if failed else ""),
        f"{100 * fmean(run['accuracy'] for run in runs):.1f}",
        " / ".join(f"{n:.1e}" for n in norms),
    ]


def _first(losses: list[float], limit: float) -> int | None:
    """The step at which the loss is first below the limit, or None."""
    return next((EVERY * i for i, loss in enumerate(losses) if loss < limit), None)


def _for_good(losses: list[float], limit: float) -> int | None:
    """The step from which on the loss stays below the limit, or None."""
    last = max((i for i, loss in enumerate(losses) if loss >= limit), default=-1)
    return None if last == len(losses) - 1 else EVERY * (last + 1)


def _when(steps: list[int | None]) -> str:
    seen = [step for step in steps if step is not None]
    if not seen:
        return f"0 of {len(steps)}"
    return f"{len(seen)} of {len(steps)}, {fmean(seen):.0f}"


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{fmean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _sentence(figure: Figure, rows: dict[str, dict[str, Any]]) -> str:
    """Who left for good, panel by panel."""
    words = []
    for panel in figure.panels:
        found = []
        for method in panel.methods:
            mine = _of(rows, panel, method)
            left = sum(_for_good(r["losses"], LEFT * panel.plateau) is not None for r in mine)
            found.append(f"{method.label} {left} of {len(mine)}")
        words.append(f"{panel.title}: {'; '.join(found)}.")
    return "Runs that left the plateau for good. " + " ".join(words)


def _remarks(figure: Figure, rows: dict[str, dict[str, Any]]) -> list[str]:
    """The size of DDPNOpt's updates relative to the preconditioner's own optimizer."""
    lines = []
    for panel in figure.panels:
        for method in panel.methods:
            lender = Method(KRONECKER, method.lr, method.damping)
            if method.name not in (DDP, DDP2) or lender not in panel.methods:
                continue
            mine, theirs = _of(rows, panel, method), _of(rows, panel, lender)
            ratios = [
                fmean(r["norms"][i] for r in mine) / fmean(r["norms"][i] for r in theirs)
                for i in range(len(WIDTHS) + 1)
            ]
            shown = " ".join(f"{ratio:.2g}" for ratio in ratios)
            lines.append(f"- {panel.title}, {method.label}: {shown}")
    if not lines:
        return []
    return [
        "**Update norm relative to EKFAC's** at the same learning rate and damping, layers 1 to 9:",
        "",
        *lines,
        "",
    ]


def _of(rows: dict[str, dict[str, Any]], panel: Panel, method: Method) -> list[dict[str, Any]]:
    """The rows of one method in one panel."""
    wanted = asdict(method)
    return [
        row
        for row in rows.values()
        if row["method"] == wanted
        and row["loss"] == panel.loss
        and row["activation"] == panel.activation
    ]


def _page(
    settings: Settings,
    figure: Figure,
    rows: dict[str, dict[str, Any]],
    table: list[list[str]],
    sentence: str,
    seeds: int,
    steps: int,
) -> str:
    return "\n".join(
        [
            f"# {figure.title}",
            "",
            f"Written by `{settings.command}`. DIGITS, {len(WIDTHS) + 1} linear layers of width "
            f"{WIDTHS[0]}, batch {BATCH}, {steps} iterations, seeds 0 to {seeds - 1}. The paper "
            "gives neither widths nor batch size, neither damping nor the scale of the centers: "
            f"here |mu|^2 / 2 = 10, the loss of the best constant output. EKFAC and DDPNOpt share "
            f"a damping of {DAMPING:g} unless another is named; DDPNOpt is "
            "`DDPNOpt(terminal='full', preconditioner=EKFAC(damping))` with its defaults (share "
            "recursion, feedback bounded at 1, linear rollout), DDPNOpt2nd has "
            "`dynamics_order=2`, DDPNOpt* `preconditioner='rmsprop'`; SGD-VGR adds the regularizer "
            f"of Pascanu et al. with weight {WEIGHT:g}. *In part*: the same DDPNOpt with its "
            "rank-one terminal, without feedback, without a bound on it, or with M = I. "
            f"*Below*: the loss (mean of {EVERY} "
            f"steps) is below {LEFT:g} of the plateau: in how many runs, and at which step on "
            "average. Losses: mean over seeds (and range).",
            "",
            f"**The paper says:** {figure.claim}",
            "",
            f"**Here:** {sentence}",
            "",
            markdown_table(_COLUMNS, table),
            "",
            *_remarks(figure, rows),
            f"![Loss and update norm]({settings.name}.png)",
            "",
        ]
    )
