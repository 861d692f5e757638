"""The pages made from the grid of :mod:`~ocnopt.experiments.reproduce.ablation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from ocnopt.experiments.figures.heatmap import Differences, save_differences
from ocnopt.experiments.figures.sensitivity import Course, Training, save_training
from ocnopt.experiments.outcome import CAP, Outcome
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce.ablation import (
    PAIRS,
    QUICK_SEEDS,
    QUICK_STEPS,
    SEEDS,
    STEPS,
    Cell,
    Cells,
    Pair,
    run_cells,
)
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher, markdown_table
from ocnopt.experiments.significance import difference

__all__ = ["figure4", "figure9", "table9", "table10", "tables6_8"]

_PRINTED = PAIRS[:3]
_ADAM = PAIRS[3:]


def figure4(settings: Settings, watcher: Watcher) -> Report:
    """Differences over the grid, and two courses of training."""
    pairs = _some(_PRINTED, settings)
    cells = _grid(settings, pairs, watcher, curves=True)
    save_differences(settings.picture, [_differences(pair, cells) for pair in pairs])
    courses = settings.output / f"{settings.name}b.png"
    examples = [pair for pair in pairs if pair.example and pair.example[0] in pair.lrs]
    save_training(courses, "Courses of training (Fig. 4b)", [_course(p, cells) for p in examples])
    claim = (
        "Feedback improves on the baseline across most settings, the more the larger the learning "
        "rate; training varies less and converges faster."
    )
    extra = [
        f"![Differences]({settings.name}.png)",
        "",
        "The paper's form of Fig. 4a: training loss and accuracy with feedback minus those "
        "without; blue is an improvement. Every panel has its own scale.",
        "",
        f"![Courses of training]({settings.name}b.png)",
    ]
    return _report(settings, "Figure 4: with and without feedback", claim, pairs, cells, extra)


def figure9(settings: Settings, watcher: Watcher) -> Report:
    """The same for Adam."""
    pairs = _some(_ADAM, settings)
    cells = _grid(settings, pairs, watcher)
    save_differences(settings.picture, [_differences(pair, cells) for pair in pairs])
    claim = "The improvements from feedback remain consistent for Adam."
    extra = [f"![Differences]({settings.name}.png)"]
    return _report(settings, "Figure 9: Adam", claim, pairs, cells, extra)


def table9(settings: Settings, watcher: Watcher) -> Report:
    """Training losses beside the paper's."""
    return _absolute(
        settings,
        watcher,
        "Table 9: training loss",
        lambda cell: f"{cell.loss:.4f}",
        lambda pair: pair.loss,
        4,
    )


def table10(settings: Settings, watcher: Watcher) -> Report:
    """Accuracies beside the paper's."""
    return _absolute(
        settings,
        watcher,
        "Table 10: test accuracy (%)",
        lambda cell: f"{cell.accuracy:.2f}",
        lambda pair: pair.accuracy,
        2,
    )


def tables6_8(settings: Settings, watcher: Watcher) -> Report:
    """Every optimizer at the learning rate that the paper tuned it to."""
    wanted = [(pair, pair.best, (None, *pair.regs)) for pair in _PRINTED if pair.best is not None]
    cells = run_cells(settings, wanted, watcher)
    columns = ["", "", "loss: paper", "loss: here", "accuracy: paper", "accuracy: here"]
    table: list[list[str]] = []
    sentences = []
    for pair, lr, regs in wanted:
        lender = cells.lender(pair, lr)
        loss, accuracy = _BEST[pair.name]
        ours = [(f"{pair.name}, lr {lr:g}", lender, loss[0], accuracy[0])]
        ours += [(_label(reg), cells.ddpnopt(pair, lr, reg), loss[1], accuracy[1]) for reg in regs]
        for i, (label, cell, paper_loss, paper_accuracy) in enumerate(ours):
            shown = i < 2  # the paper has one row with feedback
            table.append(
                [
                    pair.name if i == 0 else "",
                    label,
                    f"{paper_loss:.3f}" if shown else "",
                    f"{cell.loss:.3f}",
                    f"{paper_accuracy:.2f}" if shown else "",
                    f"{cell.accuracy:.2f}",
                ]
            )
        sentences.append(f"{pair.name}: {_against(lender, cells.ddpnopt(pair, lr, None))}")
    sentence = f"At the paper's best learning rates feedback {'; '.join(sentences)}."
    page = [
        "# Tables 6 to 8: at the best learning rate of each baseline",
        "",
        _setting(settings),
        "",
        "**The paper says:** for most cases extending the baseline to accept the Bellman framework "
        "improves the performance.",
        "",
        f"**Here:** {sentence}",
        "",
        markdown_table(columns, table),
        "",
    ]
    rows = [cell.to_json() for cell in cells.all]
    _draw_best(settings, [pair for pair, _, _ in wanted], cells)
    page += [f"![Losses and accuracies]({settings.name}.png)", ""]
    return Report(columns, table, sentence, "\n".join(page), rows)


