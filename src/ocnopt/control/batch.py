"""The samples of one recorded pass: how many, at what scale, with which terminal values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ocnopt.control.passes import Pass, TerminalCall, Use, count_samples
from ocnopt.control.players import Player
from ocnopt.control.terminal import TerminalCost
from ocnopt.control.trace import Trace
from ocnopt.curvature.metric import to_float
from ocnopt.layers.base import add_all

__all__ = ["Batch", "gather"]


@dataclass
class Batch:
    """One pass as the sweep sees it.

    A recorded signal is the gradient of the total loss; ``lift`` turns it into the gradient of the
    sample's own cost, whose mean (or sum) the loss is.

    Attributes:
        samples: B.
        weight: What a sample's own cost counts in the total, a number or (B,). Several calls of
            the criterion make one cost, their mean weighted as the loop weights them.
        lift: ``1 / weight``, a number or (B,); zero where the weight is.
        v: Value coefficients at the output, (B,) or (B, r).
        k: Value Hessian coefficients at the output, (B,) or (B, r, r).
        traces: What every player did.
        skipped: Players whose calls could not be told apart by sample, with the reason.
        source: The recorded pass.
        processes: Data-parallel processes, over which weighted gradients are averaged.
    """

    samples: int
    weight: float | Tensor
    lift: float | Tensor
    v: Tensor
    k: Tensor
    traces: dict[Player, Trace] = field(default_factory=dict)
    skipped: dict[Player, str] = field(default_factory=dict)
    source: Pass | None = None
    processes: int = 1

    @property
    def rank(self) -> int:
        """Number of columns r."""
        return 1 if self.v.dim() == 1 else self.v.shape[1]

    def own(self, values: Tensor) -> Tensor:
        """Raw directional derivatives (of the columns as recorded) in the sample's own units."""
        if self.rank == 1:
            return values * self.lift
        out = values.clone()
        out[:, 0] = out[:, 0] * self.lift
        return out

    def own_gram(self, s: Tensor) -> Tensor:
        """A raw Gram matrix in the sample's own units."""
        if self.rank == 1:
            return s * self.lift * self.lift
        out = s.clone()
        lift = self.lift if isinstance(self.lift, float) else self.lift[:, None]
        out[:, 0, :] = out[:, 0, :] * lift
        out[:, :, 0] = out[:, :, 0] * lift
        return out

    def signal_weights(self, x: Tensor) -> Tensor:
        """Coefficients of the recorded columns whose sum is ``weight * P x`` in this process."""
        if self.rank == 1:
            return x
        out = x * self._in_process()
        out[:, 0] = x[:, 0]
        return out

    def _in_process(self) -> float | Tensor:
        """The weight before the mean over processes, for products with (B, r)."""
        weight = self.weight if isinstance(self.weight, float) else self.weight[:, None]
        return weight * self.processes

    def signal_own(self, x: Tensor) -> Tensor:
        """Coefficients of the recorded columns whose sum is ``P x``."""
        if self.rank == 1:
            return x * self.lift
        out = x.clone()
        out[:, 0] = out[:, 0] * self.lift
        return out

    def gradient_values(self, player: Player) -> Tensor:
        """The value coefficients at a player's output where the value is the cost itself."""
        return self.v

    def baseline(self, player: Player) -> Tensor:
        """The coefficients at which the player's weighted sum is the ordinary gradient."""
        if self.rank == 1:
            return torch.ones_like(self.v)
        out = torch.zeros_like(self.v)
        out[:, 0] = 1
        return out


def gather(
    passes: list[Pass], terminal: TerminalCost, reduction: str, processes: int
) -> list[Batch]:
    """Turn recorded passes into batches.

    Args:
        passes: Recorded passes with gradients.
        terminal: The terminal cost.
        reduction: "mean" or "sum": how the criterion reduces over samples.
        processes: Data-parallel processes; the total is the mean of theirs.

    Returns:
        One batch per pass whose samples could be told apart.
    """
    counted = []
    for recorded in passes:
        calls = [call for call in recorded.calls if call.scale is not None]
        counted.append((recorded, calls, count_samples(recorded.received, calls)))
    everyone = sum(samples for _, _, samples in counted)
    batches = []
    for recorded, calls, samples in counted:
        table = recorded.uses()
        reason = ""
        if terminal.criterion is not None and not calls:
            reason = "its loss did not pass through the criterion"
        elif not samples:
            reason = "the criterion's rows are no multiple of any layer's first dimension"
        elif terminal.rank_r and recorded.samples != samples:
            reason = "layers that the loss does not use have another number of rows"
        elif any(call.picked and call.output.shape[0] != samples for call in calls):
            reason = (
                "the loop picked rows of the output by index (use the criterion's ignore_index)"
            )
        if reason:
            empty = torch.zeros(0)
            batches.append(Batch(0, 1.0, 1.0, empty, empty, {}, dict.fromkeys(table, reason)))
            continue
        device = next(iter(table)).params[0].device
        dtype = to_float(next(iter(table)).params[0].dtype)
        scale = _total([_scale(call, samples) for call in calls])
        if not calls:
            # Without the criterion the loss is taken to be the mean over all samples at hand.
            scale = samples / everyone if reduction == "mean" else 1.0
        count = samples if reduction == "mean" else 1
        if calls and calls[0].loss.dim() > 0:
            count = 1
        weight = scale / (count * processes)
        lift = _ratio(float(count), scale)
        # Columns were made of every call, as it came; those that took no part have no curvature.
        asked = recorded.calls if terminal.rank_r else calls
        v, k = _terminal_values(terminal, asked, samples, scale, count, dtype, device)
        batch = Batch(samples, weight, lift, v, k, source=recorded, processes=processes)
        deepest = max(use.dims for use in recorded.received)
        for player, uses in table.items():
            mismatch = _mismatch(uses, samples, deepest)
            if mismatch is None:
                batch.traces[player] = Trace(player, uses, samples, dtype)
            else:
                batch.skipped[player] = mismatch
        batches.append(batch)
    return batches


