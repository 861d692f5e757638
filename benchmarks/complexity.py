"""Table 4 as measured slopes: how time and memory of a step grow with batch size and width.

    python benchmarks/complexity.py [--rounds 7] [--output docs/results]

All optimizers take turns in one run on one thread, one step each per round; the median is reported.
A slope is the least-squares exponent over the largest three sizes, in log-log. Memory is the peak
of live tensor storage during a step, beyond what exists before it. Five linear layers with tanh.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import ocnopt
from ocnopt.experiments.peak_memory import PeakMemory

CRITERION = nn.CrossEntropyLoss()
LAYERS = 5
CLASSES = 10
BATCHES = (8, 16, 32, 128, 512, 2048, 8192)
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
FIXED_WIDTH, FIXED_BATCH = 24, 8


def _ordinary(build: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[nn.Module], Any]:
    """A step of the ordinary loop."""

    def make(model: nn.Module) -> Callable[[Tensor, Tensor], object]:
        optimizer = build(model)

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()

        return step

    return make


#: By name: how to step, and the largest batch size and width that are tried.
METHODS: dict[str, tuple[Callable[[nn.Module], Any], int, int]] = {
    "SGD": (_ordinary(lambda m: torch.optim.SGD(m.parameters(), 1e-3)), 8192, 1024),
    "Adam": (_ordinary(lambda m: torch.optim.Adam(m.parameters(), 1e-4)), 8192, 1024),
    "EKFAC": (_ordinary(lambda m: ocnopt.EKFAC(m, CRITERION, lr=1e-4)), 8192, 512),
    "DDPNOpt": (_ordinary(lambda m: ocnopt.DDPNOpt(m, CRITERION, lr=1e-3)), 8192, 1024),
    "DDPNOpt, full": (
        _ordinary(lambda m: ocnopt.DDPNOpt(m, CRITERION, lr=1e-3, terminal="full")),
        2048,
        256,
    ),
    "EMSA": (lambda m: ocnopt.EMSA(m, CRITERION).step, 8192, 512),
    "VanillaDDP": (lambda m: ocnopt.VanillaDDP(m, CRITERION).step, 2048, 512),
    "VanillaDDP, every term": (
        lambda m: ocnopt.VanillaDDP(m, CRITERION, dynamics_order=2).step,
        512,
        64,
    ),
    "VanillaDDP, joint": (
        lambda m: ocnopt.VanillaDDP(m, CRITERION, batch="joint", dynamics_order=2).step,
        32,
        32,
    ),
}

#: The paper's Table 4: exponents of (B, X) in time and in memory.
PAPER = {
    "Adam": "O(B X^2) / O(X^2)",
    "DDPNOpt": "O(B X^2) / O(X^2 + B X)",
    "VanillaDDP, joint": "O(B^3 X^3) / O(B X^3)",
}


def network(width: int) -> nn.Module:
    """Five linear layers."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS - 1):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def measure(batch: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Median seconds and peak bytes of every optimizer that goes this far."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, width), torch.randint(CLASSES, (batch,))
    steps = {}
    for name, (make, most_batch, most_width) in METHODS.items():
        if batch <= most_batch and width <= most_width:
            steps[name] = make(network(width))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # first calls set things up
        step(x, y)
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, step in steps.items():
        with PeakMemory() as live:
            step(x, y)
        rows.append(
            {
                "method": name,
                "batch": batch,
                "width": width,
                "seconds": statistics.median(seconds[name]),
                "bytes": live.peak,
            }
        )
    return rows


def slope(sizes: list[int], values: list[float]) -> float:
    """Least-squares exponent over the largest three sizes."""
    xs = [math.log(s) for s in sizes[-3:]]
    ys = [math.log(v) for v in values[-3:]]
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    top = sum((a - mx) * (b - my) for a, b in zip(xs, ys, strict=True))
    return top / sum((a - mx) ** 2 for a in xs)


