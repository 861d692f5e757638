"""Table 3 of Liu et al., ICLR 2021: test accuracy of seven methods, each with the same tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.data.locate import missing_files
from ocnopt.experiments.data.sets import SETS
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.table import save_accuracies
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.experiments.significance import difference
from ocnopt.experiments.tuning import VALIDATION, Tuned, tune_and_measure
from ocnopt.experiments.verdict import spread
from ocnopt.experiments.watcher import Part

__all__ = ["METHODS", "ROWS", "Row", "candidates", "run", "verdict"]

METHODS = ("SGD-m", "RMSprop", "Adam", "EKFAC", "E-MSA", "vanilla DDP", "DDPNOpt")
#: DDPNOpt with the preconditioners that the paper does not report, on FCNs alone.
MORE = ("DDPNOpt, M = I", "DDPNOpt, Adam", "DDPNOpt, EKFAC")
#: The baselines from optimal control.
_CONTROL = ("E-MSA", "vanilla DDP")
CLAIM = (
    "DDPNOpt outperforms the two OCP-inspired baselines, E-MSA and vanilla DDP, on all data sets "
    "and network types, and has the best accuracy of all in every row but DIGITS; its gain over "
    "the standard methods appears comparatively small."
)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: As the paper calls it.
        recipe: Name of our settings.
        paper: The paper's accuracies in %, by method; what it does not give is not there.
        candidates: Settings that are tried per method.
        tuning_seeds: Seeds of each.
        seeds: Seeds of the measurement.
        note: What the reader has to know.
        without: Methods that are not run, though the paper has them.
    """

    name: str
    recipe: str
    paper: Mapping[str, float]
    candidates: int
    tuning_seeds: int
    seeds: int
    note: str = ""
    without: tuple[str, ...] = ()


def _paper(*values: float | None) -> dict[str, float]:
    pairs = zip(METHODS, values, strict=True)
    return {method: value for method, value in pairs if value is not None}


ROWS: tuple[Row, ...] = (
    Row(
        "WINE (FCN)",
        "wine-fcn",
        _paper(94.35, 98.10, 98.13, 94.60, 93.56, 98.00, 98.18),
        6,
        2,
        10,
        "36 test samples: one of them is 2.8 points",
    ),
    Row(
        "DIGITS (FCN)",
        "digits-fcn",
        _paper(95.36, 94.33, 94.98, 95.24, 94.87, 91.68, 95.13),
        6,
        2,
        10,
    ),
    Row(
        "MNIST (FCN)",
        "mnist-fcn",
        _paper(92.65, 91.89, 92.54, 92.73, 90.24, 90.42, 93.30),
        6,
        1,
        10,
    ),
    Row(
        "F-MNIST (FCN)",
        "fashion-mnist-fcn",
        _paper(82.49, 83.87, 84.36, 84.12, 82.04, 81.98, 84.98),
        6,
        1,
        10,
    ),
    Row(
        "MNIST (CNN)", "mnist-cnn", _paper(97.94, 98.05, 98.04, 98.02, 96.48, None, 98.09), 3, 1, 5
    ),
    Row(
        "SVHN (CNN)",
        "svhn-cnn",
        _paper(89.00, 88.41, 87.76, 90.63, 79.45, None, 90.70),
        3,
        1,
        3,
        "E-MSA, whose step takes some twenty times SGD's, is left out",
        ("E-MSA",),
    ),
    Row(
        "CIFAR-10 (CNN)",
        "cifar-10-cnn",
        _paper(71.26, 70.52, 70.04, 71.85, 61.42, None, 71.92),
        3,
        1,
        3,
    ),
)
_QUICK = ("wine-fcn", "digits-fcn")
_QUICK_STEPS, _QUICK_SEEDS, _QUICK_CANDIDATES = 60, 2, 2


