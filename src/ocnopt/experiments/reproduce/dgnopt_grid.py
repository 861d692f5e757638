"""DGNOpt on residual and branching networks: what information and alignment are worth.

Liu, Chen & Theodorou, ICML 2021, play layers as players on such networks. No figure of theirs is at
hand in numbers, so that all pages are this project's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ocnopt.errors import GraphError
from ocnopt.experiments.compare.rates import workable_range
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.figures.heatmap import Differences, save_differences
from ocnopt.experiments.figures.sensitivity import Sweep, save_sensitivity
from ocnopt.experiments.outcome import CAP
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce import IMAGES
from ocnopt.experiments.reproduce.dgnopt_cells import (
    ALIGNMENTS,
    FAMILIES,
    SEEDS,
    Cell,
    Family,
    Method,
    Row,
    run_rows,
)
from ocnopt.experiments.reproduce.dgnopt_damping import Damped, Plan, dampings, lines
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.experiments.setup import build_network, load_data
from ocnopt.experiments.significance import difference
from ocnopt.experiments.verdict import spread
from ocnopt.optim.emsa import EMSA

__all__ = ["STUDIES", "Study", "study"]

#: Percentage points of accuracy that a workable learning rate may be below the best.
MARGIN = 2.0


@dataclass(frozen=True)
class Study:
    """A grid on one data set and network.

    Attributes:
        recipe: Data, network and batch size, of :data:`RECIPES`.
        title: Heading of the page.
        steps: Length of a run; None for the recipe's.
        seeds: Runs per cell.
        further: Whether alignments and dampings are compared, too.
    """

    recipe: str
    title: str
    steps: int | None = None
    seeds: int = SEEDS
    further: bool = True


_KINDS = {"residual": "Residual networks", "inception": "Branching networks"}
#: By experiment. On images there is the grid alone, of runs that are short enough for two cores.
STUDIES: Mapping[str, Study] = {
    **{kind: Study(f"digits-{kind}", title) for kind, title in _KINDS.items()},
    **{
        f"{kind}-{name}": Study(f"{name}-{kind}", f"{title} on {shown}", 300, 3, further=False)
        for kind, title in _KINDS.items()
        for name, shown in IMAGES.items()
    },
}
#: By kind: the small version's, which needs no files.
QUICK = {
    "residual": Study("digits-residual", "Residual networks", 150, 2),
    "inception": Study("digits-inception", "Branching networks", 40, 2),
}


def study(settings: Settings, watcher: Watcher) -> Report:
    """Run the grid that the settings name.

    Raises:
        InputError: The data are not there, or a setting cannot be used.
    """
    plan = QUICK[settings.name.partition("-")[0]] if settings.quick else STUDIES[settings.name]
    plan = replace(plan, seeds=settings.seeds or plan.seeds)
    families = list(FAMILIES)
    if settings.quick:  # the least and the largest learning rate
        families = [replace(f, lrs=(f.lrs[0], f.lrs[-1])) for f in families]
    base = TrainConfig(**RECIPES[plan.recipe], data_root=settings.data_root)
    base = replace(base, steps=plan.steps or base.steps)
    wanted = {f.name: (f, [f.lender, *f.extensions]) for f in families}
    aligned: dict[str, tuple[Family, list[Method]]] = {}
    damped: Plan = {}
    if plan.further:
        aligned = {f.name: (f, [f.aligned(a) for a in ALIGNMENTS]) for f in families if f.couples}
        damped = dampings(settings.quick, costly=base.network == "inception")
    everything = [*wanted.values(), *aligned.values(), *damped.values()]
    rows = iter(run_rows(replace(settings, seeds=plan.seeds), base, everything, watcher))
    grid = dict(zip(wanted, rows, strict=False))
    choices = dict(zip(aligned, rows, strict=False))
    found = [Damped(*key, own) for key, own in zip(damped, rows, strict=True)]
    return _report(settings, base, plan, grid, choices, found)


# the page


def _report(
    settings: Settings,
    base: TrainConfig,
    plan: Study,
    grid: Mapping[str, list[Row]],
    choices: Mapping[str, list[Row]],
    damped: list[Damped],
) -> Report:
    save_differences(settings.picture, [_differences(rows) for rows in grid.values()])
    for name, rows in choices.items():
        panel = replace(_differences(rows), title=f"{name}, alignments minus late")
        save_differences(settings.output / f"{settings.name}b.png", [panel])
        sweeps = [_sweep(row) for row in (*grid[name], *rows[1:])]
        heading = f"{name} and what extends it, over learning rates"
        save_sensitivity(settings.output / f"{settings.name}c.png", heading, sweeps)
    columns = ["", "learning rate", "open loop", "DDPNOpt", "feedback", "group rational"]
    table = [line for rows in grid.values() for line in _lines(rows, len(columns) - 2)]
    sentence = _seen(grid, choices)
    page = [
        f"# {plan.title}: information{' and alignment' if plan.further else ''}",
        "",
        _setting(settings, base, plan.seeds),
        "",
        "No figure of the paper (Liu, Chen & Theodorou, *Dynamic Game Theoretic Neural Optimizer*, "
        "ICML 2021) is known in numbers: the grid and what is seen in it are ours alone.",
        "",
        f"**Here:** {sentence}",
        "",
        f"![Differences]({settings.name}.png)",
        "",
        "Training loss and accuracy minus those of the open loop, which is the optimizer that "
        "lends M, at the same learning rate; blue is an improvement. Every panel has its own "
        "scale.",
        "",
        "## What players know",
        "",
        "Training loss ± standard deviation over seeds / test accuracy in %. *DDPNOpt* takes "
        "layers in the order of their calls, one per stage; *feedback* and *group rational* are "
        "DGNOpt, whose stages may have several players, with the late alignment. Only a Kronecker "
        "M has blocks between players: without them group rational is feedback, and not listed.",
        "",
        markdown_table(columns, table),
        "",
        *(f"- {line}" for rows in grid.values() for line in _counts(rows)),
        "",
        "At the learning rate with the lowest mean training loss of each, and where it works: the "
        f"learning rates around that of the best accuracy at which no run diverges and accuracy is "
        f"at most {MARGIN:g} points lower.",
        "",
        markdown_table(_BEST, [_best_line(row) for rows in grid.values() for row in rows]),
        "",
        *(line for name, rows in choices.items() for line in _alignments(settings, name, rows)),
        *(lines(damped) if damped else []),
        "## E-MSA",
        "",
        _emsa(base),
        "",
    ]
    all_rows = [*grid.values(), *choices.values(), *(part.rows for part in damped)]
    cells = [c for rows in all_rows for row in rows for c in row]
    facts = {"settings": replace(base, data_root=None).to_json(), "margin": MARGIN}
    raw = [cell.to_json() for cell in cells]
    return Report(columns, table, sentence, "\n".join(page), raw, facts)


def _lines(rows: Sequence[Row], cells: int) -> list[list[str]]:
    """A table line per learning rate."""
    lines = []
    for i, at_rate in enumerate(zip(*rows, strict=True)):
        texts = [cell.text() for cell in at_rate]
        name = at_rate[0].family if i == 0 else ""
        lines.append([name, f"{at_rate[0].lr:g}", *texts, *[""] * (cells - len(texts))])
    return lines


def _alignments(settings: Settings, name: str, rows: list[Row]) -> list[str]:
    late, *others = rows
    columns = ["learning rate", *(row[0].method.name for row in rows)]
    table = [line[1:] for line in _lines(rows, len(rows))]
    return [
        "## Alignment",
        "",
        f"Group-rational DGNOpt under {name}. *Late* and *early*: a shortcut's layer, or the "
        "shorter branches, stand beside the last or the first layers that they bypass; *random*: "
        "another alignment every 100 steps; *greedy* (epsilon-greedy) and *EXP3++*: bandits, "
        "rewarded by how much the loss fell within these steps. Each seed has a bandit of its own.",
        "",
        markdown_table(columns, table),
        "",
        *(
            f"- **{row[0].method.name}** against late: {_counted(_compared(row, late))}."
            for row in others
        ),
        "",
        f"![Alignments minus late]({settings.name}b.png)",
        "",
        f"![Over learning rates]({settings.name}c.png)",
        "",
    ]


_BEST = ["", "", "best learning rate", "training loss", "test accuracy (%)", "works"]


def _best_line(row: Row) -> list[str]:
    best = min(row, key=lambda cell: cell.loss)
    works = workable_range([c.lr for c in row], [c.outcomes for c in row], MARGIN)
    extension = row[0].method.name != row[0].family
    return [
        "" if extension else best.family,
        best.method.name if extension else "open loop",
        f"{best.lr:g}",
        f"{best.loss:.4f} ± {spread(best.losses):.3f}",
        f"{best.accuracy:.2f} ± {spread(best.accuracies):.2f}",
        "nowhere" if works is None else f"{works.low:g} to {works.high:g}",
    ]


def _differences(rows: Sequence[Row]) -> Differences:
    """Every method minus the first, cell by cell."""
    first, *others = rows

    def minus(value: Callable[[Cell], float]) -> list[list[float]]:
        return [[value(row[i]) - value(first[i]) for row in others] for i in range(len(first))]

    notes = [[_note(row[i].failed, first[i].failed) for row in others] for i in range(len(first))]
    name = first[0].method.name
    return Differences(
        f"minus {name}",
        [cell.lr for cell in first],
        [row[0].method.name for row in others],
        "",
        minus(lambda cell: cell.loss),
        minus(lambda cell: cell.accuracy),
        notes if any(note for line in notes for note in line) else None,
    )


def _note(own: int, other: int) -> str:
    return f"diverged {other}, {own}" if own or other else ""


def _sweep(row: Row) -> Sweep:
    losses = [
        [math.nan if o.train_loss is None else o.train_loss for o in cell.outcomes] for cell in row
    ]
    works = workable_range([c.lr for c in row], [c.outcomes for c in row], MARGIN)
    return Sweep(
        row[0].method.name,
        [cell.lr for cell in row],
        [cell.accuracies for cell in row],
        losses,
        None if works is None else (works.low, works.high),
    )


# in words


def _compared(own: Row, other: Row) -> list[int]:
    """At every learning rate: whether the loss is lower (-1) or higher (1) beyond the spread."""
    return [difference(a.losses, b.losses) for a, b in zip(own, other, strict=True)]


def _counted(compared: Sequence[int]) -> str:
    return (
        f"the training loss is lower at {compared.count(-1)} of {len(compared)} learning rates, "
        f"higher at {compared.count(1)}, no different beyond the spread at {compared.count(0)}"
    )


def _counts(rows: Sequence[Row]) -> list[str]:
    """What each step of information adds."""
    return [
        f"**{row[0].family}**, {row[0].method.name} against {_called(before)}: "
        f"{_counted(_compared(row, before))}."
        for i, row in enumerate(rows)
        for before in ([rows[0], rows[i - 1]] if i > 1 else rows[:i])
    ]


def _called(row: Row) -> str:
    return "the open loop" if row[0].method.name == row[0].family else row[0].method.name


def _seen(grid: Mapping[str, list[Row]], choices: Mapping[str, list[Row]]) -> str:
    """Counts over the whole grid."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for rows in grid.values():
        named = {_called(row): row for row in rows}
        for one, other in (
            ("feedback", "the open loop"),
            ("feedback", "DDPNOpt"),
            ("group rational", "feedback"),
        ):
            if one in named:
                pairs.setdefault((one, other), []).extend(_compared(named[one], named[other]))
    for late, *others in choices.values():
        for row in others:
            pairs.setdefault((f"{_called(row)} alignment", "late alignment"), []).extend(
                _compared(row, late)
            )
    parts = [
        f"with {one} below that with {other} in {found.count(-1)} of {len(found)} cells and above "
        f"it in {found.count(1)}"
        for (one, other), found in pairs.items()
    ]
    return (
        "At the same learning rate and beyond the spread over seeds, DGNOpt's training loss is "
        f"{'; '.join(parts)}."
    )


