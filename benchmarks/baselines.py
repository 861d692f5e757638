"""Options of the optimal-control baselines on DIGITS: how their defaults were chosen.

    python benchmarks/baselines.py [--seeds 3] [--output docs/results]

Five tanh layers of width 16, batch 32; the same initial weights and batches for all. The loss is
the mean over the last tenth of the steps.
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
from torch import nn

import ocnopt
from ocnopt.experiments.datasets import Data, load
from ocnopt.experiments.networks import FCN, fcn
from ocnopt.experiments.order import DataOrder

STEPS = 300
BATCH = 32
CRITERION = nn.CrossEntropyLoss()

Build = Callable[[nn.Module], torch.optim.Optimizer]

#: By table, then by row: the optimizer, and its share of the steps where a step takes very long.
TABLES: dict[str, dict[str, tuple[Build, float]]] = {
    "VanillaDDP": {
        f"{batch}, dynamics_order={order}": (
            lambda m, b=batch, o=order: ocnopt.VanillaDDP(m, CRITERION, batch=b, dynamics_order=o),
            0.2 if batch == "joint" else 1.0,
        )
        for batch in ("mean", "share", "joint")
        for order in (1, 2)
    },
    "EMSA": {
        f"rho={rho:g}, inner_steps={steps}": (
            lambda m, r=rho, s=steps: ocnopt.EMSA(m, CRITERION, rho=r, inner_steps=s),
            1.0,
        )
        for rho in (0.1, 1.0, 3.0, 10.0)
        for steps in (5, 10)
    },
    "In the ordinary loop": {
        **{
            f"SGD, lr {lr:g}": (lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr), 1.0)
            for lr in (0.1, 0.4)
        },
        **{
            f"DDPNOpt, lr {lr:g}": (lambda m, lr=lr: ocnopt.DDPNOpt(m, CRITERION, lr=lr), 1.0)
            for lr in (0.1, 0.4)
        },
    },
}


def train(build: Build, data: Data, seed: int, steps: int) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(seed)
    model = fcn(FCN((16, 16, 16, 16), "tanh"), data.shape, data.classes)
    optimizer = build(model)
    takes_batch = isinstance(optimizer, ocnopt.VanillaDDP | ocnopt.EMSA)
    order = DataOrder(len(data.train_x), BATCH, seed, torch.device("cpu"))
    losses: list[float] = []
    failed = ""
    start = time.perf_counter()
    for step in range(steps):
        index = order.batch(step)
        x, y = data.train_x[index], data.train_y[index]
        try:
            if takes_batch:
                losses.append(float(optimizer.step(x, y)))
                continue
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        except ocnopt.NonFiniteError as error:
            failed = str(error)
            break
    with torch.no_grad():
        right = (model(data.test_x).argmax(1) == data.test_y).double().mean()
    last = losses[-max(1, steps // 10) :]
    return {
        "seed": seed,
        "steps": steps,
        "loss": statistics.fmean(last) if last and not failed else math.inf,
        "accuracy": float(right),
        "milliseconds": 1e3 * (time.perf_counter() - start) / steps,
        "failed": failed,
    }


def page(rows: list[dict[str, Any]], seeds: int) -> str:
    """All tables."""
    lines = [
        "# Options of the optimal-control baselines",
        "",
        f"Written by `python benchmarks/baselines.py --seeds {seeds}`. DIGITS, five tanh layers "
        f"of width 16, batch {BATCH}, {seeds} seeds. Training loss over the last tenth of the "
        "steps, test accuracy in % (every seed), and milliseconds per step on one thread (of a "
        "shared machine: compare "
        "within the table alone).",
        "",
    ]
    for title, table in TABLES.items():
        lines += [f"## {title}", "", "| | steps | loss | accuracy | ms |", "|---|---|---|---|---|"]
        for name in table:
            mine = [r for r in rows if r["table"] == title and r["name"] == name]
            losses = " ".join("failed" if r["failed"] else f"{r['loss']:.3g}" for r in mine)
            accuracies = " ".join(f"{100 * r['accuracy']:.1f}" for r in mine)
            ms = statistics.median(r["milliseconds"] for r in mine)
            lines.append(f"| {name} | {mine[0]['steps']} | {losses} | {accuracies} | {ms:.3g} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run all and write baselines.md and .json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = load("digits")
    rows = [
        {"table": title, "name": name, **train(build, data, seed, int(STEPS * part))}
        for title, table in TABLES.items()
        for name, (build, part) in table.items()
        for seed in range(chosen.seeds)
    ]
    for row in rows:
        row["loss"] = row["loss"] if math.isfinite(row["loss"]) else None
    (chosen.output / "baselines.json").write_text(json.dumps(rows, indent=1) + "\n")
    (chosen.output / "baselines.md").write_text(page(rows, chosen.seeds))


if __name__ == "__main__":
    main()
