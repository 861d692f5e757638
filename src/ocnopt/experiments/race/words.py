"""Say what a race showed, from its numbers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ocnopt.experiments.race.result import Entry, Result
from ocnopt.experiments.significance import difference
from ocnopt.experiments.verdict import spread

__all__ = ["number", "percent", "remarks", "sentence", "share_text"]


def number(value: float) -> str:
    """Three significant digits, and whole numbers from a thousand on: `0.0123`, `4.5`, `1,234`."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def percent(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation in percent, such as `95.6 ± 0.8`; a dash for nothing."""
    if not accuracies:
        return "-"
    mean = f"{100 * statistics.fmean(accuracies):.1f}"
    return mean if len(accuracies) == 1 else f"{mean} ± {100 * spread(accuracies):.1f}"


def share_text(share: float, baseline: str) -> str:
    """Such as `98 % of adam's final accuracy`."""
    return f"{100 * share:g} % of {baseline}'s final accuracy"


def sentence(result: Result) -> str:
    """What was seen of the time to the headline's target and of the final accuracy."""
    base, share = result.baseline, result.race.headline
    if not base.sound:
        why = "diverged on every seed" if base.outcomes else "diverged at every setting"
        finals = [f"{e.label} {_final(e)}" for e in result.entries if e is not base]
        text = f"{base.label} {why}, so that there are no targets"
        return f"{text}; final test accuracy: {', '.join(finals)}." if finals else f"{text}."
    target = result.targets[share]
    others = [e for e in result.entries if e is not base]
    goal = f"{share_text(share, base.label)} ({100 * target:.1f} %)"
    if not others:
        took = _own_time(base, target, result.clock)
        return f"To {goal}, {took}; its final test accuracy is {_final(base)}."
    times = "; ".join(_time(result, e, target) for e in others)
    if _never(base, target):
        times = f"{_own_time(base, target, result.clock)}; {times}"
    finals = [f"{e.label} {_final(e)}, {_beside(e, base)}" for e in others]
    return (
        f"To {goal}, {times}. Final test accuracy: {'; '.join(finals)}"
        f" ({base.label}: {_final(base)})."
    )


def _time(result: Result, entry: Entry, target: float) -> str:
    """How long it took, relative to the baseline where that got there."""
    base = result.baseline.label
    ratio = result.ratio(entry, target)
    if ratio is None:
        return _own_time(entry, target, result.clock)
    text = f"{entry.label} took {ratio:.2f} times {base}'s {result.clock}"
    epochs = result.ratio_of_epochs(entry, target)
    if epochs is not None:
        text += f" and {epochs:.2f} times its epochs"
    return text + _missing(entry, target)


def _own_time(entry: Entry, target: float, clock: str) -> str:
    times = entry.seconds_to(target)
    if not times:
        return f"{entry.label} did not start, as it diverged at every setting"
    reached = sum(map(math.isfinite, times))
    middle = statistics.median(times)
    if not math.isfinite(middle):
        return f"{entry.label} got there on {reached or 'none'} of {_seeds(len(times))}"
    return f"{entry.label} took {number(middle)} {clock}" + _missing(entry, target)


def _missing(entry: Entry, target: float) -> str:
    times = entry.seconds_to(target)
    never = sum(not math.isfinite(time) for time in times)
    return f" (never on {never} of {_seeds(len(times))})" if never else ""


def _never(entry: Entry, target: float) -> bool:
    return not math.isfinite(statistics.median(entry.seconds_to(target)))


def _final(entry: Entry) -> str:
    if not entry.sound:
        return "none, as it diverged"
    text = f"{percent(entry.accuracies)} %"
    runs = len(entry.outcomes)
    return f"{text} ({entry.failed} of {runs} runs diverged)" if entry.failed else text


def _beside(entry: Entry, base: Entry) -> str:
    """Whether the final accuracy differs from the baseline's beyond the spread over seeds."""
    both = [place for place in entry.sound if place in base.sound]
    if len(both) < 2:
        return "on too few seeds to tell"
    own, other = ([e.outcomes[place].test_accuracy for place in both] for e in (entry, base))
    return {
        1: f"above {base.label} beyond the spread",
        0: f"no different from {base.label} beyond the spread",
        -1: f"below {base.label} beyond the spread",
    }[difference(own, other)]


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def remarks(result: Result) -> list[str]:
    """What a reader should beware of."""
    found = []
    for entry in result.entries:
        chosen = entry.tuned.chosen
        if chosen is None:
            found.append(
                f"{entry.label}: every candidate diverged, so there was none to race with."
            )
        for name, end in entry.tuned.edges.items():
            assert chosen is not None
            value = chosen.config.lr if name == "lr" else chosen.config.options[name]
            what = "learning rate" if name == "lr" else name
            beyond = "smaller" if end == "least" else "greater"
            found.append(
                f"{entry.label}: its {what}, {value:g}, is the {end} that was tried; {beyond} ones"
                " may be better."
            )
        if entry.failed:
            steps = [str(o.diverged_step) for o in entry.outcomes if o.failed]
            found.append(
                f"{entry.label}: {entry.failed} of {len(entry.outcomes)} final runs diverged, at"
                f" step {', '.join(steps)}; means are those of the others, and a target that a"
                " run had not reached by then is never reached."
            )
    if result.race.seeds == 1:
        found.append("One seed has no spread: differences may be chance.")
    busiest, unsteady = result.busiest, result.unsteadiness
    if busiest is not None:
        text = f"The wall clock went on for at most {busiest:.2f} times the CPU seconds of a run"
        if unsteady is not None:
            text += (
                ", and the seconds of a step differed between seeds of a contender by a factor of"
                f" at most {unsteady:.2f}"
            )
        found.append(f"{text}: the more, the busier the machine was with other work.")
    return found
