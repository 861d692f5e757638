"""Say what contests of flows showed, from their numbers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ocnopt.experiments.flows.contest import SECONDS, STEPS, Contest, Entry
from ocnopt.experiments.race.words import number
from ocnopt.experiments.significance import difference
from ocnopt.experiments.verdict import spread

__all__ = ["HEADLINE", "losses", "relative", "remarks", "sentence", "target_text"]

#: The margin, in nats, that the sentence and the table at the top name.
HEADLINE = 0.03


def target_text(margin: float, base: str) -> str:
    """Such as `Adam's final loss + 0.03`."""
    return f"{base}'s final loss" + (f" + {margin:g}" if margin else "")


def losses(values: Sequence[float], runs: int) -> str:
    """Mean and standard deviation, such as `2.915 ± 0.003`, and of how many of the runs."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.3f}"
    text += f" ± {spread(values):.3f}" if len(values) > 1 else ""
    return text + (f" ({len(values)} of {runs})" if len(values) < runs else "")


def relative(values: Sequence[float], ratio: float | None) -> str:
    """The median, and in brackets the ratio, where there is one."""
    if not values:
        return "-"
    text = number(statistics.median(values))
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def sentence(contests: Sequence[Contest]) -> str:
    """What was seen, density by density.

    Args:
        contests: One per density.
    """
    return " ".join(_seen(contest) for contest in contests)


def _seen(contest: Contest) -> str:
    base, target = contest.baseline, contest.targets.get(HEADLINE)
    if target is None:
        return f"On {contest.density} {base.label} diverged, so that there are no targets."
    others = contest.entries[1:]
    times = "; ".join(_time(contest, entry, target) for entry in others)
    finals = "; ".join(
        f"{e.label} {losses(e.finals, len(e.results))}, {_beside(e, base)}" for e in others
    )
    return (
        f"On {contest.density}, to {target_text(HEADLINE, base.label)} nats: {times}. Final test"
        f" loss: {finals} ({base.label}: {losses(base.finals, len(base.results))})."
    )


def _time(contest: Contest, entry: Entry, target: float) -> str:
    base = contest.baseline.label
    times = entry.to(target, SECONDS)
    ratio, steps = (contest.ratio(entry, target, kind) for kind in (SECONDS, STEPS))
    never = sum(not math.isfinite(time) for time in times)
    if not times:
        return f"{entry.label} did not start, as it diverged at every learning rate"
    if never == len(times):
        return f"{entry.label} never got there"
    if ratio is None or steps is None:
        return f"{entry.label} got there on {len(times) - never} of {len(times)} seeds"
    text = f"{entry.label} took {ratio:.2f} times {base}'s CPU seconds, {steps:.2f} times its steps"
    return text + (f" (never on {never} of {len(times)} seeds)" if never else "")


def _beside(entry: Entry, base: Entry) -> str:
    if len(entry.finals) != len(base.finals) or len(base.finals) < 2:
        return "on too few seeds to tell"
    return {
        1: f"above {base.label} beyond the spread",
        0: f"no different from {base.label} beyond the spread",
        -1: f"below {base.label} beyond the spread",
    }[difference(entry.finals, base.finals)]


def remarks(contests: Sequence[Contest]) -> list[str]:
    """What a reader should beware of, as lines of a list.

    Args:
        contests: One per density.
    """
    found = []
    for contest in contests:
        for entry in contest.entries:
            who = f"- {contest.density}, {entry.label}:"
            if entry.lr is None:
                found.append(f"{who} every candidate diverged.")
            if entry.on_edge:
                found.append(
                    f"{who} its learning rate, {entry.lr:g}, is at the end of those that were"
                    " tried; others may be better."
                )
            steps = [str(r["diverged_step"]) for r in entry.results if r["diverged_step"]]
            if steps:
                found.append(
                    f"{who} {len(steps)} of {len(entry.results)} final runs diverged, at step"
                    f" {', '.join(steps)}; means are those of the others."
                )
    ends = [r["points"][-1] for c in contests for e in c.entries for r in e.sound]
    if ends:
        busy = statistics.median(end["seconds"] / end[SECONDS] for end in ends)
        found.append(
            f"- The wall clock went on for {busy:.2f} times the CPU seconds of a run (median): the"
            " more, the busier the machine was with other work."
        )
    return [*found, ""] if found else []
