"""Training loss against learning rate on DIGITS: DDPNOpt beside the optimizers it extends.

    python benchmarks/robustness.py [--seeds 5] [--processes 2]

Five tanh layers, batch 8, 1,500 steps; the same initial weights and batches for both. Writes
docs/results/robustness.{md,json,png}. The loss is the mean over the last epoch's steps; a run whose
loss is no number counts as 5, and is counted.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.training import train

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
CAP = 5.0
PAIRS: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "identity": ("sgd", {}, [0.05, 0.1, 0.2, 0.4, 0.6, 0.7]),
    "rmsprop": ("rmsprop", {"preconditioner": "rmsprop"}, [0.001, 0.003, 0.01, 0.02, 0.03]),
    "adam": ("adam", {"preconditioner": "adam"}, [0.001, 0.003, 0.01, 0.03]),
}
NAMES = {"sgd": "SGD", "rmsprop": "RMSprop", "adam": "Adam"}

Task = tuple[str, float, bool, int, int]


def run(task: Task) -> dict[str, Any]:
    """One run; returns its row."""
    pair, lr, feedback, seed, steps = task
    lender, options, _ = PAIRS[pair]
    config = TrainConfig(
        dataset="digits",
        optimizer="ddpnopt" if feedback else lender,  # type: ignore[arg-type]
        options=options if feedback else {},
        lr=lr,
        seed=seed,
        steps=steps,
        threads=1,
    )
    result = train(config)
    loss = result.train_loss
    return {
        "pair": pair,
        "lr": lr,
        "feedback": feedback,
        "seed": seed,
        "loss": loss if math.isfinite(loss) else CAP,
        "failed": not math.isfinite(loss),
        "accuracy": result.test_accuracy,
    }


def cell(rows: list[dict[str, Any]]) -> str:
    """Mean and spread of loss, mean accuracy, failed runs."""
    losses = [min(row["loss"], CAP) for row in rows]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    accuracy = 100 * statistics.fmean(row["accuracy"] for row in rows)
    failed = sum(row["failed"] for row in rows)
    note = f" ({failed} failed)" if failed else ""
    return f"{statistics.fmean(losses):.3f} ± {spread:.3f} / {accuracy:.1f}{note}"


def report(rows: list[dict[str, Any]], seeds: int, steps: int) -> str:
    """The page."""
    lines = [
        "# Robustness to the learning rate",
        "",
        "Written by `python benchmarks/robustness.py`. DIGITS, five tanh layers, batch 8, "
        f"{steps} steps, {seeds} seeds; training loss over the last epoch (mean ± standard "
        "deviation over seeds) / test accuracy in %. *Ratio*: mean loss with feedback over mean "
        "loss without.",
        "",
        "![Training loss against learning rate](robustness.png)",
    ]
    for pair, (lender, _, lrs) in PAIRS.items():
        lines += [
            "",
            f"## {NAMES[lender]}",
            "",
            f"| learning rate | {NAMES[lender]} | DDPNOpt, M = {pair} | ratio |",
            "|---|---|---|---|",
        ]
        for lr in lrs:
            both = [
                [r for r in rows if (r["pair"], r["lr"], r["feedback"]) == (pair, lr, on)]
                for on in (False, True)
            ]
            means = [statistics.fmean(min(r["loss"], CAP) for r in part) for part in both]
            lines.append(
                f"| {lr:g} | {cell(both[0])} | {cell(both[1])} | {means[1] / means[0]:.2f} |"
            )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss against learning rate, one panel per preconditioner."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PAIRS), figsize=(10, 3.2), layout="constrained")
    for axis, (pair, (lender, _, lrs)) in zip(axes, PAIRS.items(), strict=True):
        for on, label, color in (
            (False, NAMES[lender], "tab:gray"),
            (True, "DDPNOpt", "tab:blue"),
        ):
            table = [
                [
                    min(r["loss"], CAP)
                    for r in rows
                    if (r["pair"], r["lr"], r["feedback"]) == (pair, lr, on)
                ]
                for lr in lrs
            ]
            axis.plot(lrs, [statistics.fmean(x) for x in table], "o-", label=label, color=color)
            axis.fill_between(
                lrs, [min(x) for x in table], [max(x) for x in table], alpha=0.2, color=color, lw=0
            )
        axis.set(xscale="log", yscale="log", xlabel="learning rate", title=f"M = {pair}")
        axis.set_xticks(lrs, [f"{lr:g}" for lr in lrs], rotation=45)
        axis.minorticks_off()
        axis.legend()
    axes[0].set_ylabel("training loss, last epoch")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the command line, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    tasks: list[Task] = [
        (pair, lr, feedback, seed, asked.steps)
        for pair, (_, _, lrs) in PAIRS.items()
        for lr in lrs
        for feedback in (False, True)
        for seed in range(asked.seeds)
    ]
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        rows = pool.map(run, tasks, chunksize=1)
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "robustness.json").write_text(json.dumps(rows, indent=0) + "\n")
    page = report(rows, asked.seeds, asked.steps)
    (asked.output / "robustness.md").write_text(page)
    draw(rows, asked.output / "robustness.png")
    print(page)


if __name__ == "__main__":
    main()
