"""Time per step of SNOpt relative to Adam on Neural ODEs, and memory against tolerance.

    python benchmarks/ode_cost.py [--rounds 15] [--page docs/results/ode-cost.md]

The optimizers take turns in one run, one step each per round, with learning rates so small that
all of them solve the same equations: what is compared is the step, not the fields that come of it.
A refresh, the step that looks at the adjoint once in ``update_every`` steps, is timed apart. Memory
is the peak of live tensor storage during forward and backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ocnopt
from ocnopt.experiments.networks import OdeCNN, ode_cnn
from ocnopt.experiments.peak_memory import PeakMemory
from ocnopt.ode import ConcatLinear, NeuralODE, TimedSequential

Net = tuple[nn.Module, Tensor, Tensor]
CRITERION = nn.CrossEntropyLoss()
UPDATE_EVERY = 100
TINY = 1e-9
TOLERANCES = (1e-3, 1e-5, 1e-7)


def _images(channels: int) -> Net:
    model = ode_cnn(OdeCNN(channels=channels), (1, 28, 28), 10)
    return model, torch.randn(128, 1, 28, 28), torch.randint(10, (128,))


def _vectors(**options: Any) -> Net:
    field = TimedSequential(ConcatLinear(64, 64), nn.Tanh(), ConcatLinear(64, 64))
    model = nn.Sequential(nn.Linear(20, 64), NeuralODE(field, **options), nn.Linear(64, 10))
    return model, torch.randn(256, 20), torch.randint(10, (256,))


NETS: dict[str, Callable[[], Net]] = {
    "images, 16 channels": lambda: _images(16),
    "images, 64 channels": lambda: _images(64),
    "vectors, 64 wide": _vectors,
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=TINY),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=TINY, momentum=0.9),
    "SNOpt": lambda m: ocnopt.SNOpt(m, lr=TINY, momentum=0.9, update_every=UPDATE_EVERY),
    "SNOpt, precondition_all": lambda m: ocnopt.SNOpt(
        m, lr=TINY, momentum=0.9, update_every=UPDATE_EVERY, precondition_all=True
    ),
}


class Run:
    """One optimizer on its own copy of a network and batch."""

    def __init__(self, net: Callable[[], Net], make: Callable[..., torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model, self.x, self.y = net()
        self.optimizer = make(self.model)

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        CRITERION(self.model(self.x), self.y).backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def refresh(self) -> float:
        """Seconds of a step that looks at the adjoint."""
        for state in self.optimizer.state.values():
            if "U_A" in state:
                state["step"] = 0
        return self.step()


def steps(net: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of an ordinary step and of a refresh per optimizer, medians."""
    runs = {name: Run(NETS[net], make) for name, make in OPTIMIZERS.items()}
    for run in runs.values():
        run.step()  # the first looks at the adjoint
        run.step()
    ordinary: dict[str, list[float]] = {name: [] for name in runs}
    refreshed: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            ordinary[name].append(run.step())
            if name.startswith("SNOpt") and i % 3 == 0:
                refreshed[name].append(run.refresh())
    return {
        name: {
            "ordinary": statistics.median(ordinary[name]),
            "refresh": statistics.median(refreshed[name] or ordinary[name]),
        }
        for name in runs
    }


def memory(adjoint: bool, tolerance: float, follow: bool) -> tuple[int, int]:
    """Peak bytes of a pass and its evaluations of the field.

    Args:
        adjoint: How gradients are made.
        tolerance: rtol and atol.
        follow: Whether the adjoint is looked at.
    """
    torch.manual_seed(0)
    model, x, y = _vectors(rtol=tolerance, atol=tolerance, adjoint=adjoint)
    model, x = model.double(), x.double()
    optimizer = ocnopt.SNOpt(model, lr=TINY) if follow else None
    ode = next(m for m in model.modules() if isinstance(m, NeuralODE))
    for p in ode.func.parameters():
        p.data.mul_(3)  # a field that takes some solving
    with PeakMemory() as peak:
        CRITERION(model(x), y).backward()
    del optimizer
    return peak.peak, sum(ode.evaluations[:2])


def page(
    figures: dict[str, dict[str, dict[str, float]]],
    peaks: dict[str, list[tuple[int, int]]],
    threads: int,
) -> str:
    """The tables as Markdown."""
    lines = [
        "# What a step of SNOpt costs",
        "",
        f"Written by `python benchmarks/ode_cost.py` ({threads} thread"
        f"{'s' if threads > 1 else ''}, torch {torch.__version__}).",
        "Steps relative to Adam's on the same network and the same equations, taken in turns in",
        f"one run, medians; a refresh comes once in {UPDATE_EVERY} steps. Mean: over such a cycle.",
        "",
        f"| optimizer | {' | '.join(f'{net}: step | refresh | mean' for net in figures)} |",
        f"|---|{'---|---|---|' * len(figures)}",
    ]
    for name in OPTIMIZERS:
        cells = []
        for table in figures.values():
            unit = table["Adam"]["ordinary"]
            ordinary, refresh = table[name]["ordinary"] / unit, table[name]["refresh"] / unit
            mean = ordinary + (refresh - ordinary) / UPDATE_EVERY
            shown = f"{refresh:.1f}" if name.startswith("SNOpt") else ""
            cells.append(f"{ordinary:.2f} | {shown} | {mean:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    itself = ", ".join(f"{n} {t['Adam']['ordinary'] * 1e3:.0f} ms" for n, t in figures.items())
    lines += [
        "",
        f"Adam itself: {itself}.",
        "",
        "A refresh evaluates the field 100 times more (`sample_step` 0.01 over a time of 1), back",
        "to its layers' outputs but not to its parameters, and adds up outer products of both.",
        "",
        "## Memory",
        "",
        "Peak of live tensors in a forward and backward pass of the network of vectors (float64,",
        "its field's weights times 3), MiB (evaluations of the field).",
        "",
        f"| gradient | {' | '.join(f'tolerance {t:g}' for t in TOLERANCES)} |",
        f"|---|{'---|' * len(TOLERANCES)}",
    ]
    for name, row in peaks.items():
        cells = [f"{size / 2**20:.2f} ({count})" for size, count in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nets", default=";".join(NETS), help="separated by semicolons")
    parser.add_argument("--page", type=Path, help="write the tables here, figures beside it")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    figures = {net: steps(net, asked.rounds) for net in asked.nets.split(";")}
    forms = {
        "adjoint": (True, False),
        "adjoint, looked at": (True, True),
        "through the steps": (False, False),
    }
    peaks = {
        name: [memory(adjoint, tolerance, follow) for tolerance in TOLERANCES]
        for name, (adjoint, follow) in forms.items()
    }
    text = page(figures, peaks, asked.threads)
    print(text)
    if asked.page:
        asked.page.write_text(text)
        found = {"steps": figures, "memory": peaks}
        asked.page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