def series(rows: list[dict[str, Any]], name: str, axis: str) -> tuple[list[int], Any]:
    """Sizes along one axis, the other one fixed, and the rows there."""
    other, fixed = ("width", FIXED_WIDTH) if axis == "batch" else ("batch", FIXED_BATCH)
    mine = [r for r in rows if r["method"] == name and r["axis"] == axis and r[other] == fixed]
    mine.sort(key=lambda r: r[axis])
    return [r[axis] for r in mine], mine


def page(rows: list[dict[str, Any]], rounds: int) -> str:
    """The table of slopes, and the times and memory behind it."""
    lines = [
        "# How a step grows with batch size and width",
        "",
        f"Written by `python benchmarks/complexity.py`: {LAYERS} linear layers, one thread, "
        f"float32, median of {rounds} interleaved rounds. Exponents are slopes in log-log over the "
        f"largest three sizes, with the other size fixed (width {FIXED_WIDTH} or batch "
        f"{FIXED_BATCH}); at small sizes every method is dominated by the cost of "
        "calling operations, which pulls a slope below its limit.",
        "",
        "| method | time ~ B^ | time ~ X^ | memory ~ B^ | memory ~ X^ | Table 4: time / memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        cells = []
        for what in ("seconds", "bytes"):
            for axis in ("batch", "width"):
                sizes, mine = series(rows, name, axis)
                cells.append(f"{slope(sizes, [r[what] for r in mine]):.2f} ({sizes[-1]})")
        lines.append(f"| {name} | {' | '.join(cells)} | {PAPER.get(name, '')} |")
    lines += ["", "In brackets: the largest size measured.", ""]
    for axis, sizes in (("batch", BATCHES), ("width", WIDTHS)):
        fixed = f"width {FIXED_WIDTH}" if axis == "batch" else f"batch {FIXED_BATCH}"
        lines += [
            f"## Milliseconds (MiB) by {'batch size' if axis == 'batch' else axis}, {fixed}",
            "",
            "| method | " + " | ".join(map(str, sizes)) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for name in METHODS:
            found, mine = series(rows, name, axis)
            cell = {
                s: f"{1e3 * r['seconds']:.1f} ({r['bytes'] / 2**20:.2g})"
                for s, r in zip(found, mine, strict=True)
            }
            lines.append(f"| {name} | " + " | ".join(cell.get(s, "") for s in sizes) + " |")
        lines.append("")
    return "\n".join([*lines, "![Time and memory](complexity.png)", ""])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against both sizes, in log-log."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2)
    colours = (
        "#000000",
        "#999999",
        "#e69f00",
        "#0072b2",
        "#56b4e9",
        "#009e73",
        "#d55e00",
        "#cc79a7",
        "#7b3294",
    )
    for row, (what, unit, scale) in zip(
        grid, (("seconds", "ms per step", 1e3), ("bytes", "MiB", 2**-20)), strict=True
    ):
        for ax, axis in zip(row, ("batch", "width"), strict=True):
            for colour, name in zip(colours, METHODS, strict=True):
                sizes, mine = series(rows, name, axis)
                values = [scale * r[what] for r in mine]
                ax.loglog(sizes, values, color=colour, marker="o", ms=3, lw=1.2, label=name)
            fixed = f"width {FIXED_WIDTH}" if axis == "batch" else f"batch {FIXED_BATCH}"
            ax.set(xlabel=f"{'batch size' if axis == 'batch' else 'width'} ({fixed})", ylabel=unit)
    grid[0][1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and write complexity.md, .json and .png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for batch in BATCHES:
        rows += [{**r, "axis": "batch"} for r in measure(batch, FIXED_WIDTH, chosen.rounds)]
    for width in WIDTHS:
        rows += [{**r, "axis": "width"} for r in measure(FIXED_BATCH, width, chosen.rounds)]
    text = page(rows, chosen.rounds)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "complexity.json").write_text(json.dumps(rows, indent=1) + "\n")
    (chosen.output / "complexity.md").write_text(text)
    draw(rows, chosen.output / "complexity.png")


if __name__ == "__main__":
    main()
