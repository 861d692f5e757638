"""Choose DDPNOpt's defaults by a measured comparison: recursion, bound, terminal cost, rollout.

    python benchmarks/defaults.py run    --data-root FOLDER   # resumes; one JSON line per run
    python benchmarks/defaults.py report                      # the table, from what was run

Every configuration is trained under the same seeds on the same batches as the optimizer that lends
its preconditioner (SGD, RMSprop or Adam), over several data sets, widths, activations and batch
sizes, at learning rates from good to far too large. What is compared is the training loss at the
end (mean over the last tenth of the steps), as the logarithm of its ratio to the lender's.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ocnopt
from ocnopt.experiments.datasets import Data, load
from ocnopt.experiments.networks import CNN, FCN, cnn, fcn

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
CAP = 5.0  # a loss beyond this, or no number at all, counts as this: training has failed
FLOOR = 0.02  # differences between losses below this are not worth counting

#: name: (data, training samples, recipe, batch size, steps, learning rates by lender)
PROBLEMS: dict[str, tuple[str, int | None, FCN | CNN, int, int, dict[str, list[float]]]] = {
    "digits": (
        "digits", None, FCN((32, 32, 32, 16), "tanh"), 8, 1000,
        {"identity": [0.1, 0.4, 0.6, 0.8], "rmsprop": [0.001, 0.01, 0.03],
         "adam": [0.001, 0.01, 0.03]},
    ),
    "digits-b32": (
        "digits", None, FCN((16, 16, 16, 16), "tanh"), 32, 400,
        {"identity": [0.2, 0.8, 1.2]},
    ),
    "wine": (
        "wine", None, FCN((16, 16, 16, 16), "tanh"), 8, 200,
        {"identity": [0.1, 0.5, 1.0], "rmsprop": [0.003, 0.01, 0.03],
         "adam": [0.003, 0.01, 0.03]},
    ),
    "fashion": (
        "fashion-mnist", 8000, FCN((32, 32, 32, 32), "relu"), 16, 600,
        {"identity": [0.05, 0.2, 0.5], "rmsprop": [0.0005, 0.002, 0.02],
         "adam": [0.0005, 0.002, 0.02]},
    ),
    "fashion-wide": (
        "fashion-mnist", 8000, FCN((128, 128, 128), "relu"), 64, 250,
        {"identity": [0.1, 0.4, 0.8]},
    ),
    "mnist-conv": (
        "mnist", 6000, CNN(channels=8, hidden=32), 64, 100,
        {"identity": [0.1, 0.3, 0.5], "rmsprop": [0.001, 0.01], "adam": [0.001, 0.01]},
    ),
}  # fmt: skip

DEFAULT = {
    "bellman": "share",
    "feedback_clip": 1.0,
    "terminal": "bounded",
    "rollout": "linear",
    "curvature": "gradient",
}
#: What differs from DEFAULT; None is the lender itself.
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "lender": None,
    "share, bound 1": {},
    "share, bound .5": {"feedback_clip": 0.5},
    "share, no bound": {"feedback_clip": None},
    "joint, bound 1": {"bellman": "joint"},
    "sample, bound 1": {"bellman": "sample"},
    "no recursion, bound 1": {"bellman": "off"},
    "no recursion, bound .5": {"bellman": "off", "feedback_clip": 0.5},
    "Eq. 5 literally, no bound": {"bellman": "literal", "feedback_clip": None},
    "share, matched": {"terminal": "matched"},
    "share, outer product": {"terminal": "outer-product"},
    "share, exact Hessian": {"terminal": "gauss-newton"},
    "share, nonlinear rollout": {"rollout": "nonlinear"},
    "share, no feedback": {"rollout": "off"},
    "share, M from the value": {"curvature": "value"},
}

DEFAULT_NAME = "share, bound 1"

#: What is compared with Adam, too; the rest was told apart with SGD and RMSprop.
WITH_ADAM = (
    "lender",
    "share, bound 1",
    "share, bound .5",
    "share, matched",
    "share, M from the value",
)

_loaded: dict[str, Data] = {}


def train(task: tuple[str, str, float, str, int, str]) -> dict[str, Any]:
    """One run; returns its row."""
    problem, lender, lr, configuration, seed, root = task
    torch.set_num_threads(1)
    name, limit, recipe, size, steps, _ = PROBLEMS[problem]
    data = _loaded.get(name)
    if data is None:
        data = _loaded[name] = load(name, Path(root))  # type: ignore[arg-type]
    x, y = data.train_x[:limit], data.train_y[:limit]
    torch.manual_seed(seed)
    build: Any = fcn if isinstance(recipe, FCN) else cnn
    model: nn.Module = build(recipe, data.shape, data.classes)
    criterion = nn.CrossEntropyLoss()
    changed = CONFIGURATIONS[configuration]
    options: dict[str, Any] = {"bellman": "off", "rollout": "off"}
    if changed is not None:
        options = {**DEFAULT, **changed}
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=lr, preconditioner=lender, **options)
    order = torch.Generator().manual_seed(1000 + seed)
    losses: list[torch.Tensor] = []
    failed = False
    indices = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(indices) < size:
            indices = torch.randperm(len(x), generator=order)
        batch, indices = indices[:size], indices[size:]
        optimizer.zero_grad()
        loss = criterion(model(x[batch]), y[batch])
        losses.append(loss.detach())
        loss.backward()
        try:
            optimizer.step()
        except ocnopt.NonFiniteError:
            failed = True
            break
    model.eval()
    with torch.no_grad():
        right = (model(data.test_x[:2000]).argmax(1) == data.test_y[:2000]).float().mean()
    last = torch.stack(losses[-max(1, steps // 10) :]).mean()
    return {
        "problem": problem,
        "lender": lender,
        "lr": lr,
        "configuration": configuration,
        "seed": seed,
        "loss": math.inf if failed or not bool(torch.isfinite(last)) else float(last),
        "accuracy": float(right),
    }


def tasks(seeds: int, root: str) -> list[tuple[str, str, float, str, int, str]]:
    """All runs, seeds outermost, so that an interrupted comparison is a smaller one."""
    return [
        (problem, lender, lr, configuration, seed, root)
        for seed in range(seeds)
        for problem, (*_, rates) in PROBLEMS.items()
        for lender, lrs in rates.items()
        for lr in lrs
        for configuration in CONFIGURATIONS
        # An exact Hessian is ten back-propagations: the smaller problems tell enough.
        if configuration != "share, exact Hessian" or problem in ("digits", "wine", "fashion")
        if lender != "adam" or configuration in WITH_ADAM
    ]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a run."""
    return tuple(row[k] for k in ("problem", "lender", "lr", "configuration", "seed"))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(path: Path, seeds: int, root: str, processes: int) -> None:
    """Run what is missing."""
    done = {key(row) for row in read(path)}
    todo = [task for task in tasks(seeds, root) if task[:5] not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with path.open("a") as out, context.Pool(processes) as pool:
        for i, row in enumerate(pool.imap_unordered(train, todo, chunksize=1), 1):
            out.write(json.dumps(row) + "\n")
            out.flush()
            if i % 50 == 0:
                print(f"{i} of {len(todo)} runs", flush=True)


def clipped(loss: float) -> float:
    """A loss as it is counted."""
    return min(max(loss, FLOOR), CAP)


def report(path: Path, page: Path) -> None:
    """Write the tables as Markdown."""
    losses: dict[tuple[str, str, float], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in read(path):
        setting = (row["problem"], row["lender"], row["lr"])
        losses[setting][row["configuration"]][row["seed"]] = row["loss"]
    best: dict[tuple[str, str], float] = {}
    for problem, lender, lr in losses:
        mean = statistics.fmean(map(clipped, losses[problem, lender, lr]["lender"].values()))
        known = best.get((problem, lender))
        if known is None or mean < statistics.fmean(
            map(clipped, losses[problem, lender, known]["lender"].values())
        ):
            best[problem, lender] = lr
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (problem, lender, lr), table in losses.items():
        where = "beyond" if lr > best[problem, lender] else "good"
        for configuration, by_seed in table.items():
            for seed, loss in by_seed.items():
                other = table["lender"][seed]
                ratio = math.log(clipped(loss) / clipped(other))
                ratios[configuration][where].append(ratio)
                ratios[configuration]["all"].append(ratio)
                if seed in table[DEFAULT_NAME]:
                    default = math.log(clipped(table[DEFAULT_NAME][seed]) / clipped(other))
                    ratios[configuration][f"default {where}"].append(default)
    lines = [
        "# How the defaults of DDPNOpt were chosen",
        "",
        "Written by `python benchmarks/defaults.py report` from `defaults.jsonl`; see the script",
        "for problems, seeds and what is counted. Ratio: geometric mean of the final training loss",
        "relative to the optimizer that lends M (SGD, RMSprop, Adam), under the same seeds; below",
        "1 is better than the lender. *Good*: learning rates up to its best; *beyond*: larger",
        "ones. *Harmed*: share of runs with a loss more than 5 % above the lender's at good rates.",
        "",
        "Not every configuration was run everywhere; the last column is what the default has on",
        "the settings of the row (good / beyond).",
        "",
        "| configuration | good | beyond | all | harmed | failed runs | default there |",
        "|---|---|---|---|---|---|---|",
    ]
    for configuration in CONFIGURATIONS:
        r = ratios[configuration]
        if not r["all"]:
            continue
        cells = [f"{math.exp(statistics.fmean(r[k])):.3f}" for k in ("good", "beyond", "all")]
        harmed = statistics.fmean(float(x > math.log(1.05)) for x in r["good"])
        failed = sum(
            not math.isfinite(loss)
            for table in losses.values()
            for loss in table[configuration].values()
        )
        there = [math.exp(statistics.fmean(r[f"default {k}"])) for k in ("good", "beyond")]
        lines.append(
            f"| {configuration} | {' | '.join(cells)} | {harmed:.0%} | {failed} | "
            f"{there[0]:.3f} / {there[1]:.3f} |"
        )
    lines += ["", "## Every setting", "", "Mean training loss over seeds (failed runs as 5)."]
    for problem, (*_, rates) in PROBLEMS.items():
        for lender, lrs in rates.items():
            head = " | ".join(
                f"lr {lr:g}{' (best)' if best.get((problem, lender)) == lr else ''}" for lr in lrs
            )
            lines += [
                "",
                f"### {problem}, M = {lender}",
                "",
                f"| configuration | {head} |",
                f"|---|{'---|' * len(lrs)}",
            ]
            for configuration in CONFIGURATIONS:
                row = []
                for lr in lrs:
                    values = [
                        min(v, CAP) for v in losses[problem, lender, lr][configuration].values()
                    ]
                    row.append(f"{statistics.fmean(values):.3f}" if values else "")
                if not any(row):
                    continue
                lines.append(f"| {configuration} | {' | '.join(row)} |")
    page.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[: 16 + len(CONFIGURATIONS)]))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("run", "report"))
    parser.add_argument("--data-root", default="data", help="folder with mnist/, fashion-mnist/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    path = RESULTS / "defaults.jsonl"
    if asked.verb == "run":
        run(path, asked.seeds, asked.data_root, asked.processes)
    report(path, RESULTS / "defaults.md")


if __name__ == "__main__":
    main()
