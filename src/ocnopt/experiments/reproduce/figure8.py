"""Fig. 8 of Liu et al., ICLR 2021: how many singular values of the feedback policy stand out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocnopt.control.terminal import Criterion
from ocnopt.experiments import networks
from ocnopt.experiments.data.clusters import DIMENSION, SAMPLES, SPREAD, gaussian_clusters
from ocnopt.experiments.figures.spectrum import (
    Spectra,
    count_above_bulk,
    feedback_spectrum,
    save_spectra,
)
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.losses import MMCLoss
from ocnopt.optim import DDPNOpt

__all__ = ["FULL", "QUICK", "Case", "Preset", "run", "watch_spectra"]

BATCH = 32
WIDTHS = (24, 24, 24, 24)
MANY = 20  # outputs, where there are more than clusters
MMC_RADIUS = 10.0

Loss = Literal["cross-entropy", "MSE", "MMC"]


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        loss: Its criterion.
        lr: Learning rate.
        outputs: Outputs of the network; None for one per cluster.
        spread: Standard deviation of the clusters' centers; their own is 1.
        drawn: Whether it has a row in the picture.
    """

    loss: Loss
    lr: float
    outputs: int | None = None
    spread: float = SPREAD
    drawn: bool = True

    @property
    def name(self) -> str:
        """What it is called."""
        parts: list[str] = [self.loss]
        if self.outputs is not None:
            parts.append(f"{self.outputs} outputs")
        if self.spread != Case.spread:
            parts.append("overlapping")
        return ", ".join(parts)


@dataclass(frozen=True)
class Preset:
    """How much is done.

    Attributes:
        cases: What is trained.
        clusters: Numbers of clusters k.
        iterations: Where the policy is looked at; the last ends the run.
        seeds: Runs of each.
    """

    cases: tuple[Case, ...]
    clusters: tuple[int, ...]
    iterations: tuple[int, ...]
    seeds: int


CASES = (
    Case("cross-entropy", 0.1),
    Case("MSE", 2.0),
    Case("MMC", 0.02),
    Case("cross-entropy", 0.1, outputs=MANY),
    Case("cross-entropy", 0.1, spread=1.0, drawn=False),
)
FULL = Preset(CASES, (5, 8, 12, 15), (1, 50, 100, 150, 250), 5)
QUICK = Preset(CASES[:2], (5, 8, 12, 15), (1, 50, 100), 1)


