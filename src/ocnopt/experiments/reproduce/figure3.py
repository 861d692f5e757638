"""Fig. 3 and Table 4 of Liu et al., ICLR 2021: time and memory of a step over batch sizes.

Every batch size is one run in which all methods take turns, one step each per round on the same
batch, so that what the machine does meanwhile hits all alike; the median is reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from ocnopt.errors import GraphError, NonFiniteError
from ocnopt.experiments import networks
from ocnopt.experiments.files import write_atomically
from ocnopt.experiments.peak_memory import PeakMemory, TookTooLong
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.optim import EKFAC, EMSA, DDPNOpt, VanillaDDP

__all__ = ["FULL", "METHODS", "QUICK", "Preset", "claims", "measure", "run", "slope"]

CLASSES = 10
INPUTS = 784
CRITERION = nn.CrossEntropyLoss()
#: At most so many times as long is "nearly as fast".
NEAR = 1.5
#: At least so many times as much is "a large margin".
LARGE = 3.0
#: An exponent larger by this is "scales worse".
STEEPER = 0.3

Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        batches: Batch sizes, ascending.
        rounds: Steps of each method that the median is of, at most.
        seconds: A method that takes longer for a single step is stopped.
        budget: Seconds for all rounds of a method at one batch size; a slow one gets fewer rounds,
            but not below three.
        widths: Hidden widths of the network.
    """

    batches: tuple[int, ...]
    rounds: int
    seconds: float
    budget: float
    widths: tuple[int, ...] = (16, 16, 16, 16)


FULL = Preset((8, 16, 32, 64, 128, 256, 512), rounds=60, seconds=60.0, budget=15.0)
QUICK = Preset((8, 32, 128), rounds=20, seconds=1.5, budget=1.5)


def _ordinary(build: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[nn.Module], Step]:
    """A step of the ordinary loop."""

    def make(model: nn.Module) -> Step:
        optimizer = build(model)

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()

        return step

    return make


#: How to step, by name. DDPNOpt is in the form that the paper uses for fully connected networks:
#: an adaptive diagonal M.
METHODS: dict[str, Callable[[nn.Module], Step]] = {
    "Adam": _ordinary(lambda m: torch.optim.Adam(m.parameters(), lr=1e-4)),
    "EKFAC": _ordinary(lambda m: EKFAC(m, CRITERION, lr=1e-4)),
    "vanilla DDP": lambda m: VanillaDDP(m, CRITERION).step,
    "E-MSA": lambda m: EMSA(m, CRITERION).step,
    "DDPNOpt": _ordinary(lambda m: DDPNOpt(m, CRITERION, lr=1e-4, preconditioner="rmsprop")),
}

#: Exponents of the batch size in Table 4: time, memory.
PAPER = {"Adam": ("1", "0"), "vanilla DDP": ("3", "1"), "DDPNOpt": ("1", "0 to 1")}

_COLOURS = {  # told apart by colour-blind readers too
    "Adam": ("#e69f00", "s", "--"),
    "EKFAC": ("#d55e00", "^", "-."),
    "vanilla DDP": ("#000000", "X", (0, (3, 1))),
    "E-MSA": ("#0072b2", "D", ":"),
    "DDPNOpt": ("#009e73", "o", "-"),
}


# measuring


