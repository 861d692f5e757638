"""Choose how exactly EKFAC measures samples' gradients: ``gram_tolerance``.

    python benchmarks/gram_tolerance.py --data-root DIR [--nets residual,inception,wide]

DGNOpt trains on CIFAR-10, at every tolerance from the same start. At some steps of the exact run
(tolerance 0) the next update is formed with every other tolerance from the same state: how far
that is from the exact update, relative to it and to what the value function changes in it (the
update without recursion is the exact one less that). Time per step is measured in turns.

Writes docs/results/gram-tolerance.md and, beside it, the figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_cost import CYCLE, Net, Run, own, seconds_over_cycles
from torch import Tensor, nn

import ocnopt
from ocnopt.curvature import EKFAC
from ocnopt.experiments.datasets import load
from ocnopt.experiments.networks import Inception, ResidualCNN, inception, residual_cnn
from ocnopt.experiments.order import DataOrder

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "gram-tolerance.md"
TOLERANCES = (0.0, 0.01, 0.03, 0.1, 0.3)
INFORMATION = ("feedback", "group-rational")
SHAPE, CLASSES, BATCH, RATE = (3, 32, 32), 10, 32, 0.1

NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: residual_cnn(ResidualCNN((16, 32, 64)), SHAPE, CLASSES),
    "inception": lambda: inception(Inception((16, 32, 64)), SHAPE, CLASSES),
    "wide": lambda: residual_cnn(ResidualCNN((64, 256), norm="batch"), SHAPE, CLASSES),
}
#: Steps of a run, fewer where one takes long, and those of its last that count.
STEPS = {"residual": 150, "inception": 150, "wide": 25}
LAST = 20


def dgnopt(model: nn.Module, information: str, tolerance: float, **options: Any) -> ocnopt.DGNOpt:
    """EKFAC at that tolerance, everything else at its default."""
    return ocnopt.DGNOpt(
        model,
        own(model),
        lr=RATE,
        information=information,
        preconditioner=EKFAC(gram_tolerance=tolerance),
        **options,
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step of the ordinary loop; the loss before it."""
    optimizer.zero_grad()
    loss: Tensor = own(model)(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class Trial:
    """What the next update would be, from a state that is left as it is."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self.state = copy.deepcopy(optimizer.state_dict())

    def update(self, information: str, tolerance: float, **options: Any) -> Tensor:
        """All parameters' change."""
        model = copy.deepcopy(self.model)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = dgnopt(model, information, tolerance, **options)
        optimizer.load_state_dict(copy.deepcopy(self.state))
        for group in optimizer.param_groups:
            group["preconditioner"]["gram_tolerance"] = tolerance
        step(model, optimizer, self.x, self.y)
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def probe(trial: Trial, information: str) -> dict[float, tuple[float, float]]:
    """Per tolerance: the update's error, relative to it and to what the recursion changes."""
    exact = trial.update(information, 0.0)
    changed = (exact - trial.update(information, 0.0, bellman="off")).norm()
    found = {}
    for tolerance in TOLERANCES[1:]:
        error = (trial.update(information, tolerance) - exact).norm()
        found[tolerance] = (float(error / exact.norm()), float(error / changed))
    return found


def train(net: str, information: str, seed: int, data: Any) -> dict[str, Any]:
    """Losses at every tolerance, and the exact run's probes, late in a cycle and after it."""
    losses, probes = {}, []
    order = DataOrder(len(data.train_y), BATCH, seed, torch.device("cpu"))
    for tolerance in TOLERANCES:
        torch.manual_seed(seed)
        model = NETS[net]()
        optimizer = dgnopt(model, information, tolerance)
        seen = []
        for i in range(STEPS[net]):
            x, y = (part[order.batch(i)] for part in (data.train_x, data.train_y))
            if not tolerance and i % (4 * CYCLE) in (CYCLE - 1, CYCLE):
                probes.append(probe(Trial(model, optimizer, x, y), information))
            seen.append(step(model, optimizer, x, y))
        losses[str(tolerance)] = statistics.fmean(seen[-LAST:])
    return {
        "losses": losses,
        "errors": {
            str(tolerance): [found[tolerance] for found in probes] for tolerance in TOLERANCES[1:]
        },
    }


def _timed_net(net: str, data: Any) -> Net:
    return NETS[net](), data.train_x[:BATCH], data.train_y[:BATCH]


def times(net: str, data: Any, cycles: int) -> dict[str, dict[str, float]]:
    """Seconds per step relative to EKFAC's, refreshes included."""
    build = partial(_timed_net, net, data)
    optimizers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "EKFAC": lambda m: ocnopt.EKFAC(m, own(m), lr=RATE)
    }
    for information in INFORMATION:
        for tolerance in TOLERANCES:
            optimizers[f"{information} {tolerance}"] = partial(
                dgnopt, information=information, tolerance=tolerance
            )
    runs = {name: Run(build, make, torch.device("cpu")) for name, make in optimizers.items()}
    means = seconds_over_cycles(runs, cycles)
    return {
        information: {str(t): means[f"{information} {t}"] / means["EKFAC"] for t in TOLERANCES}
        for information in INFORMATION
    }


def _spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {spread:.3f}"


def page(figures: dict[str, Any], seeds: int) -> str:
    """The tables as Markdown."""
    chosen = EKFAC().gram_tolerance
    steps = ", ".join(f"{STEPS[net]} ({net})" for net in figures)
    lines = [
        "# How exactly samples' gradients are measured",
        "",
        "Written by `python benchmarks/gram_tolerance.py`. DGNOpt with EKFAC on CIFAR-10, batches",
        f"of {BATCH}, learning rate {RATE:g}, steps: {steps}; {seeds} seeds. A tolerance bounds",
        "the relative error of samples' Gram numbers; what becomes of it is measured: the error",
        "of the update at the same state, worst over steps and seeds, relative to the update, and",
        "to what the recursion changes in it. Time per step is relative to EKFAC's, refreshes",
        f"included; training loss is the mean over the last {LAST} steps.",
        "",
        f"The default is {chosen:g}.",
    ]
    for net, found in figures.items():
        for information in INFORMATION:
            runs = found["runs"][information]
            lines += [
                "",
                f"## {net}, {information}",
                "",
                "| tolerance | time | error of the update | of what the recursion changes | loss |",
                "|---|---|---|---|---|",
            ]
            for tolerance in map(str, TOLERANCES):
                pairs = [
                    pair for run in runs for pair in run["errors"].get(tolerance, [(0.0, 0.0)])
                ]
                whole, part = (max(values) for values in zip(*pairs, strict=True))
                loss = _spread([run["losses"][tolerance] for run in runs])
                time = found["times"][information][tolerance]
                lines.append(f"| {tolerance} | {time:.2f} | {whole:.1e} | {part:.1e} | {loss} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = load("cifar-10", asked.data_root)
    figures: dict[str, Any] = {}
    for net in asked.nets.split(","):
        figures[net] = {
            "times": times(net, data, asked.cycles),
            "runs": {
                information: [train(net, information, seed, data) for seed in range(asked.seeds)]
                for information in INFORMATION
            },
        }
        text = page(figures, asked.seeds)  # with what there is so far: a network takes long
        asked.page.write_text(text)
        asked.page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