def candidates(method: str, row: Row, base: Mapping[str, Any]) -> list[TrainConfig]:
    """The settings that a method is tried with: spread over the paper's ranges (its Table 5).

    Args:
        method: One of :data:`METHODS`.
        row: The row, which says how many.
        base: Settings of the recipe.
    """
    count = row.candidates
    cnn = base.get("network") == "cnn"
    optimizer, options = _KINDS[method]
    settings: list[tuple[float | None, dict[str, Any]]]
    if method == "SGD-m":
        # Momentum .9 multiplies the step by ten in the long run.
        rates = _logspace(7e-2, 5e-1, 3)
        both = [(lr, {"momentum": m}) for m in (0.0, 0.9) for lr in rates]
        settings = list(both if count >= 6 else [both[3], both[1], both[2]][:count])
    elif method == "E-MSA":
        settings = [(None, {"rho": rho}) for rho in _logspace(0.3, 100.0, count)]
    elif method == "vanilla DDP":
        settings = [(None, {"damping": damping}) for damping in _logspace(1e-4, 10.0, count)]
    elif method == "DDPNOpt, M = I":
        settings = [
            (lr, {"momentum": m})
            for m in (0.0, 0.9)
            for lr in _logspace(7e-2, 5e-1, max(1, count // 2))
        ]
    elif method in ("EKFAC", "DDPNOpt, EKFAC"):
        settings = [(lr, {}) for lr in _logspace(1e-2, 3e-1, count)]
    elif method == "DDPNOpt" and cnn:
        settings = [(lr, {"preconditioner": "ekfac"}) for lr in _logspace(1e-2, 3e-1, count)]
    elif method == "DDPNOpt":
        settings = [(lr, {"preconditioner": "rmsprop"}) for lr in _logspace(7e-4, 1e-2, count)]
    else:
        settings = [(lr, {}) for lr in _logspace(7e-4, 1e-2, count)]
    return [
        TrainConfig(**{**base, "optimizer": optimizer, "lr": lr, "options": {**options, **more}})
        for lr, more in settings
    ]


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD-m": ("sgd", {}),
    "RMSprop": ("rmsprop", {}),
    "Adam": ("adam", {}),
    "EKFAC": ("ekfac", {}),
    "E-MSA": ("emsa", {}),
    "vanilla DDP": ("vanilla-ddp", {}),
    "DDPNOpt": ("ddpnopt", {}),
    "DDPNOpt, M = I": ("ddpnopt", {}),
    "DDPNOpt, Adam": ("ddpnopt", {"preconditioner": "adam"}),
    "DDPNOpt, EKFAC": ("ddpnopt", {"preconditioner": "ekfac"}),
}


def _logspace(low: float, high: float, count: int) -> list[float]:
    """Rounded to two digits, as a person would write them."""
    if count == 1:
        return [low]
    ratio = math.log(high / low) / (count - 1)
    return [float(f"{low * math.exp(ratio * i):.2g}") for i in range(count)]


def run(settings: Settings, watcher: Watcher) -> Report:
    """Tune and measure every row whose data are there."""
    rows, absent = _rows(settings)
    if not rows:
        raise InputError("none of the table's data sets is there; see 'ocnopt data list'")
    plans = [(row, _candidates(row, settings)) for row in rows]
    watcher.start(
        sum(
            len(tried) * row.candidates * row.tuning_seeds + len(tried) * _seeds(row, settings)
            for row, tried in plans
        )
    )
    results: dict[str, list[Tuned]] = {}
    more: dict[str, list[Tuned]] = {}
    for row, tried in plans:
        found = tune_and_measure(
            tried,
            tuning_seeds=row.tuning_seeds,
            seeds=_seeds(row, settings),
            cache=Cache(settings.cache),
            processes=settings.processes,
            watcher=Part(watcher),
        )
        results[row.name] = [t for t in found if t.method in METHODS]
        more[row.name] = [t for t in found if t.method in MORE]
    save_accuracies(
        settings.picture,
        "Test accuracy (%): ours, and the paper's as rings",
        {
            row.name: [(t.method, t.accuracies, row.paper.get(t.method)) for t in results[row.name]]
            for row in rows
        },
    )
    verdicts = [verdict(row, results[row.name]) for row in rows]
    columns = ["", *METHODS]
    table = [
        [row.name, *(_cell(row, results[row.name], method) for method in METHODS)] for row in rows
    ]
    sentence = _sentence(rows, results)
    return Report(
        columns,
        table,
        sentence,
        _page(settings, rows, absent, results, more, columns, table, verdicts, sentence),
        [
            {"row": row.name, "paper": row.paper.get(t.method), **t.to_json()}
            for row in rows
            for t in (*results[row.name], *more[row.name])
        ],
        {"recipes": {row.recipe: _resolved(row, settings) for row in rows}},
    )


def _rows(settings: Settings) -> tuple[list[Row], list[Row]]:
    """The rows to be run, and those whose data are not there."""
    wanted = [row for row in ROWS if not settings.quick or row.recipe in _QUICK]
    absent = [
        row
        for row in wanted
        if missing_files(SETS[RECIPES[row.recipe]["dataset"]], settings.data_root)
    ]
    present = [row for row in wanted if row not in absent]
    return [_less(row) for row in present] if settings.quick else present, absent


def _less(row: Row) -> Row:
    return replace(row, candidates=_QUICK_CANDIDATES, tuning_seeds=1, seeds=_QUICK_SEEDS)


def _seeds(row: Row, settings: Settings) -> int:
    return settings.seeds or row.seeds


def _base(row: Row, settings: Settings) -> dict[str, Any]:
    base = {**RECIPES[row.recipe], "data_root": settings.data_root}
    return {**base, "steps": _QUICK_STEPS} if settings.quick else base


def _resolved(row: Row, settings: Settings) -> dict[str, Any]:
    """All settings of a row that its methods share."""
    kept = TrainConfig(**_base(row, settings)).resolved().to_json()
    own = ("optimizer", "lr", "options", "seed", "validation", "data_root", "device", "curve")
    return {name: value for name, value in kept.items() if name not in own}


def _candidates(row: Row, settings: Settings) -> dict[str, list[TrainConfig]]:
    base = _base(row, settings)
    methods = [m for m in METHODS if m in row.paper and m not in row.without]
    if base.get("network", "fcn") == "fcn":
        methods += MORE
    return {m: candidates(m, row, base) for m in methods}


def _cell(row: Row, results: Sequence[Tuned], method: str) -> str:
    found = next((t for t in results if t.method == method), None)
    if found is None:
        return f"not run ({row.paper[method]:.2f})" if method in row.paper else "N/A"
    best = max(fmean(t.accuracies) for t in results)
    mean = fmean(found.accuracies)
    text = f"{mean:.2f} ± {spread(found.accuracies):.2f}"
    if mean == best:
        text = f"**{text}**"
    note = f", {found.failed} diverged" if found.failed else ""
    return f"{text} ({row.paper[method]:.2f}{note})"


def verdict(row: Row, results: Sequence[Tuned]) -> str:
    """What a row says of DDPNOpt, beside what it says in the paper.

    Methods differ where the mean difference over seeds is more than twice its standard error.

    Args:
        row: The row.
        results: Its methods.
    """
    by = {t.method: t.accuracies for t in results}
    own = by["DDPNOpt"]
    others = [m for m in by if m != "DDPNOpt"]
    best = max(others, key=lambda m: fmean(by[m]))
    best_printed = max(others, key=lambda m: row.paper[m])
    printed = row.paper["DDPNOpt"] - row.paper[best_printed]
    control = [m for m in _CONTROL if m in by]
    beaten = [m for m in control if difference(own, by[m]) > 0]
    text = f"**{row.name}**: DDPNOpt is {_compared(own, by[best])} the best other, {best}"
    text += f" (paper: {printed:+.2f} against {best_printed}). "
    if not control:
        text += "Neither baseline from optimal control was run."
    elif len(beaten) == len(control):
        text += f"It beats {' and '.join(control)}, as in the paper."
    else:
        rest = [m for m in control if m not in beaten]
        text += f"It does not beat {' and '.join(rest)} beyond the spread, unlike in the paper."
    return text + (f" ({row.note}.)" if row.note else "")


def _compared(own: Sequence[float], other: Sequence[float]) -> str:
    gap = fmean(own) - fmean(other)
    sign = difference(own, other)
    word = {1: "above", 0: "within the spread of", -1: "below"}[sign]
    return f"{gap:+.2f} points, {word}"


def _sentence(rows: Sequence[Row], results: Mapping[str, Sequence[Tuned]]) -> str:
    counts = {1: 0, 0: 0, -1: 0}
    control = beaten = 0
    for row in rows:
        by = {t.method: t.accuracies for t in results[row.name]}
        own = by["DDPNOpt"]
        best = max((m for m in by if m != "DDPNOpt"), key=lambda m: fmean(by[m]))
        counts[difference(own, by[best])] += 1
        for method in _CONTROL:
            if method in by:
                control += 1
                beaten += difference(own, by[method]) > 0
    return (
        f"Of {len(rows)} rows DDPNOpt is above the best other method in {counts[1]}, within the "
        f"spread of it in {counts[0]} and below it in {counts[-1]}; it beats the baselines from "
        f"optimal control in {beaten} of {control} comparisons."
    )


def _page(
    settings: Settings,
    rows: Sequence[Row],
    absent: Sequence[Row],
    results: Mapping[str, Sequence[Tuned]],
    more: Mapping[str, Sequence[Tuned]],
    columns: Sequence[str],
    table: Sequence[Sequence[str]],
    verdicts: Sequence[str],
    sentence: str,
) -> str:
    lines = [
        "# Table 3: test accuracy",
        "",
        f"Written by `{settings.command}`. In every cell: our mean test accuracy in % over seeds ± "
        "standard deviation, and the paper's figure in brackets; the best of a row is bold. "
        "What the paper leaves open (widths, length of training, where the CNN pools) is ours, so "
        "columns of a row may be compared with one another, and their order with the paper's.",
        "",
        f"**The paper says:** {CLAIM}",
        "",
        f"**Here:** {sentence}",
        "",
        markdown_table(columns, table),
        "",
        *(f"- {text}" for text in verdicts),
        "",
    ]
    if absent:
        names = ", ".join(row.name for row in absent)
        lines += [f"Left out, as the data are not there: {names}.", ""]
    lines += [f"![Accuracies]({settings.name}.png)", "", *_more(rows, results, more)]
    lines += [
        "## Settings",
        "",
        markdown_table(
            ["", "network", "batch", "steps", "seeds", "candidates x tuning seeds"],
            [_setup(row, settings) for row in rows],
        ),
        "",
        "## What was chosen",
        "",
        f"Every method of a row has the same number of candidates, spread over the ranges of the "
        f"paper's Table 5 (E-MSA: rho from .3 to 100, vanilla DDP: damping from 1e-4 to 10, for "
        f"which it gives none; SGD-m: with and without momentum .9), and is trained with each on "
        f"{100 * (1 - VALIDATION):.0f} % of the training set; the choice has the best accuracy on "
        "the rest. DDPNOpt has the preconditioner that the paper names as the best: the adaptive "
        "diagonal for FCN, EKFAC for CNN. *Edge*: the least or the largest rate was chosen.",
        "",
        markdown_table(["", *METHODS], [_choices(row, results[row.name]) for row in rows]),
        "",
        "## Training loss",
        "",
        "Mean over the last epoch's steps (over all if there are fewer) ± standard deviation.",
        "",
        markdown_table(["", *METHODS], [_losses(row, results[row.name]) for row in rows]),
        "",
    ]
    return "\n".join(lines)


#: The optimizers that lend M, and DDPNOpt with it.
_PAIRS = (
    ("SGD-m", "DDPNOpt, M = I"),
    ("RMSprop", "DDPNOpt"),
    ("Adam", "DDPNOpt, Adam"),
    ("EKFAC", "DDPNOpt, EKFAC"),
)


def _more(
    rows: Sequence[Row],
    results: Mapping[str, Sequence[Tuned]],
    more: Mapping[str, Sequence[Tuned]],
) -> list[str]:
    """Every optimizer beside the DDPNOpt that extends it."""
    table = []
    words = {1: "above", 0: "", -1: "below"}
    for row in rows:
        if not more[row.name]:
            continue
        by = {t.method: t.accuracies for t in (*results[row.name], *more[row.name])}
        cells = []
        for lender, own in _PAIRS:
            sign = words[difference(by[own], by[lender])]
            text = f"{fmean(by[lender]):.2f}, {fmean(by[own]):.2f}"
            cells.append(f"{text} ({sign})" if sign else text)
        table.append([row.name, *cells])
    if not table:
        return []
    return [
        "## With every preconditioner",
        "",
        "The optimizer that lends M, then DDPNOpt with it, both tuned alike in the lender's range; "
        "*above*, *below*: by more than twice the standard error over seeds.",
        "",
        markdown_table(["", "SGD-m", "RMSprop", "Adam", "EKFAC"], table),
        "",
    ]


def _setup(row: Row, settings: Settings) -> list[str]:
    config = TrainConfig(**_base(row, settings)).resolved()
    if config.network == "cnn":
        assert config.pools is not None
        network = (
            f"4 conv 3x3, {config.channels} channels, pools after {config.pools[0]} and "
            f"{config.pools[1]}, then {config.hidden}"
        )
    else:
        assert config.widths is not None
        network = f"{'-'.join(map(str, config.widths))} {config.activation}"
        if config.head != "identity":
            network += f", {config.head} outputs"
    return [
        row.name,
        network,
        str(config.batch_size),
        str(config.steps),
        str(_seeds(row, settings)),
        f"{row.candidates} x {row.tuning_seeds}",
    ]


def _choices(row: Row, results: Sequence[Tuned]) -> list[str]:
    by = {t.method: t for t in results}
    return [row.name, *(_choice(by[m]) if m in by else "N/A" for m in METHODS)]


def _choice(tuned: Tuned) -> str:
    config = tuned.chosen
    shown = {k: v for k, v in config.options.items() if k != "preconditioner"}
    parts = [f"{k} {v:g}" for k, v in shown.items() if v]
    if config.lr is not None:
        parts.insert(0, f"{config.lr:g}")
    return ", ".join(parts) + (" (edge)" if tuned.on_edge else "")


def _losses(row: Row, results: Sequence[Tuned]) -> list[str]:
    by = {t.method: t for t in results}
    cells = [
        f"{fmean(by[m].losses):.3f} ± {spread(by[m].losses):.3f}" if m in by else "N/A"
        for m in METHODS
    ]
    return [row.name, *cells]