def watch_spectra(case: Case, k: int, seed: int, iterations: Sequence[int]) -> list[dict[str, Any]]:
    """Train a network with DDPNOpt and look at its last layer's policy.

    Args:
        case: What is trained.
        k: Number of clusters.
        seed: Seed of data, weights and batches.
        iterations: Where to look.

    Returns:
        A row for each: training loss and accuracy there, and the spectrum.
    """
    x, y = gaussian_clusters(k, case.spread, seed)
    outputs = case.outputs or k
    torch.manual_seed(seed)
    recipe = networks.FCN(widths=WIDTHS, activation="relu")
    model = networks.fcn(recipe, (DIMENSION,), outputs)
    criterion = _criterion(case, outputs)
    optimizer = DDPNOpt(model, criterion, lr=case.lr, terminal="full", keep_policy=True)
    order = DataOrder(SAMPLES, BATCH, seed, torch.device("cpu"))
    rows = []
    for step in range(max(iterations)):
        index = order.batch(step)
        optimizer.zero_grad()
        loss = criterion(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        if step + 1 in iterations:
            *_, last = optimizer.policy.values()
            spectrum = feedback_spectrum(last)
            count = count_above_bulk(spectrum)
            share = spectrum / spectrum[0]
            rows.append(
                {
                    "case": case.name,
                    "clusters": k,
                    "outputs": outputs,
                    "seed": seed,
                    "iteration": step + 1,
                    "clusters_in_batch": len(y[index].unique()),
                    "loss": _short(loss.detach()),
                    "accuracy": _short(_accuracy(model, criterion, x, y)),
                    "count": count,
                    "largest": _short(spectrum[0]),
                    "smallest_counted": _short(share[count - 1]),
                    "largest_not_counted": _short(share[count]) if count < len(share) else 0.0,
                    "spectrum": [_short(value) for value in spectrum],
                }
            )
    return rows


def run(settings: Settings, watcher: Watcher) -> Report:
    """Count, draw and write the page."""
    preset = QUICK if settings.quick else FULL
    if settings.seeds is not None:
        preset = replace(preset, seeds=settings.seeds)
    watcher.start(len(preset.cases) * len(preset.clusters) * preset.seeds)
    rows: list[dict[str, Any]] = []
    for case in preset.cases:
        for k in preset.clusters:
            for seed in range(preset.seeds):
                rows += watch_spectra(case, k, seed, preset.iterations)
                watcher.advance(f"{case.name}, {k} clusters, seed {seed}")
    _draw(settings, preset, rows)
    for row in rows:
        if row["seed"] > 0:  # one of them is enough to draw the picture again
            del row["spectrum"]
    counts = [_count_row(preset, case, k, rows) for case in preset.cases for k in preset.clusters]
    return Report(
        columns=_COUNT_COLUMNS,
        table=counts,
        sentence=_sentence(rows),
        page=_page(settings, preset, rows, counts),
        rows=rows,
        facts={
            "dimension": DIMENSION,
            "samples": SAMPLES,
            "batch": BATCH,
            "widths": list(WIDTHS),
            "seeds": preset.seeds,
            "lr": {case.name: case.lr for case in preset.cases},
            "spread": {case.name: case.spread for case in preset.cases},
        },
    )


def _short(value: Tensor | float) -> float:
    """Four digits, which is what a file needs."""
    return float(f"{float(value):.4g}")


def _criterion(case: Case, outputs: int) -> nn.Module:
    if case.loss == "cross-entropy":
        return nn.CrossEntropyLoss()
    if case.loss == "MMC":
        return MMCLoss(outputs, radius=MMC_RADIUS)
    return Criterion(_one_hot_mse)


def _one_hot_mse(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, F.one_hot(y, z.shape[1]).to(z.dtype))


def _accuracy(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        z = model(x)
    predicted = criterion.predict(z) if isinstance(criterion, MMCLoss) else z.argmax(1)
    return float((predicted == y).double().mean())


def _of(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _draw(settings: Settings, preset: Preset, rows: list[dict[str, Any]]) -> None:
    panels: dict[str, list[Spectra]] = {}
    for case in preset.cases:
        if not case.drawn:
            continue
        panels[case.name] = [
            Spectra(
                f"{k} clusters",
                {
                    str(row["iteration"]): torch.tensor(row["spectrum"])
                    for row in _of(rows, case=case.name, clusters=k, seed=0)
                },
                marked=k,
            )
            for k in preset.clusters
        ]
    title = "Batch policy E[K] of the prediction layer, seed 0 (dashed: number of clusters)"
    save_spectra(settings.picture, title, panels)


# the page

_COUNT_COLUMNS = ("criterion", "clusters k", "outputs", "count", "smallest counted", "next")


def _count_row(preset: Preset, case: Case, k: int, rows: list[dict[str, Any]]) -> list[str]:
    """Counts by iteration where they change, else one number."""
    found = _of(rows, case=case.name, clusters=k)
    by_iteration = [_range(_of(found, iteration=i), "count") for i in preset.iterations]
    same = len(set(by_iteration)) == 1
    return [
        case.name,
        str(k),
        str(found[0]["outputs"]),
        by_iteration[0] if same else " / ".join(by_iteration),
        f"{min(row['smallest_counted'] for row in found):.0e}",
        f"{max(row['largest_not_counted'] for row in found):.0e}",
    ]


def _range(rows: list[dict[str, Any]], key: str) -> str:
    low, high = min(row[key] for row in rows), max(row[key] for row in rows)
    return str(low) if low == high else f"{low}-{high}"


def _exact(rows: list[dict[str, Any]], name: str, less: int) -> tuple[int, int]:
    """In how many spectra of a case the count is the number of outputs, less so many."""
    found = _of(rows, case=name)
    return sum(row["count"] == row["outputs"] - less for row in found), len(found)


def _sentence(rows: list[dict[str, Any]]) -> str:
    parts = []
    for name, less, what in (
        ("cross-entropy", 1, "k-1"),
        ("MSE", 0, "k"),
        ("MMC", 0, "k"),
    ):
        right, of = _exact(rows, name, less)
        if of:
            parts.append(f"{what} singular values with {name} ({right} of {of} spectra)")
    return "What stands out: " + "; ".join(parts) + "."


def _growth_row(preset: Preset, case: Case, k: int, rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for iteration in preset.iterations:
        found = _of(rows, case=case.name, clusters=k, iteration=iteration)
        largest = math.exp(fmean(math.log(row["largest"]) for row in found))
        cells.append(
            f"{largest:.1e} / {fmean(row['loss'] for row in found):.3g}"
            f" / {100 * fmean(row['accuracy'] for row in found):.0f}"
        )
    first, last = _legend(preset, k)
    grew, of = _grew(_of(rows, case=case.name, clusters=k), first, last)
    return [case.name, str(k), *cells, f"{grew} of {of}" if of else "-"]


def _legend(preset: Preset, k: int) -> tuple[int, int]:
    """First and last iteration of the paper's panel, as far as they were looked at."""
    wanted = 50 if k < 10 else 100
    return min(preset.iterations, key=lambda i: abs(i - wanted)), preset.iterations[-1]


def _grew(rows: list[dict[str, Any]], first: int, last: int) -> tuple[int, int]:
    if first == last:
        return 0, 0
    before = {(r["clusters"], r["seed"]): r["largest"] for r in _of(rows, iteration=first)}
    after = {(r["clusters"], r["seed"]): r["largest"] for r in _of(rows, iteration=last)}
    return sum(after[key] > before[key] for key in before), len(before)


def _page(
    settings: Settings, preset: Preset, rows: list[dict[str, Any]], counts: list[list[str]]
) -> str:
    iterations = [str(i) for i in preset.iterations]
    rates = ", ".join(f"{case.lr:g} ({case.name})" for case in preset.cases)
    lines = [
        "# How many values of the feedback policy stand out (Fig. 8)",
        "",
        f"Written by `{settings.command}`. Gaussian clusters in R^{DIMENSION} with variance 1,"
        f" centers drawn with standard deviation {Case.spread:g} (*overlapping*: 1), {SAMPLES}"
        f" samples; four hidden ReLU layers of {WIDTHS[0]}, batch {BATCH},"
        f' `DDPNOpt(terminal="full", keep_policy=True)`; learning rates {rates}; MMC of radius'
        f" {MMC_RADIUS:g}. Seeds 0 to {preset.seeds - 1} (data, weights and order).",
        "",
        '**The paper:** "the number of nontrivial eigenvalues matches exactly the number of classes'
        " in each setup [...]. As the distribution in the prediction layer concentrates to k bulks"
        ' through training, the eigenvalues also increase" (k = 5, 8, 12, 15; iterations 50 to'
        " 250).",
        "",
        f"![Spectra]({settings.picture.name})",
        "",
        "**What is counted.** K is a matrix of parameters by states and has no eigenvalues: these"
        " are singular values of the batch's policy E[K] of the last layer, those above 1e-3 of the"
        " largest. (Eigenvalues of E[K]^T E[K] are their squares; the same ones are zero.)",
        "",
        "## The count",
        "",
        "Over all seeds and iterations; where it changes, at iterations "
        + " / ".join(iterations)
        + ". *Smallest counted*, *next*: the least value that counts and the greatest that does"
        " not, relative to the largest, over all of them.",
        "",
        markdown_table(_COUNT_COLUMNS, counts),
        "",
        *_count_remarks(rows),
        "",
        "## Through training",
        "",
        "Largest singular value (geometric mean over seeds) / training loss / accuracy in % at each"
        " iteration; *grew*: seeds on which the largest value is higher at the last iteration of"
        " the paper's legend than at the first (50, or 100 for k of 12 and 15).",
        "",
        markdown_table(
            ["criterion", "k", *iterations, "grew"],
            [_growth_row(preset, case, k, rows) for case in preset.cases for k in preset.clusters],
        ),
        "",
        *_growth_remarks(preset, rows),
    ]
    return "\n".join(lines)


def _count_remarks(rows: list[dict[str, Any]]) -> list[str]:
    right = {
        name: f"{n} of {of}"
        for name, less in (("cross-entropy", 1), ("MSE", 0), ("MMC", 0))
        for n, of in [_exact(rows, name, less)]
        if of
    }
    first, last = (f(row["iteration"] for row in rows) for f in (min, max))
    plain = [row for row in rows if row["outputs"] == row["clusters"]]
    of = len(_of(plain, iteration=first))
    same = sum(
        a["count"] == b["count"]
        for a, b in zip(_of(plain, iteration=first), _of(plain, iteration=last), strict=True)
    )
    lines = [
        f"**k - 1 with cross-entropy** ({right['cross-entropy']} spectra)**, k with MSE**"
        f" ({right['MSE']})"
        + (f" **and MMC** ({right['MMC']})" if "MMC" in right else "")
        + "**.** At the last layer, h = W x + b and `Q_ux = sum_o (V_hh W)_o x` with V_hh the"
        " criterion's Hessian, so the right-singular vectors of K lie in the range of W^T V_hh."
        " The Hessian of cross-entropy, diag(p) - p p^T, maps the vector of ones to zero (a shift"
        " of all logits changes no probability): k - 1 directions are left. That of MSE and MMC is"
        " a multiple of the identity: there are k, and E[K] is W times the mean input, whatever the"
        " classes are. Below them is rounding in single precision. (The paper's panels have linear"
        " axes with ticks at 0, 10 and 20, on which k - 1 and k are hard to tell apart.)"
        + _fewer(plain),
        "",
        "**With one output per class the count says nothing about training**: it is the number of"
        f" outputs, less one or not, and at iteration {first}, when the network has learned"
        f" nothing, it is the same as at the end in {same} of {of} runs.",
    ]
    many = f"cross-entropy, {MANY} outputs"
    found = _of(rows, case=many)
    if found:
        begin, end = _of(found, iteration=first), _of(found, iteration=last)
        right_end = [row for row in end if row["count"] == row["clusters"] - 1]
        low = min((row["smallest_counted"] for row in right_end), default=0.0)
        high = max((row["largest_not_counted"] for row in right_end), default=0.0)
        lines += [
            "",
            f"**With {MANY} outputs for k clusters it does follow the classes**: at iteration"
            f" {first} the count is {_range(begin, 'count')} for every k; at iteration {last} it is"
            f" k - 1 in {len(right_end)} of {len(end)} runs"
            + _others(end)
            + f". (The rest fades, it is not zero: in those runs the least value that counts is at"
            f" {low:.0e} of the largest or above, the next at {high:.0e} or below.) The"
            " outputs that no class uses lose their probability, and with it their part of the"
            " Hessian. That is the concentration the paper describes; with MSE it could not happen,"
            " as the Hessian does not depend on the state.",
        ]
    return lines


def _fewer(rows: list[dict[str, Any]]) -> str:
    """Where cross-entropy's spectra have fewer values than k - 1."""
    off = [
        f"k = {row['clusters']}, seed {row['seed']}, iteration {row['iteration']}: the batch of"
        f" {BATCH} holds samples of {row['clusters_in_batch']} clusters"
        for row in rows
        if row["case"].startswith("cross-entropy") and row["count"] < row["clusters"] - 1
    ]
    return f" Fewer with cross-entropy: {'; '.join(off)}." if off else ""


def _others(rows: list[dict[str, Any]]) -> str:
    off = [row for row in rows if row["count"] != row["clusters"] - 1]
    if not off:
        return ""
    listed = ", ".join(
        f"{_range(_of(off, clusters=k), 'count')} at k = {k} (loss"
        f" {fmean(r['loss'] for r in _of(off, clusters=k)):.2g})"
        for k in sorted({row["clusters"] for row in off})
    )
    return f" (else {listed})"


def _growth_remarks(preset: Preset, rows: list[dict[str, Any]]) -> list[str]:
    parts = []
    for case in preset.cases:
        grew = of = 0
        for k in preset.clusters:
            a, b = _grew(_of(rows, case=case.name, clusters=k), *_legend(preset, k))
            grew, of = grew + a, of + b
        parts.append(f"{case.name} {grew} of {of}")
    peak = _peak_loss(preset, rows)
    return [
        f"**Do they increase?** Runs in which they do, of all k: {'; '.join(parts)}. With"
        " cross-entropy the values rise while the network learns to separate the clusters (W and x"
        " grow) and fall once it has: p(1 - p) goes to zero with the loss. In the runs above they"
        f" are largest where the loss is {peak}, among the iterations looked at. With MSE and MMC,"
        " whose Hessian is constant, they follow |W| |E[x]| alone: they rise while the"
        " network learns and then stay about where they are.",
    ]


def _peak_loss(preset: Preset, rows: list[dict[str, Any]]) -> str:
    losses = []
    for k in preset.clusters:
        for seed in range(preset.seeds):
            found = _of(rows, case="cross-entropy", clusters=k, seed=seed)
            losses.append(max(found, key=lambda row: row["largest"])["loss"])
    losses.sort()
    return f"about {losses[len(losses) // 2]:.1g} (from {losses[0]:.1g} to {losses[-1]:.1g})"