def _mismatch(uses: list[Use], samples: int, deepest: int) -> str | None:
    """Why a player's calls cannot be told apart by sample, or None.

    Args:
        uses: Its calls.
        samples: B.
        deepest: Most dimensions of any player's output in the pass.
    """
    if deepest > 2 and any(use.player.layer.kind == "Embedding" and use.dims == 2 for use in uses):
        return "its indices are a plain list (positions, say), not one row per sample"
    rows = {use.rows for use in uses}
    if len(rows) > 1:
        return f"its calls differ in their number of rows ({sorted(rows)})"
    (size,) = rows
    if size == 0 or size % samples:
        return f"the {size} rows of its output are no multiple of the {samples} samples"
    return None


def _scale(call: TerminalCall, samples: int) -> float | Tensor:
    """Factor with which one call's value entered the total, a number or (B,)."""
    if call.scale is None:
        return 0.0
    if call.loss.dim() == 0:
        return float(call.scale)
    return call.scale.reshape(samples, -1).mean(1)


def _total(scales: list[float | Tensor]) -> float | Tensor:
    """What a sample's costs count together: their sum, or that of their sizes if signs differ.

    A difference of two costs is no small cost: measured by a sum that cancels, M would be huge.
    """
    total: float | Tensor = 0.0
    sizes: float | Tensor = 0.0
    for scale in scales:
        total = total + scale
        sizes = sizes + (abs(scale) if isinstance(scale, float) else scale.abs())
    if isinstance(total, float):
        return sizes if total >= 0 else -sizes
    return torch.where(total >= 0, sizes, -sizes)


def _ratio(part: float | Tensor, whole: float | Tensor) -> float | Tensor:
    """``part / whole``, zero where the whole is: a sample without weight takes no part."""
    if isinstance(whole, float):
        return part / whole if whole else 0.0
    return torch.where(whole == 0, torch.zeros_like(whole), part / whole)


def _terminal_values(
    terminal: TerminalCost,
    calls: list[TerminalCall],
    samples: int,
    scale: float | Tensor,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """v_T and K_T in the sample's own units."""
    v = torch.ones(samples, dtype=dtype, device=device)
    # Where the loop maximizes (a negative scale) the cost curves downwards: no positive part.
    up = scale > 0 if isinstance(scale, float) else (scale > 0).to(dtype)
    if terminal.form in ("outer-product", "full") or not calls:
        return v, v * up
    if terminal.form in ("bounded", "matched"):
        # kappa is homogeneous of degree -1 in the cost, so scales enter as ratios to the total.
        quad, square = terminal.along_gradient(calls[0], samples)
        if len(calls) > 1:
            ratio = _ratio(_scale(calls[0], samples), scale)
            quad, square = quad * ratio**3, square * ratio**2
            for call in calls[1:]:
                ratio = _ratio(_scale(call, samples), scale)
                q, n = terminal.along_gradient(call, samples)
                quad, square = quad + q * ratio**3, square + n * ratio**2
        kappa = quad.to(dtype) / square.to(dtype).square_().mul_(count)
        kappa = kappa.nan_to_num_(0.0, 0.0, 0.0).clamp_min_(0)  # 0 / 0: no gradient
        if terminal.form == "bounded":
            parts = [
                loss * _ratio(_scale(call, samples), scale)
                for call in calls
                if (loss := terminal.losses(call, samples)) is not None
            ]
            if len(parts) == len(calls):
                # A loss of zero has no gradient to bound; one below zero has no such bound.
                least = add_all([(part.to(dtype),) for part in parts])[0].mul(2 * count)
                least = least.reciprocal_().nan_to_num_(0.0, 0.0, 0.0)
                for part in parts if len(parts) > 1 else []:
                    least = least.where(part >= 0, 0.0)
                kappa = torch.maximum(kappa, least)
        return v, kappa if up is True else kappa * up
    parts = []
    for call in calls:
        size = call.output.numel() // samples
        factor = _ratio(_scale(call, samples), scale) * count * up
        # Nor has a cost that is subtracted from others a positive part.
        part = torch.as_tensor(factor, dtype=dtype, device=device).clamp_min(0).expand(samples)
        parts.append(part[:, None].expand(samples, size))
    diagonal = torch.cat([torch.zeros(samples, 1, dtype=dtype, device=device), *parts], 1)
    first = torch.zeros_like(diagonal)
    first[:, 0] = 1
    return first, torch.diag_embed(diagonal)