#: Tables 6 to 8: training loss and accuracy of the baseline and of DDPNOpt.
_BEST = {
    "SGD": ((0.035, 0.032), (95.36, 95.52)),
    "RMSprop": ((0.058, 0.052), (94.33, 94.63)),
    "EKFAC": ((0.074, 0.067), (95.24, 95.19)),
}


def _some(pairs: Sequence[Pair], settings: Settings) -> list[Pair]:
    """All of the grid, or for a quick look its least and largest values."""
    if not settings.quick:
        return list(pairs)
    ends = slice(None, None, 3)
    return [
        Pair(
            p.name,
            p.optimizer,
            p.preconditioner,
            p.lrs[ends],
            p.regs[ends],
            p.best,
            tuple(_ends(line) for line in p.loss[ends]),
            tuple(_ends(line) for line in p.accuracy[ends]),
            (p.lrs[0], p.regs[0]),
        )
        for p in pairs
    ]


def _ends(line: tuple[float, ...]) -> tuple[float, ...]:
    """The baseline, the first and the last regularization."""
    return (line[0], line[1], line[-1])


def _grid(
    settings: Settings, pairs: Sequence[Pair], watcher: Watcher, curves: bool = False
) -> Cells:
    wanted = [(pair, lr, (None, *pair.regs)) for pair in pairs for lr in pair.lrs]
    return run_cells(settings, wanted, watcher, curves)


def _differences(pair: Pair, cells: Cells) -> Differences:
    """DDPNOpt minus the baseline, cell by cell."""

    def grid(value: Callable[[Cell], float]) -> list[list[float]]:
        return [
            [
                value(cells.ddpnopt(pair, lr, reg)) - value(cells.lender(pair, lr))
                for reg in pair.regs
            ]
            for lr in pair.lrs
        ]

    notes = [[_failures(pair, cells, lr, reg) for reg in pair.regs] for lr in pair.lrs]
    return Differences(
        f"DDPNOpt vs {pair.name}",
        pair.lrs,
        pair.regs,
        "regularization of V_xx",
        grid(lambda cell: cell.loss),
        grid(lambda cell: cell.accuracy),
        notes if any(note for line in notes for note in line) else None,
    )


def _failures(pair: Pair, cells: Cells, lr: float, reg: float) -> str:
    lender, own = cells.lender(pair, lr).failed, cells.ddpnopt(pair, lr, reg).failed
    return f"diverged {lender}, {own}" if lender or own else ""


def _course(pair: Pair, cells: Cells) -> Training:
    assert pair.example is not None
    lr, reg = pair.example
    both = {pair.name: cells.lender(pair, lr), "DDPNOpt": cells.ddpnopt(pair, lr, reg)}
    return Training(
        f"lr {lr:g}, regularization {reg:g}",
        [_course_of(name, cell.outcomes) for name, cell in both.items()],
    )


def _course_of(name: str, outcomes: Sequence[Outcome]) -> Course:
    """Curves at the steps that both were taken at or between, the same for all seeds."""
    longest = max(outcomes, key=lambda outcome: len(outcome.accuracies))
    iterations: list[int] = []
    for step, _ in longest.accuracies:
        if _between(longest, iterations[-1] if iterations else 0, step):
            iterations.append(step)
    losses, accuracies = [], []
    for outcome in outcomes:
        reached = [step for step in iterations if step <= outcome.steps]
        parts = [_between(outcome, a, b) for a, b in zip([0, *reached], reached, strict=False)]
        losses.append([fmean(part) for part in parts if part])
        known = dict(outcome.accuracies)
        accuracies.append([100 * known[step] for step in reached if step in known])
    return Course(name, iterations, losses, accuracies)


