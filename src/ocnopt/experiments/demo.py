"""SGD and DDPNOpt side by side on DIGITS, at a good learning rate and at one that is too large.

Run it with `python -m ocnopt.experiments.demo`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures import save_curves
from ocnopt.experiments.files import write_json
from ocnopt.experiments.problems import OptimizerName
from ocnopt.experiments.terminal import TrainProgress, progress_bar
from ocnopt.experiments.training import TrainResult, train
from ocnopt.experiments.verdict import Comparison, Scores, mean_loss, sentence, spread

LEARNING_RATES = (0.1, 0.7)
OPTIMIZERS: tuple[tuple[OptimizerName, str], ...] = (("sgd", "SGD"), ("ddpnopt", "DDPNOpt"))
_WINDOW = 50

Results = dict[tuple[float, str], list[TrainResult]]


def run(seeds: int, steps: int) -> Results:
    """Train every optimizer at every learning rate under the same seeds.

    Args:
        seeds: Number of seeds.
        steps: Steps of each run.

    Returns:
        The runs by learning rate and optimizer, in the order of their seeds.
    """
    results: Results = {}
    with progress_bar() as progress:
        for lr in LEARNING_RATES:
            for seed in range(seeds):
                for name, label in OPTIMIZERS:
                    config = TrainConfig(
                        optimizer=name, lr=lr, seed=seed, steps=steps, log_every=_WINDOW
                    )
                    bar = TrainProgress(progress, f"{label:<8} lr {lr:g} seed {seed}")
                    results.setdefault((lr, name), []).append(train(config, bar))
    return results


def compare(results: Results) -> list[Comparison]:
    """Reduce the runs to the numbers that the table and the sentence rest on."""

    def scores(lr: float, name: str) -> Scores:
        runs = results[lr, name]
        return Scores(
            tuple(run.train_loss for run in runs), tuple(run.test_accuracy for run in runs)
        )

    return [Comparison(lr, scores(lr, "sgd"), scores(lr, "ddpnopt")) for lr in LEARNING_RATES]


def table(results: Results, comparisons: Sequence[Comparison]) -> Table:
    """Lay the comparisons out for a terminal: mean and standard deviation over seeds."""
    layout = Table(caption="mean ± standard deviation over seeds")
    layout.add_column("learning rate", justify="right")
    layout.add_column("optimizer")
    for heading in ("training loss, last epoch", "test accuracy (%)", "ms per step"):
        layout.add_column(heading, justify="right")
    for comparison in comparisons:
        for (name, label), scores in zip(
            OPTIMIZERS, (comparison.plain, comparison.feedback), strict=True
        ):
            percent = [100 * accuracy for accuracy in scores.accuracies]
            runs = results[comparison.lr, name]
            layout.add_row(
                f"{comparison.lr:g}" if name == "sgd" else "",
                label,
                _loss(scores),
                f"{fmean(percent):.1f} ± {spread(percent):.1f}",
                f"{fmean(1000 * run.seconds / run.steps for run in runs):.2f}",
                end_section=name == "ddpnopt",
            )
    return layout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        arguments: Words after the module's name; None takes those of this process.

    Returns:
        The exit code: 0, or 2 with one line on stderr where something that is needed is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ocnopt.experiments.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--seeds", type=_positive, default=3, help="seeds of each setting")
    parser.add_argument("--steps", type=_positive, default=1500, help="steps of each run")
    asked = parser.parse_args(arguments)
    console = Console()
    try:
        asked.output.mkdir(parents=True, exist_ok=True)
        results = run(asked.seeds, asked.steps)
    except (InputError, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    comparisons = compare(results)
    figure = asked.output / "curves.png"
    save_curves(
        figure,
        "DIGITS, five tanh layers, batches of 8; one line per seed",
        {
            f"learning rate {lr:g}": {
                label: [run.history for run in results[lr, name]] for name, label in OPTIMIZERS
            }
            for lr in LEARNING_RATES
        },
        _WINDOW,
    )
    runs = [run.summary() for by_seed in results.values() for run in by_seed]
    seen = sentence(comparisons, "SGD", "DDPNOpt")
    write_json(asked.output / "results.json", {"runs": runs, "seen": seen})
    console.print(table(results, comparisons))
    console.print(f"curves: {figure}", highlight=False)
    console.print(seen, highlight=False)
    return 0


def _loss(scores: Scores) -> str:
    text = mean_loss(scores)
    return text if "diverged" in text else f"{text} ± {spread(scores.losses):.3f}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
