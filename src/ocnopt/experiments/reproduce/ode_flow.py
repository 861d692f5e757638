"""Continuous flows on densities in the plane: Adam, SGD and SNOpt, tuned alike, on the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ocnopt.experiments.data import densities
from ocnopt.experiments.data.densities import PlaneName
from ocnopt.experiments.figures.density import Course, Panel, save_densities
from ocnopt.experiments.flows.contest import Contest, Method, hold, series
from ocnopt.experiments.flows.network import PLANE
from ocnopt.experiments.flows.page import markdown_page, short_table
from ocnopt.experiments.flows.run import FlowRun
from ocnopt.experiments.flows.training import SIDE, SIZES, load
from ocnopt.experiments.flows.words import sentence
from ocnopt.experiments.machine import machine
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher

__all__ = ["FULL", "METHODS", "QUICK", "Preset", "run"]

_SNOPT = {"momentum": 0.9, "damping": 0.05, "update_every": 100, "sample_step": 0.01}
#: The first one sets the targets. As many learning rates for each.
METHODS = (
    Method("Adam", "adam", (3e-3, 1e-2, 3e-2, 1e-1)),
    Method("SGD", "sgd", (3e-2, 1e-1, 3e-1, 1.0), {"momentum": 0.9}),
    Method("SNOpt", "snopt", (3e-3, 1e-2, 3e-2, 1e-1), _SNOPT),
)
#: Nats above the first method's final loss: the targets.
MARGINS = (0.1, 0.03, 0.0)
MESH = 100


@dataclass(frozen=True)
class Preset:
    """How much is done.

    Attributes:
        planes: Densities.
        methods: Who runs.
        steps: Of every run.
        every: Steps between evaluations.
        seeds: Final runs of each method.
    """

    planes: tuple[PlaneName, ...]
    methods: tuple[Method, ...]
    steps: int
    every: int
    seeds: int


FULL = Preset(("gaussians", "pinwheel"), METHODS, 240, 15, 3)
QUICK = Preset(("gaussians",), tuple(replace(m, lrs=m.lrs[1:3]) for m in METHODS), 16, 8, 1)


def run(settings: Settings, watcher: Watcher) -> Report:
    """Tune, run over seeds, draw and write the page.

    Args:
        settings: What to do.
        watcher: Told of every run.

    Raises:
        InputError: The cache cannot be written to, or joblib is missing.
    """
    preset = QUICK if settings.quick else FULL
    seeds = settings.seeds or preset.seeds
    count = len(preset.methods)
    watcher.start(len(preset.planes) * count * (len(preset.methods[0].lrs) + seeds))
    base = FlowRun("", PLANE, steps=preset.steps, every=preset.every, mesh=MESH)
    contests = [
        hold(settings, preset.methods, replace(base, density=name), MARGINS, seeds, watcher)
        for name in preset.planes
    ]
    truths: dict[str, float] = {name: _true_loss(name) for name in preset.planes}
    save_densities(
        settings.picture,
        "Continuous flows in the plane",
        [_panel(contest, truths[contest.density]) for contest in contests],
        SIDE,
        "CPU seconds",
    )
    columns, table = short_table(contests, truths)
    return Report(
        columns,
        table,
        sentence(contests),
        markdown_page(settings, contests, truths, base, seeds),
        [row for contest in contests for row in _rows(contest)],
        {
            "settings": {**asdict(base), "seeds": seeds, "points": list(SIZES)},
            "true_loss": truths,
            "margins": list(MARGINS),
            "clock": "CPU seconds",
            "machine": machine(),
            "torch": torch.__version__,
        },
    )


def _true_loss(name: PlaneName) -> float:
    """Mean negative true log-density of the test points."""
    return -float(densities.log_density(name, load(name).test.double()).mean())


def _panel(contest: Contest, truth: float) -> Panel:
    courses = [
        Course(
            entry.label,
            [series(r, "step") for r in entry.results],
            [series(r, "cpu_seconds") for r in entry.results],
            [[nll - truth for nll in series(r, "nll")] for r in entry.results],
            next((r["mesh"] for r in entry.results[:1]), None),
        )
        for entry in contest.entries
    ]
    targets = {_name(m, contest): target - truth for m, target in contest.targets.items()}
    return Panel(contest.density, load(contest.density).test.numpy(), courses, targets)


def _name(margin: float, contest: Contest) -> str:
    label = contest.baseline.label
    return f"{label} + {margin:g}" if margin else f"{label}, final"


def _rows(contest: Contest) -> Sequence[dict[str, Any]]:
    """Every run, those of the tuning first."""
    rows = []
    for entry in contest.entries:
        tried = [(r.lr, r.seed, "tuning", result) for r, result in entry.trials]
        final = [(entry.lr, seed, "final", result) for seed, result in enumerate(entry.results)]
        rows += [
            {
                "kind": kind,
                "density": contest.density,
                "method": entry.label,
                "lr": lr,
                "seed": seed,
                "diverged_step": result["diverged_step"],
                "curve": {key: series(result, key) for key in result["points"][0]},
                **({"unseen": result["unseen"]} if result["unseen"] else {}),
            }
            for lr, seed, kind, result in [*tried, *final]
        ]
    return rows
