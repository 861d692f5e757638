"""Say what a comparison showed, from its numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from ocnopt.experiments.compare.rates import Workable
from ocnopt.experiments.verdict import spread

if TYPE_CHECKING:
    from ocnopt.experiments.compare.comparison import Comparison, Entry

__all__ = ["mean_and_spread", "points", "range_texts", "remarks", "seeds_text", "verdict"]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation; None where there is nothing."""
    return (fmean(values), spread(values)) if values else None


def range_texts(workable: Workable | None) -> tuple[str, str]:
    """The range and its factor, such as `0.01 to ≥0.46` and `≥46x` where it may well go on."""
    if workable is None:
        return "none", "-"
    low = f"{'≤' if workable.open_low else ''}{workable.low:.3g}"
    high = f"{'≥' if workable.open_high else ''}{workable.high:.3g}"
    return f"{low} to {high}", f"{'≥' if workable.open else ''}{workable.factor:.3g}x"


def verdict(comparison: Comparison) -> str:
    """Say who is better on the test set and whose workable range is widest, where this is known."""
    return " ".join([_accuracy(comparison), _ranges(comparison)]).strip()


def _accuracy(comparison: Comparison) -> str:
    sound = [e for e in comparison.entries if e.final and len(e.finished) == len(e.final)]
    others = [e.label for e in comparison.entries if e not in sound]
    left_out = f" ({_listed(others)} left out: runs diverged.)" if others else ""
    if not sound:
        return "At no contender's best learning rate did all final runs end without divergence."
    top = max(sound, key=lambda e: _interval(e)[0])
    if len(sound) == 1:
        return f"The test accuracy of {top.label} is {_percent(top)}.{left_out}"
    if comparison.seeds == 1:
        return (
            "With one seed there is no spread, and so no telling which contender is better; the "
            f"highest test accuracy is that of {top.label}, {_percent(top)}.{left_out}"
        )
    beaten: list[Entry] = []
    level: list[Entry] = []
    for entry in sound:
        if entry is not top:
            (beaten if _above(top, entry) else level).append(entry)
    if not beaten:
        lowest = min((e for e in sound if e is not top), key=lambda e: _interval(e)[0])
        return (
            "On the test set no contender is better than the others beyond the spread over"
            f" {seeds_text(comparison)}: from {_percent(lowest)} ({lowest.label}) to"
            f" {_percent(top)} ({top.label}).{left_out}"
        )
    text = (
        f"{top.label} has the highest test accuracy, {_percent(top)}: better than"
        f" {_listed([_with(e) for e in beaten])} beyond the spread over {comparison.seeds} seeds"
    )
    if level:
        text += f", but not than {_listed([_with(e) for e in level])}"
    return f"{text}.{left_out}"


def _ranges(comparison: Comparison) -> str:
    """Whose range is widest, where one is so by more than the sweep's resolution."""
    found = [(e, e.workable) for e in comparison.entries if e.workable is not None]
    if len(comparison.entries) < 2 or not found:
        return ""
    if len(found[0][0].contender.lrs) < 2:
        return ""
    found.sort(key=lambda pair: -pair[1].factor)
    (top, widest), rest = found[0], found[1:]
    none = [e.label for e in comparison.entries if e.workable is None]
    closed = all(not w.open for _, w in rest)
    if rest and not closed:
        open_ended = [e.label for e, w in found if w.open]
        ends = "that of {} reaches" if len(open_ended) == 1 else "those of {} reach"
        return (
            f"Whose range of workable learning rates is widest cannot be told:"
            f" {ends.format(_listed(open_ended))} an end of the sweep."
        )
    near = widest.factor / _resolution(top) / (1 + 1e-6)
    alike = [(e, w) for e, w in found if w.factor >= near]
    if len(alike) == len(found) > 1:
        return (
            "The ranges of workable learning rates do not differ by more than one step of the"
            " sweep."
            if not none
            else f"{_listed(none)} {_has(none)} no workable learning rate."
        )
    if len(alike) > 1:
        ahead = _listed([f"{e.label} ({w.factor:.3g})" for e, w in alike])
        behind = _listed([f"{w.factor:.3g} ({e.label})" for e, w in found[len(alike) :]])
        text = (
            f"The widest ranges of workable learning rates are those of {ahead}, which are no more"
            f" than one step of the sweep apart, against {behind}"
        )
        return f"{text}; {_listed(none)} {_has(none)} none." if none else f"{text}."
    least = "at least " if widest.open else ""
    against = _listed([f"{w.factor:.3g} ({e.label})" for e, w in rest])
    text = (
        f"The widest range of workable learning rates is that of {top.label}: a factor of {least}"
        f"{widest.factor:.3g}"
    )
    if rest:
        text += f", against {against}"
    if none:
        text += f"; {_listed(none)} {_has(none)} none"
    return text + "."


def seeds_text(comparison: Comparison) -> str:
    """Such as `3 seeds`."""
    return f"{comparison.seeds} seed{'' if comparison.seeds == 1 else 's'}"


def points(margin: float) -> str:
    """Such as `1 percentage point`."""
    return f"{margin:g} percentage point{'' if margin == 1 else 's'}"


def remarks(comparison: Comparison) -> list[str]:
    """What a reader should beware of."""
    found = []
    for entry in comparison.entries:
        rates = entry.contender.lrs
        if entry.best is None:
            found.append(f"{entry.label}: every run diverged; sweep smaller learning rates.")
        elif len(rates) > 1 and entry.best in (rates[0], rates[-1]):
            end, way = ("least", "lower") if entry.best == rates[0] else ("greatest", "higher")
            found.append(
                f"{entry.label}: its best learning rate, {entry.best:.3g}, is the {end} of its"
                f" sweep; {way} ones may be better."
            )
    if any(e.workable is not None and e.workable.open for e in comparison.entries):
        found.append("≤ or ≥ at an end of a range: the sweep ends there, and the range may go on.")
    one = 100 / comparison.validation_samples
    if comparison.margin < one / comparison.seeds:
        found.append(
            f"{comparison.validation_samples} validation samples and {seeds_text(comparison)}"
            f" cannot show a difference of {points(comparison.margin)}: any counts as more."
        )
    return found


def _resolution(entry: Entry) -> float:
    rates = entry.contender.lrs
    return max(b / a for a, b in pairwise(rates))


def _interval(entry: Entry) -> tuple[float, float]:
    accuracies = [run.test_accuracy for run in entry.final]
    return fmean(accuracies), spread(accuracies)


def _above(top: Entry, other: Entry) -> bool:
    """Whether mean ± standard deviation of the two do not meet."""
    (high, up), (low, down) = _interval(top), _interval(other)
    return high - up > low + down + 1e-9


def _percent(entry: Entry) -> str:
    mean, deviation = _interval(entry)
    if len(entry.final) == 1:
        return f"{100 * mean:.1f} %"
    return f"{100 * mean:.1f} ± {100 * deviation:.1f} %"


def _with(entry: Entry) -> str:
    return f"{entry.label} ({_percent(entry)})"


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