def _emsa(base: TrainConfig) -> str:
    """Whether E-MSA can be compared, found out by trying it on a batch."""
    config = base.resolved()
    data = load_data(config)
    try:
        optimizer = EMSA(build_network(config, data), torch.nn.CrossEntropyLoss())
        optimizer.step(data.train_x[:8], data.train_y[:8])
    except GraphError as error:
        return (
            "E-MSA, a baseline of the paper's, has no part in this: it minimizes a Hamiltonian of "
            "every layer's own, which is there on a chain of layers alone. Here it says: "
            f"*{error}*."
        )
    return "E-MSA runs on this network, but is not part of the grid."


def _setting(settings: Settings, base: TrainConfig, seeds: int) -> str:
    config = base.resolved()
    assert config.widths is not None
    widths = "-".join(map(str, config.widths))
    kind = {
        "residual-fcn": f"residual blocks of {config.depth} linear layers ({widths}, "
        f"{config.activation}; a linear layer as shortcut where the width changes)",
        "residual-cnn": f"residual blocks of two convolutions ({widths} channels; a 1x1 convolution"
        " as shortcut where their number changes)",
        "inception": f"inception blocks of four branches ({widths} channels)",
    }[config.network]
    data = IMAGES.get(config.dataset, config.dataset.upper())
    return (
        f"Written by `{settings.command}`. {data}, {kind}, batches of {config.batch_size}, "
        f"{config.steps} steps, seeds 0 to {seeds - 1}; training loss is the mean over "
        f"the last epoch's steps, or all of them if there are fewer, at most {CAP:g}, which is "
        "what a run that diverges counts as. All optimizers have their defaults, EKFAC's damping "
        "(0.1) included."
    )