def _between(outcome: Outcome, start: int, end: int) -> list[float]:
    """The losses of a curve after one step and up to another."""
    return [value for step, value in outcome.losses if start < step <= end]


def _report(
    settings: Settings,
    title: str,
    claim: str,
    pairs: Sequence[Pair],
    cells: Cells,
    extra: Sequence[str],
) -> Report:
    columns = ["", "learning rate", "baseline", "rank one", "V_xx regularized"]
    table = []
    for pair in pairs:
        for i, lr in enumerate(pair.lrs):
            low, high = _range([cells.ddpnopt(pair, lr, reg) for reg in pair.regs])
            table.append(
                [
                    pair.name if i == 0 else "",
                    f"{lr:g}",
                    cells.lender(pair, lr).text(),
                    cells.ddpnopt(pair, lr, None).text(),
                    f"{low} to {high}",
                ]
            )
    sentence = _seen(pairs, cells)
    page = [
        f"# {title}",
        "",
        _setting(settings),
        "",
        f"**The paper says:** {claim}",
        "",
        f"**Here:** {sentence}",
        "",
        *extra,
        "",
        "Training loss ± standard deviation over seeds / test accuracy in %. *Rank one*: DDPNOpt "
        "with its defaults, which need no V_xx; *V_xx regularized*: the least and the greatest "
        "loss / accuracy over the regularizations of the grid.",
        "",
        markdown_table(columns, table),
        "",
        *_counts(pairs, cells),
    ]
    return Report(columns, table, sentence, "\n".join(page), [cell.to_json() for cell in cells.all])


def _range(cells: Sequence[Cell]) -> tuple[str, str]:
    ordered = sorted(cells, key=lambda cell: cell.loss)
    low, high = (f"{cell.loss:.4f} / {cell.accuracy:.2f}" for cell in (ordered[0], ordered[-1]))
    return low, high


def _counts(pairs: Sequence[Pair], cells: Cells) -> list[str]:
    """In how many cells feedback helps, here and in the paper."""
    lines = []
    for pair in pairs:
        here = [
            difference(
                [o.capped_loss for o in cells.ddpnopt(pair, lr, reg).outcomes],
                [o.capped_loss for o in cells.lender(pair, lr).outcomes],
            )
            for lr in pair.lrs
            for reg in pair.regs
        ]
        text = (
            f"- **{pair.name}**: the training loss is lower with feedback in {here.count(-1)} of "
            f"{len(here)} cells, higher in {here.count(1)}, no different beyond the spread in "
            f"{here.count(0)}"
        )
        if pair.loss:
            paper = [line[0] - value for line in pair.loss for value in line[1:]]
            lower = sum(gap > 0 for gap in paper)
            text += f" (paper's means: lower in {lower}, higher in {len(paper) - lower})"
        lines.append(text + ".")
    return [*lines, ""]


def _seen(pairs: Sequence[Pair], cells: Cells) -> str:
    """Ratios of mean losses at the ends of every sweep."""
    parts = []
    for pair in pairs:
        ratios = []
        for lr in (pair.lrs[0], pair.lrs[-1]):
            lender = cells.lender(pair, lr).loss
            own = fmean(cells.ddpnopt(pair, lr, reg).loss for reg in pair.regs)
            one = cells.ddpnopt(pair, lr, None).loss
            ratios.append(f"{own / lender:.2f} (rank one {one / lender:.2f}) at {lr:g}")
        parts.append(f"{pair.name}'s {' and '.join(ratios)}")
    return (
        "With feedback the training loss is, as a multiple of the baseline's at the same learning "
        f"rate, {'; '.join(parts)}."
    )


