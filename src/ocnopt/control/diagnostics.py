"""What a step was expected to do, what it did, and how much of it was feedback."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ocnopt.control.alignment import Round
from ocnopt.control.batch import Batch
from ocnopt.control.sweep import Sweep

__all__ = ["Diagnostics", "Row"]


@dataclass(frozen=True)
class Row:
    """Figures of one player, or of the whole step.

    Attributes:
        predicted_decrease: How much the quadratic model of the cost says the loss falls that
            ``backward`` was called on: as the loop weighted what the criterion returned, the sum
            over accumulated passes, a loss scaler taken back. None where no model was built.
        actual_decrease: The same, measured by running the batch again; the total's alone, and
            None where it was not measured, or could not be because the loop did more to the
            model's output than view it before it called the criterion.
        feedback_share: Mean over samples of feedback relative to the open-loop term.
        clipped_share: Share of samples whose feedback hit its bound.
        damping: Damping in use, of factored preconditioners.
        failures: Factorization attempts that failed, since the optimizer was built.
    """

    predicted_decrease: float | None = None
    actual_decrease: float | None = None
    feedback_share: float = 0.0
    clipped_share: float = 0.0
    damping: float | None = None
    failures: int = 0


@dataclass
class Diagnostics:
    """Figures of the last step; computed when read, from a few numbers per sample.

    Attributes:
        total: The whole step.
        players: One row per player, in forward order, by module name.
        alignment: Which alignment of shortcuts and branches is in play; None where there is none
            to choose.
        rounds: Those of the bandit over alignments that have ended.
    """

    total: Row = field(default_factory=Row)
    players: dict[str, Row] = field(default_factory=dict)
    alignment: int | None = None
    rounds: tuple[Round, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values: dict[str, Any] = {
            "total": asdict(self.total),
            "players": {name: asdict(row) for name, row in self.players.items()},
        }
        if self.alignment is not None:
            values["alignment"] = self.alignment
            values["rounds"] = [asdict(done) for done in self.rounds]
        return values


@dataclass
class Ledger:
    """The few tensors of a step from which :class:`Diagnostics` is computed on demand.

    Attributes:
        names: The players'.
        reports: What their movers say of M.
        feedback: Per player and batch, as in :class:`~ocnopt.control.turns.Turn`.
        path: After every player's move, how far the cost directions have moved, per batch.
        terminal: v, K and the samples' weight, per batch.
        unit: What the predicted decrease is multiplied by, to be in units of the loop's loss.
        actual: The actual decrease, where it was measured.
    """

    names: list[str]
    reports: list[dict[str, float]]
    feedback: list[list[tuple[Tensor, ...] | None]]
    path: list[list[Tensor | None]]
    terminal: list[tuple[Tensor, Tensor, Tensor | float]]
    unit: float = 1.0
    actual: float | None = None

    @classmethod
    def of(cls, sweep: Sweep, reports: list[dict[str, float]], unit: float) -> Ledger:
        """Keep what is small of a finished sweep."""
        return cls(
            [turn.player.name or "(model)" for turn in sweep.turns],
            reports,
            [turn.feedback for turn in sweep.turns],
            sweep.path,
            [_terminal(batch) for batch in sweep.batches],
            unit,
        )

    def read(self) -> Diagnostics:
        """Compute the figures."""
        rows: dict[str, Row] = {}
        before = 0.0
        shares: list[tuple[float, float]] = []
        for i, name in enumerate(self.names):
            after = self._decrease(self.path[i]) if i < len(self.path) else None
            share, clipped = self._shares(self.feedback[i])
            shares.append((share, clipped))
            report = self.reports[i]
            failures = int(report.get("failures", 0))
            rows[name] = Row(
                None if after is None else after - before,
                None,
                share,
                clipped,
                report.get("damping"),
                failures,
            )
            before = before if after is None else after
        count = max(1, len(shares))
        dampings = [r["damping"] for r in self.reports if "damping" in r]
        total = Row(
            before if self.path else None,
            self.actual,
            sum(s for s, _ in shares) / count,
            sum(c for _, c in shares) / count,
            max(dampings) if dampings else None,
            sum(row.failures for row in rows.values()),
        )
        return Diagnostics(total, rows)

    def _decrease(self, rho: list[Tensor | None]) -> float:
        """``- sum_i w_i (v_T . rho + rho^T K_T rho / 2)`` with the weights of the loop's loss."""
        fall = 0.0
        for moved, (v, k, weight) in zip(rho, self.terminal, strict=True):
            if moved is None:
                continue
            if v.dim() == 1:
                change = v * moved + 0.5 * k * moved * moved
            else:
                curved = (k @ moved.unsqueeze(-1)).squeeze(-1)
                change = (v * moved).sum(-1) + 0.5 * (moved * curved).sum(-1)
            fall -= float((weight * change).sum())
        return fall * self.unit

    @staticmethod
    def _shares(feedback: list[tuple[Tensor, ...] | None]) -> tuple[float, float]:
        ratios: list[Tensor] = []
        clipped: list[Tensor] = []
        for entry in feedback:
            if entry is None:
                continue
            asked, applied = entry[:2]
            clipped.append(asked != applied)
            ratio = applied / entry[2] if len(entry) == 3 else applied
            ratios.append(ratio.abs().nan_to_num(0.0, 0.0, 0.0))
        if not ratios:
            return 0.0, 0.0
        return float(torch.cat(ratios).mean()), float(torch.cat(clipped).double().mean())


def _terminal(batch: Batch) -> tuple[Tensor, Tensor, Tensor | float]:
    return batch.v, batch.k, batch.weight
