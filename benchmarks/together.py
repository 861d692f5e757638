"""Ten seeds at once beside one after another: time per seed and step.

    python benchmarks/together.py [--seeds 10] [--steps 60] [--rounds 5]

The paper's DIGITS network, one thread; blocks of steps alternate between the two ways, medians over
rounds. Writes docs/results/together.{md,json}. That both come to the same numbers is a test
(tests/layers/test_stacked.py, tests/experiments/test_together.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.together import train_together
from ocnopt.experiments.training import train

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
CASES: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": "sgd", "lr": 0.1},
    "Adam": {"optimizer": "adam", "lr": 0.001},
    "EKFAC": {"optimizer": "ekfac", "lr": 0.03},
    "DDPNOpt": {"optimizer": "ddpnopt", "lr": 0.1},
    "DDPNOpt, rmsprop": {
        "optimizer": "ddpnopt",
        "lr": 0.001,
        "options": {"preconditioner": "rmsprop"},
    },
    "DDPNOpt, ekfac": {
        "optimizer": "ddpnopt",
        "lr": 0.03,
        "options": {"preconditioner": "ekfac"},
    },
    "DDPNOpt, full V_xx": {
        "optimizer": "ddpnopt",
        "lr": 0.1,
        "options": {"terminal": "full", "value_reg": 1e-3},
    },
}


def measure(case: dict[str, Any], seeds: int, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds per seed and step, alone and together."""
    config = TrainConfig(**{**RECIPES["digits-fcn"], **case, "steps": steps, "epochs": None})
    alone, shared = [], []
    for _ in range(rounds):
        result = train(replace(config, seed=0))
        alone.append(1e3 * result.seconds / result.steps)
        shared.append(1e3 * train_together(config, range(seeds))[0].seconds_per_step)
    return {"alone": statistics.median(alone), "together": statistics.median(shared)}


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        name: measure(case, asked.seeds, asked.steps, asked.rounds) for name, case in CASES.items()
    }
    lines = [
        "# Seeds trained together",
        "",
        "Written by `python benchmarks/together.py`. DIGITS, five tanh layers, batch 8, one "
        f"thread; milliseconds per seed and step, one seed alone and {asked.seeds} seeds as "
        f"stacked layers (median of {asked.rounds} interleaved rounds of {asked.steps} steps).",
        "",
        "| | alone | together | times faster |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        gain = row["alone"] / row["together"]
        lines.append(f"| {name} | {row['alone']:.2f} | {row['together']:.3f} | {gain:.1f} |")
    page = "\n".join(lines) + "\n"
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "together.md").write_text(page)
    (asked.output / "together.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
