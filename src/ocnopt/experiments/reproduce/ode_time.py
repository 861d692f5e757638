"""The integration time, trained along with the weights: fixed, first order, feedback."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ocnopt.experiments import datasets
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.horizon import Horizon, train_horizon
from ocnopt.experiments.problems import DatasetName
from ocnopt.experiments.reproduce.kept import kept_runs
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.experiments.significance import difference

__all__ = ["run"]

DATASET: DatasetName = "fashion-mnist"
#: Samples that candidates are compared on, taken from the end of the training set.
HELD = 5000
#: c, in units of the loss per time^2; the scripts of the paper use 6e-4 with a derivative that is
#: divided by the batch's 128 samples once too often, which makes about .08 here.
PENALTIES = (0.08, 0.3)
#: As many candidates for one rule as for the other.
RATES = {"first-order": (0.1, 0.3, 1.0, 3.0), "feedback": (0.1, 0.2, 0.4, 0.8)}
TUNING_STEPS, STEPS = 200, 400
QUICK_TUNING_STEPS, QUICK_STEPS = 20, 40
TUNING_SEED, SEEDS = 100, 3
#: The time at the end is the mean over so many last points.
LAST = 5

Result = dict[str, Any]


def run(settings: Settings, watcher: Watcher) -> Report:
    """Tune both rules alike, run them and a fixed time over several seeds, and compare.

    Args:
        settings: What to do.
        watcher: Told how it goes.

    Raises:
        InputError: The data are not there.
    """
    data = datasets.load(DATASET, settings.data_root)
    if settings.quick:
        data = _first(data, 2000, 500)
    penalties = PENALTIES[:1] if settings.quick else PENALTIES
    tuning = _tuning(settings.quick, penalties)
    seeds = range(settings.seeds or (1 if settings.quick else SEEDS))
    watcher.start(len(tuning) + len(seeds) * (1 + 2 * len(penalties)))
    tried = kept_runs(settings, "ode-time tuning", tuning, _held_out(data), _train, watcher)
    chosen = {
        (c, rule): _best([t for t in tried if t[0].penalty == c and t[0].rule == rule])
        for c in penalties
        for rule in RATES
    }
    steps = QUICK_STEPS if settings.quick else STEPS
    finals = [
        replace(horizon, seed=seed, steps=steps)
        for horizon in (_fixed(tuning[0]), *chosen.values())
        for seed in seeds
    ]
    found = kept_runs(settings, "ode-time", finals, data, _train, watcher)
    table = [_row(c, rule, found) for c in penalties for rule in ("fixed", *RATES)]
    sentence = _sentence(penalties, found)
    from ocnopt.experiments.figures.horizon import save_horizons

    save_horizons(
        settings.picture,
        "Integration time of a Neural ODE (Fashion-MNIST)",
        {
            f"penalty {c:g}": {
                rule: [r["points"] for _, r in _of(found, c, rule)] for rule in ("fixed", *RATES)
            }
            for c in penalties
        },
    )
    columns = ["penalty", "rule", "lr", "t1", "objective", "accuracy", "evaluations", "seconds"]
    page = _page(settings, sentence, columns, table, tried, finals[0])
    rows = [{**asdict(h), **r} for h, r in [*tried, *found]]
    facts = {"dataset": DATASET, "seeds": len(seeds), "steps": steps, "held_out": HELD}
    return Report(columns, table, sentence, page, rows, facts)


def _train(horizon: Horizon, data: Data) -> Result:
    return train_horizon(horizon, data)


def _tuning(quick: bool, penalties: Sequence[float]) -> list[Horizon]:
    steps, channels = (QUICK_TUNING_STEPS, 4) if quick else (TUNING_STEPS, 12)
    return [
        Horizon(rule, lr, c, TUNING_SEED, steps=steps, channels=channels, every=10 if quick else 20)
        for c in penalties
        for rule, rates in RATES.items()
        for lr in (rates[:1] if quick else rates)
    ]


def _fixed(like: Horizon) -> Horizon:
    return replace(like, rule="fixed", lr=0.0, penalty=0.0)


def _first(data: Data, train: int, test: int) -> Data:
    return replace(
        data,
        train_x=data.train_x[:train],
        train_y=data.train_y[:train],
        test_x=data.test_x[:test],
        test_y=data.test_y[:test],
    )


def _held_out(data: Data) -> Data:
    """The end of the training set in place of the test set."""
    held = min(HELD, len(data.train_y) // 4)
    return replace(
        data,
        train_x=data.train_x[:-held],
        train_y=data.train_y[:-held],
        test_x=data.train_x[-held:],
        test_y=data.train_y[-held:],
    )


def _end(result: Result) -> float:
    """The time at the end."""
    return statistics.fmean(p["time"] for p in result["points"][-LAST:])


def _objective(result: Result, penalty: float) -> float:
    """``loss + c / 2 T^2``; infinite where the run diverged."""
    if result["test_loss"] is None:
        return float("inf")
    return float(result["test_loss"]) + penalty / 2 * _end(result) ** 2


def _best(tried: list[tuple[Horizon, Result]]) -> Horizon:
    return min(tried, key=lambda pair: _objective(pair[1], pair[0].penalty))[0]


def _of(
    found: list[tuple[Horizon, Result]], penalty: float, rule: str
) -> list[tuple[Horizon, Result]]:
    """The runs of a rule; a fixed time knows no penalty."""
    return [
        (h, r) for h, r in found if h.rule == rule and (rule == "fixed" or h.penalty == penalty)
    ]


def _spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def _row(penalty: float, rule: str, found: list[tuple[Horizon, Result]]) -> list[str]:
    mine = _of(found, penalty, rule)
    done = [r for _, r in mine if r["diverged"] is None]
    name = rule if len(done) == len(mine) else f"{rule} ({len(mine) - len(done)} diverged)"
    lr = "" if rule == "fixed" else f"{mine[0][0].lr:g}"
    if not done:
        return [f"{penalty:g}", name, lr, *["-"] * 5]
    last = [r["points"][-LAST:] for r in done]
    return [
        f"{penalty:g}",
        name,
        lr,
        _spread([_end(r) for r in done], 2),
        _spread([_objective(r, penalty) for r in done]),
        _spread([100 * r["test_accuracy"] for r in done], 1),
        _spread([statistics.fmean(p["evaluations"] for p in points) for points in last], 1),
        _spread([points[-1]["seconds"] for points in last], 1),
    ]


def _sentence(penalties: Sequence[float], found: list[tuple[Horizon, Result]]) -> str:
    parts = []
    for c in penalties:
        values = {
            rule: [_objective(r, c) for _, r in _of(found, c, rule)] for rule in ("fixed", *RATES)
        }
        for other in ("first-order", "fixed"):
            sign = difference(values["feedback"], values[other]) if len(values[other]) > 1 else 0
            verdict = {-1: "lower than", 0: "within the spread of", 1: "higher than"}[sign]
            name = "the first-order rule's" if other == "first-order" else "a fixed time's"
            parts.append(f"{verdict} {name}")
        parts[-2:] = [f"at penalty {c:g} {parts[-2]} and {parts[-1]}"]
    return (
        f"with feedback the objective, loss plus penalty, is {'; '.join(parts)} "
        f"({len(_of(found, penalties[0], 'feedback'))} seeds)"
    )


def _page(
    settings: Settings,
    sentence: str,
    columns: list[str],
    table: list[list[str]],
    tried: list[tuple[Horizon, Result]],
    like: Horizon,
) -> str:
    tuning = [
        [
            f"{h.penalty:g}",
            h.rule,
            f"{h.lr:g}",
            f"{_objective(r, h.penalty):.4f}" if r["diverged"] is None else "diverged",
            f"{_end(r):.2f}" if r["points"] else "-",
        ]
        for h, r in tried
    ]
    return "\n".join(
        [
            "# The integration time, trained along with the weights",
            "",
            "Liu, Chen and Theodorou, *Second-order Neural ODE Optimizer*, NeurIPS 2021, optimize "
            "the time up to which a Neural ODE is solved together with its weights: a penalty on "
            "the time against the loss that a longer time buys. The rule with feedback takes a "
            "share of the Newton step in t1 and answers what the weights have just done; the "
            "first-order rule descends. The paper shows it on CIFAR-10 with a penalty in units of "
            "its own; no figure of it can be put beside ours.",
            "",
            f"{sentence[0].upper()}{sentence[1:]}.",
            "",
            f"![Time and evaluations over training]({settings.name}.png)",
            "",
            markdown_table(columns, table),
            "",
            "Means ± standard deviations over seeds. t1 and the evaluations of the field per step "
            f"(forward and backward) are means over the last {LAST} changes of the time; the "
            "objective is the test loss plus penalty / 2 · t1²; accuracy in %; seconds of one core "
            "for the whole run, training alone.",
            "",
            f"The image network with {like.channels} channels on Fashion-MNIST, batches of "
            f"{like.batch_size}, {like.steps} iterations of Adam at {like.weights_lr:g}; t1 starts "
            f"at {like.t1:g} and changes every {like.every} iterations, averages decay by "
            f"{like.decay:g}. dopri5 at tolerances of 1e-3. A penalty of 0.08 is about what the "
            "released scripts amount to with the derivative that their code divides by the batch's "
            "size once too often.",
            "",
            "## Learning rates of the time",
            "",
            f"As many for one rule as for the other, {tried[0][0].steps} iterations from a seed of "
            "their own; the least objective on samples held out of the training set decides.",
            "",
            markdown_table(["penalty", "rule", "lr", "objective", "t1"], tuning),
            "",
            f"Written by `{settings.command}`.",
        ]
    )