def measure(
    preset: Preset, batch: int, names: Sequence[str], seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time and memory of a step of each method at one batch size.

    Args:
        preset: How much is measured.
        batch: Samples per step.
        names: Methods, of :data:`METHODS`.
        seed: Of weights and batches.

    Returns:
        A row for each method: median and quartiles of the seconds of a step, and bytes: the peak of
        what is held beyond weights and batch, the optimizer's state included. Then, by method, why
        it was not measured.
    """
    generator = torch.Generator().manual_seed(seed)
    steps: dict[str, Step] = {}
    sizes: dict[str, int] = {}
    rounds: dict[str, int] = {}
    stopped: dict[str, str] = {}
    for name in names:
        torch.manual_seed(seed)
        recipe = networks.FCN(widths=preset.widths, activation="relu")
        model = networks.fcn(recipe, (INPUTS,), CLASSES)
        try:
            step, sizes[name], rounds[name] = _prepare(preset, name, model, batch, generator)
            steps[name] = step
        except TookTooLong:
            stopped[name] = f"a step takes longer than {preset.seconds:g} s"
        except GraphError as error:
            stopped[name] = f"it does not fit: {error}"
        except NonFiniteError as error:
            stopped[name] = f"it fails: {error}"
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            stopped[name] = "it does not fit into memory"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    most = max(rounds.values(), default=0)
    for i in range(most):
        x, y = _batch(batch, generator)
        for name, step in steps.items():
            # Evenly over all rounds, so that a slow method's few steps meet the same machine.
            turn = i * rounds[name] // most != (i - 1) * rounds[name] // most
            if turn and name not in stopped:
                start = time.perf_counter()
                try:
                    step(x, y)
                except NonFiniteError as error:
                    stopped[name] = f"it fails: {error}"
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, found in seconds.items():
        if name in stopped:
            continue
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        rows.append(
            {
                "method": name,
                "batch": batch,
                "seed": seed,
                "seconds": middle,
                "quartiles": [low, high],
                "steps": len(found),
                "bytes": sizes[name],
            }
        )
    return rows, stopped


def _prepare(
    preset: Preset, name: str, model: nn.Module, batch: int, generator: torch.Generator
) -> tuple[Step, int, int]:
    """A method that has taken its first steps, the bytes of one, and the rounds to give it."""
    x, y = _batch(batch, generator)
    with PeakMemory(preset.seconds) as memory:
        step = METHODS[name](model)
        step(x, y)  # sets things up
        memory.start_over(preset.seconds)
        start = time.perf_counter()
        step(x, y)
        took = time.perf_counter() - start
    fit = max(3, int(preset.budget / took))
    return step, memory.peak, min(preset.rounds, fit)


def _wake_up() -> None:
    """Take a step on one weight: the first one ever loads parts of torch, for seconds."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.Adam([weight]).step()


def _batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of MNIST's shape: what a step costs does not depend on the pixels."""
    x = torch.rand(size, INPUTS, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Least-squares exponent over the largest three sizes; None for fewer than two."""
    if len(sizes) < 2:
        return None
    xs, ys = ([math.log(v) for v in list(line)[-3:]] for line in (sizes, values))
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    top = sum((a - mx) * (b - my) for a, b in zip(xs, ys, strict=True))
    return top / sum((a - mx) ** 2 for a in xs)


# what came of it


def run(settings: Settings, watcher: Watcher) -> Report:
    """Measure, draw, and write the page."""
    preset = QUICK if settings.quick else FULL
    seeds = settings.seeds or 1
    rows: list[dict[str, Any]] = []
    stops: dict[str, dict[str, Any]] = {}
    watcher.start(len(preset.batches) * seeds)
    _wake_up()
    for batch in preset.batches:
        for seed in range(seeds):
            names = [name for name in METHODS if name not in stops]
            found, stopped = measure(preset, batch, names, seed)
            rows += found
            stops |= {name: {"batch": batch, "why": why} for name, why in stopped.items()}
            watcher.advance(f"batch {batch}")
    table = _by_batch(rows)
    save_runtime(settings.picture, table)
    found_claims = claims(table, stops)
    return Report(
        columns=["batch", *METHODS],
        table=[
            [str(batch), *(_cell(here, name, "seconds") for name in METHODS)]
            for batch, here in table.items()
        ],
        sentence=_sentence(found_claims, stops),
        page=_page(settings, preset, seeds, table, stops, found_claims),
        rows=rows,
        facts={
            "claims": found_claims,
            "stopped": stops,
            "widths": list(preset.widths),
            "rounds": preset.rounds,
            "limit_seconds": preset.seconds,
            "threads": torch.get_num_threads(),
            "seeds": seeds,
        },
    )


#: By batch size, then by method: seconds and bytes.
Table = dict[int, dict[str, dict[str, float]]]


def _by_batch(rows: Sequence[dict[str, Any]]) -> Table:
    """Medians over seeds."""
    table: Table = {}
    for batch in sorted({row["batch"] for row in rows}):
        table[batch] = {}
        for name in METHODS:
            mine = [row for row in rows if row["batch"] == batch and row["method"] == name]
            if mine:
                table[batch][name] = {
                    what: statistics.median(row[what] for row in mine)
                    for what in ("seconds", "bytes")
                }
    return table


def _ratios(table: Table, above: str, below: str, what: str) -> dict[int, float]:
    """By batch size, where both were measured."""
    return {
        batch: here[above][what] / here[below][what]
        for batch, here in table.items()
        if above in here and below in here
    }


def _exponent(table: Table, name: str, what: str) -> float | None:
    found = {batch: here[name][what] for batch, here in table.items() if name in here}
    return slope(list(found), list(found.values()))


def claims(table: Table, stops: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The paper's claims, what was seen of each, and whether it holds.

    Args:
        table: By batch size, then by method: seconds and bytes.
        stops: By method, at which batch size it was stopped, and why.

    Returns:
        For every claim "paper", "seen", "verdict".
    """
    found = []
    for other in ("Adam", "EKFAC"):
        ratios = _ratios(table, "DDPNOpt", other, "seconds")
        found.append(
            {
                "paper": f"DDPNOpt runs nearly as fast as standard methods: {other}",
                "seen": _seen("{} times its time", ratios),
                "verdict": _verdict({b: r <= NEAR for b, r in ratios.items()}),
            }
        )
    ratios = _ratios(table, "E-MSA", "DDPNOpt", "seconds")
    found.append(
        {
            "paper": "DDPNOpt outperforms E-MSA by a large margin",
            "seen": _seen("E-MSA takes {} times its time", ratios),
            "verdict": _verdict({b: r >= LARGE for b, r in ratios.items()}),
        }
    )
    found.append(_scaling(table, stops))
    ratios = _ratios(table, "vanilla DDP", "DDPNOpt", "bytes")
    found.append(
        {
            "paper": "DDPNOpt is much more memory-efficient than vanilla DDP",
            "seen": _seen("vanilla DDP takes {} times its memory", ratios),
            "verdict": _verdict({b: r >= LARGE for b, r in ratios.items()}),
        }
    )
    return found


def _scaling(table: Table, stops: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Whether vanilla DDP's time grows faster with the batch than DDPNOpt's."""
    steep, other = (_exponent(table, name, "seconds") for name in ("vanilla DDP", "DDPNOpt"))
    stop = stops.get("vanilla DDP")
    parts = []
    if steep is not None and other is not None:
        parts.append(f"time grows as B^{steep:.2f}, DDPNOpt's as B^{other:.2f}")
    if stop:
        parts.append(f"stopped at batch {stop['batch']}")
    measured = [batch for batch, here in table.items() if "vanilla DDP" in here]
    if not measured:
        verdict = "not measured"  # too slow at every size says nothing about growth
    elif stop and "DDPNOpt" not in stops:
        verdict = "holds"
    elif steep is None or other is None:
        verdict = "not measured"
    else:
        verdict = "holds" if steep >= other + STEEPER else "does not hold"
    return {
        "paper": "vanilla DDP scales poorly with batch size",
        "seen": "; ".join(parts) or "-",
        "verdict": verdict,
    }


def _verdict(holds: dict[int, bool]) -> str:
    """In words, over batch sizes."""
    if not holds:
        return "not measured"
    good = [str(batch) for batch, does in holds.items() if does]
    if len(good) == len(holds):
        return "holds"
    return f"holds at batch {', '.join(good)} only" if good else "does not hold"


def _seen(words: str, ratios: dict[int, float]) -> str:
    """The words with the ratios' range in them."""
    if not ratios:
        return "-"
    low, high = (_digits(pick(ratios.values()), 2) for pick in (min, max))
    return words.format(low if low == high else f"{low} to {high}")


# the page


def _sentence(found: Sequence[dict[str, str]], stops: dict[str, dict[str, Any]]) -> str:
    said = [f"{claim['paper']}: {claim['verdict']} ({claim['seen']})" for claim in found]
    return "; ".join(said) + "." + "".join(f" {line}" for line in _stop_lines(stops))


def _stop_lines(stops: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name} was stopped at batch {stop['batch']}: {stop['why'].rstrip('.')}."
        for name, stop in stops.items()
    ]


def _cell(here: dict[str, dict[str, float]], name: str, what: str) -> str:
    """The value, and in brackets its ratio to Adam's."""
    if name not in here:
        return "-"
    value = here[name][what]
    text = _digits(1e3 * value if what == "seconds" else value / 2**20, 3)
    if name == "Adam" or "Adam" not in here:
        return text
    return f"{text} ({_digits(value / here['Adam'][what], 2)})"


def _digits(value: float, number: int) -> str:
    """So many significant digits; all of those before the point."""
    return f"{value:.0f}" if value >= 10**number else f"{value:.{number}g}"


def _page(
    settings: Settings,
    preset: Preset,
    seeds: int,
    table: Table,
    stops: dict[str, dict[str, Any]],
    found: Sequence[dict[str, str]],
) -> str:
    net = "-".join(map(str, (INPUTS, *preset.widths, CLASSES)))
    tables: list[str] = []
    for heading, what in (("Milliseconds per step", "seconds"), ("MiB of a step", "bytes")):
        rows = [
            [str(batch), *(_cell(here, name, what) for name in METHODS)]
            for batch, here in table.items()
        ]
        tables += [
            f"## {heading}",
            "",
            "In brackets: relative to Adam.",
            "",
            markdown_table(["batch", *METHODS], rows),
            "",
        ]
    slopes = []
    for name in METHODS:
        exponents = [_exponent(table, name, what) for what in ("seconds", "bytes")]
        shown = ["-" if e is None else f"{e:.2f}" for e in exponents]
        paper = PAPER.get(name, ("-", "-"))
        slopes.append([name, shown[0], paper[0], shown[1], paper[1]])
    return "\n".join(
        [
            "# Time and memory of a step over batch sizes (Fig. 3, Table 4)",
            "",
            f"Written by `{settings.command}`. A {net} ReLU network, cross-entropy, float32, one"
            " CPU thread. Inputs are noise of MNIST's shape, new in every round: what a step costs"
            " does not depend on the pixels. All methods take turns, one step each per round;"
            f" medians of up to {preset.rounds} rounds"
            f" ({'seed 0' if seeds == 1 else f'seeds 0 to {seeds - 1}'}). A method"
            f" with a step longer than {preset.seconds:g} s, or that does not fit, is stopped."
            " DDPNOpt is `DDPNOpt(preconditioner='rmsprop')`, the adaptive diagonal that the paper"
            " uses for fully connected networks; vanilla DDP is `VanillaDDP` and E-MSA `EMSA` with"
            " their defaults. `VanillaDDP` solves through the rank of its Gauss-Newton terms; the"
            " dense solve that all second-order terms ask for would factorize a matrix as large as"
            " the first layer's number of weights. Memory is the peak of tensor storage alive"
            " during a step beyond weights and batch: gradients, activations, the optimizer's state"
            " and all that it"
            " makes on the way; what an operation uses within itself is not seen.",
            "",
            '**The paper:** "when measuring the actual computational performance with GPU'
            " parallelism, DDPNOpt runs nearly as fast as standard methods and outperforms E-MSA by"
            " a large margin. [...] DDPNOpt is much memory-efficient compared with vanilla DDP by"
            ' exploiting the factorization in Proposition 3"; vanilla DDP "grows cubic w.r.t. BX".'
            " (No GPU here.)",
            "",
            f"**Here**, with *nearly as fast* read as at most {NEAR:g} times the time, *large*"
            f" and *much* as at least {LARGE:g} times as much, *poorly* as an exponent larger than"
            f" DDPNOpt's by at least {STEEPER:g}, or a stop where DDPNOpt goes on:",
            "",
            markdown_table(
                ["the paper", "seen", "verdict"],
                [[claim[key] for key in ("paper", "seen", "verdict")] for claim in found],
            ),
            "",
            *(part for line in _stop_lines(stops) for part in (line, "")),
            f"![Time and memory]({settings.picture.name})",
            "",
            *tables,
            "## Growth with the batch size B",
            "",
            "Exponents are slopes in log-log over the largest three sizes. Where a step is mostly"
            " the cost of calling operations, which does not grow, a slope lies below the limit of"
            " Table 4. That table counts no activations, which all methods keep and which grow with"
            " B; its B^3 is that of the stacked problem, `VanillaDDP(batch='joint')`, and not of"
            " a value function per sample, as here.",
            "",
            markdown_table(
                ["method", "time ~ B^", "Table 4", "memory ~ B^", "Table 4"],
                slopes,
            ),
        ]
    )


def save_runtime(path: Path, table: Table) -> None:
    """Draw time and memory of a step against the batch size, in log-log (the form of Fig. 3).

    Args:
        path: The PNG file.
        table: By batch size, then by method: seconds and bytes.
    """
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for ax, (what, label, scale) in zip(
        panels,
        (("seconds", "time per step (ms)", 1e3), ("bytes", "memory (MiB)", 2.0**-20)),
        strict=True,
    ):
        for name, (colour, marker, dashes) in _COLOURS.items():
            mine = {batch: here[name] for batch, here in table.items() if name in here}
            if mine:
                ax.plot(
                    list(mine),
                    [scale * cost[what] for cost in mine.values()],
                    color=colour,
                    marker=marker,
                    ls=dashes,
                    ms=5,
                    lw=1.5,
                    label=name,
                )
        ax.set(xscale="log", yscale="log", xlabel="batch size", ylabel=label)
        ax.set_xticks(list(table), [str(batch) for batch in table])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(True, alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
