"""How much players of a stage have to tell each other, by the damping of M."""

from __future__ import annotations

from dataclasses import dataclass

from ocnopt.experiments.reproduce.dgnopt_cells import Family, Method, Row
from ocnopt.experiments.reproduce.report import markdown_table
from ocnopt.experiments.significance import difference

__all__ = ["DAMPINGS", "Damped", "Plan", "dampings", "lines"]

DAMPINGS = (0.1, 0.01)
LEARNING_RATES = (0.03, 0.1, 0.3)
KINDS = ("kfac", "ekfac")
_NAMES = ("open loop", "feedback", "group rational, late", "group rational, early")


Plan = dict[tuple[str, float], tuple[Family, list[Method]]]


@dataclass(frozen=True)
class Damped:
    """A Kronecker M with one damping.

    Attributes:
        kind: "kfac" or "ekfac".
        damping: Of M.
        rows: One per kind of information, a cell per learning rate.
    """

    kind: str
    damping: float
    rows: list[Row]


def dampings(quick: bool, costly: bool) -> Plan:
    """DGNOpt with a Kronecker M over dampings and learning rates.

    Args:
        quick: Whether one learning rate has to do.
        costly: Whether runs take so long that the smallest damping under EKFAC has to do.

    Returns:
        By M and damping: what is to be run.
    """
    rates = LEARNING_RATES[:1] if quick else LEARNING_RATES
    kinds, levels = (KINDS[1:], DAMPINGS[1:]) if costly else (KINDS, DAMPINGS)
    return {
        (kind, damping): (
            Family(f"{kind} {damping:g}", "dgnopt", kind, rates),
            _methods(kind, damping),
        )
        for kind in kinds
        for damping in levels
    }


def _methods(kind: str, damping: float) -> list[Method]:
    m = {"preconditioner": {"name": kind, "damping": damping}}
    return [
        Method(name, "dgnopt", {**m, **options})
        for name, options in zip(
            _NAMES,
            (
                {"information": "open-loop"},
                {"information": "feedback", "alignment": "late"},
                {"information": "group-rational", "alignment": "late"},
                {"information": "group-rational", "alignment": "early"},
            ),
            strict=True,
        )
    ]


def lines(found: list[Damped]) -> list[str]:
    """A section of the page.

    Args:
        found: In the order of the plan.
    """
    table = [
        [
            part.kind.upper() if i == 0 else "",
            f"{part.damping:g}" if i == 0 else "",
            f"{cells[0].lr:g}",
            *(cell.text() for cell in cells),
        ]
        for part in found
        for i, cells in enumerate(zip(*part.rows, strict=True))
    ]
    return [
        "## Damping",
        "",
        "What players of a stage tell each other is a correlation under M, and damping is what M "
        "has beside correlations: the larger it is, the less group rationality differs from "
        "feedback. Training loss ± standard deviation / test accuracy in %, as above.",
        "",
        markdown_table(["M", "damping", "learning rate", *_NAMES], table),
        "",
        *(f"- {_counted(part)}" for part in found),
        "",
    ]


def _counted(part: Damped) -> str:
    """What group rationality adds at one damping."""
    feedback = part.rows[1]
    parts = []
    for row in part.rows[2:]:
        found = [difference(a.losses, b.losses) for a, b in zip(row, feedback, strict=True)]
        alignment = row[0].method.name.rpartition(" ")[2]
        parts.append(
            f"{alignment}: lower at {found.count(-1)} of {len(found)} learning rates, higher at "
            f"{found.count(1)}"
        )
    return (
        f"**{part.kind.upper()}, damping {part.damping:g}**, training loss with group rationality "
        f"against feedback, beyond the spread. {'; '.join(parts).capitalize()}."
    )
