"""Choose the damping of KFAC and EKFAC by a measured comparison on DIGITS.

    python benchmarks/damping.py [--seeds 2] [--processes 2]

Five tanh layers, batch 8, 700 steps; writes docs/results/damping.md. With small batches the
factors are singular, and a gradient that has left their span since they were refreshed is divided
by the damping alone.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from pathlib import Path

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.training import train

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "damping.md"
RATES = (0.01, 0.03, 0.1, 0.3)
DAMPINGS = (0.01, 0.03, 0.1, 0.3)
CAP = 5.0

Task = tuple[str, int, float, float, int]


def run(task: Task) -> float:
    """Training loss over the last epoch."""
    optimizer, every, damping, lr, seed = task
    options = {"update_every": every, "damping": damping}
    config = TrainConfig(
        optimizer=optimizer,  # type: ignore[arg-type]
        options=options,
        lr=lr,
        seed=seed,
        steps=700,
        threads=1,
    )
    loss = train(config).train_loss
    return min(loss, CAP) if math.isfinite(loss) else CAP


def main() -> None:
    """Read the command line, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    tasks: list[Task] = [
        (optimizer, every, damping, lr, seed)
        for optimizer in ("ekfac", "kfac")
        for every in (1, 10)
        for damping in DAMPINGS
        for lr in RATES
        for seed in range(asked.seeds)
    ]
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        losses = dict(zip(tasks, pool.map(run, tasks, chunksize=1), strict=True))
    lines = [
        "# Damping of KFAC and EKFAC",
        "",
        "Written by `python benchmarks/damping.py`. DIGITS, five tanh layers, batch 8, 700 steps: "
        f"mean training loss over the last epoch, {asked.seeds} seeds.",
        "",
        f"| optimizer | update_every | damping | {' | '.join(f'lr {lr:g}' for lr in RATES)} |",
        f"|---|---|---|{'---|' * len(RATES)}",
    ]
    for optimizer in ("ekfac", "kfac"):
        for every in (1, 10):
            for damping in DAMPINGS:
                cells = [
                    statistics.fmean(
                        losses[optimizer, every, damping, lr, seed] for seed in range(asked.seeds)
                    )
                    for lr in RATES
                ]
                row = " | ".join(f"{x:.3f}" for x in cells)
                lines.append(f"| {optimizer} | {every} | {damping:g} | {row} |")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