def _absolute(
    settings: Settings,
    watcher: Watcher,
    title: str,
    shown: Callable[[Cell], str],
    paper: Callable[[Pair], tuple[tuple[float, ...], ...]],
    digits: int,
) -> Report:
    pairs = _some(_PRINTED, settings)
    cells = _grid(settings, pairs, watcher)
    columns = [
        "",
        "learning rate",
        "baseline",
        *(f"eps {i + 1}" for i in range(len(pairs[0].regs))),
    ]
    columns.append("rank one")
    table = []
    for pair in pairs:
        names = ", ".join(f"{reg:g}" for reg in pair.regs)
        table.append([f"{pair.name}: eps {names}", *[""] * (len(columns) - 1)])
        for lr, printed in zip(pair.lrs, paper(pair), strict=True):
            own = [cells.lender(pair, lr), *(cells.ddpnopt(pair, lr, reg) for reg in pair.regs)]
            table.append(
                [
                    "",
                    f"{lr:g}",
                    *(
                        f"{shown(cell)} ({value:.{digits}f})"
                        for cell, value in zip(own, printed, strict=True)
                    ),
                    shown(cells.ddpnopt(pair, lr, None)),
                ]
            )
    sentence = _seen(pairs, cells)
    save_differences(settings.picture, [_differences(pair, cells) for pair in pairs])
    page = [
        f"# {title}",
        "",
        _setting(settings),
        "",
        "In every cell: ours, and the paper's in brackets. *eps*: the regularization of V_xx; "
        "*rank one*: DDPNOpt's defaults, which need none.",
        "",
        f"**Here:** {sentence}",
        "",
        markdown_table(columns, table),
        "",
        *_counts(pairs, cells),
        f"![Differences]({settings.name}.png)",
        "",
    ]
    rows = [cell.to_json() for cell in cells.all]
    return Report(columns, table, sentence, "\n".join(page), rows)


def _draw_best(settings: Settings, pairs: Sequence[Pair], cells: Cells) -> None:
    from ocnopt.experiments.figures.table import save_accuracies

    panels = {}
    for pair in pairs:
        assert pair.best is not None
        _, paper = _BEST[pair.name]
        lines: list[tuple[str, list[float], float | None]] = [
            (pair.name, _accuracies(cells.lender(pair, pair.best)), paper[0])
        ]
        for reg in (*pair.regs, None):
            cell = cells.ddpnopt(pair, pair.best, reg)
            lines.append((_label(reg), _accuracies(cell), None if reg else paper[1]))
        panels[f"{pair.name}, lr {pair.best:g}"] = lines
    save_accuracies(settings.picture, "Test accuracy (%): ours, and the paper's as rings", panels)


def _accuracies(cell: Cell) -> list[float]:
    return [100 * outcome.test_accuracy for outcome in cell.outcomes]


def _label(reg: float | None) -> str:
    return "DDPNOpt" if reg is None else f"DDPNOpt, eps {reg:g}"


def _against(lender: Cell, own: Cell) -> str:
    """Loss and accuracy of the rank-one default beside its lender's, in words."""
    losses = difference(
        [o.capped_loss for o in own.outcomes], [o.capped_loss for o in lender.outcomes]
    )
    accuracies = difference(_accuracies(own), _accuracies(lender))
    loss = {-1: "lowers the loss", 0: "does not change the loss", 1: "raises the loss"}[losses]
    score = {-1: "lowers the accuracy", 0: "leaves the accuracy", 1: "raises the accuracy"}
    return (
        f"{loss} ({lender.loss:.3f} to {own.loss:.3f}) and {score[accuracies]} "
        f"({lender.accuracy:.2f} to {own.accuracy:.2f} %)"
    )


def _setting(settings: Settings) -> str:
    recipe = RECIPES["digits-fcn"]
    seeds = settings.seeds or (QUICK_SEEDS if settings.quick else SEEDS)
    steps = QUICK_STEPS if settings.quick else STEPS
    widths = "-".join(map(str, recipe["widths"]))
    return (
        f"Written by `{settings.command}`. DIGITS, five linear layers ({widths}, "
        f"{recipe['activation']}), batches of {recipe['batch_size']}, {steps} steps, seeds 0 to "
        f"{seeds - 1}, trained together; training loss is the mean over the last epoch's steps, "
        f"at most {CAP:g}, which is what a run that diverges counts as. DDPNOpt has "
        "`terminal='full', value_reg=eps` (V_xx as matrices, Algorithm 3 line 12), where it is not "
        "called rank one, and its defaults else. Both optimizers share all other settings, EKFAC's "
        "damping (0.1) included. The paper gives neither widths nor the length of training."
    )
