"""One player in one recorded pass: everything the sweep asks of its inputs and signals."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ocnopt.control.passes import Use
from ocnopt.control.players import Player
from ocnopt.curvature.eigen import Eigen
from ocnopt.curvature.metric import Metric
from ocnopt.errors import RecordingError
from ocnopt.layers.base import MatrixLayer, Params, add_all
from ocnopt.layers.linear import LinearLayer

__all__ = ["Trace", "outer_norms"]


#: Every sample.
ALL = slice(None)


def _rows(part: slice, fold: int) -> slice:
    """Rows of a tensor that hold the given samples."""
    if part is ALL or fold == 1:
        return part
    return slice(part.start * fold, part.stop * fold)


class Trace:
    """Linear maps of one player over one pass of ``B`` samples.

    Per-sample gradients are formed once where they take less room than inputs and signals; else
    every question is answered from the latter.

    Args:
        player: The player.
        uses: Its calls in the pass.
        samples: B.
        dtype: The dtype of coefficients.
    """

    def __init__(self, player: Player, uses: list[Use], samples: int, dtype: torch.dtype) -> None:
        self.player = player
        self.layer = layer = player.layer
        self.samples = samples
        self.dtype = dtype
        work = player.params[0].dtype
        self.calls = len(uses)
        self.inputs = [use.capture[0] for use in uses if use.capture]
        self.features: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.folds: list[int] = []
        self._formed_locations = 0
        self.gradients: Params | None = None
        for use in uses:
            fold = use.rows // samples
            if use.gradients is not None:
                self._add_formed(use.gradients, fold)
                self._formed_locations += fold * use.locations
                continue
            use.require_untouched()
            assert use.signal is not None
            signal = use.signal if use.signal.dtype == work else use.signal.to(work)
            if use.columns:
                rest = [torch.zeros_like(signal) if c is None else c.to(work) for c in use.columns]
                self.columns.append(torch.stack([signal, *rest]))
            else:
                self.columns.append(signal.unsqueeze(0))
            self.features.append(layer.features(use.capture, work))
            self.folds.append(fold)
        self.rank = self.columns[0].shape[0] if self.columns else 1
        if not self.features:
            self.single = False
            return
        #: One call of a linear layer at one location per sample, so P_u = a (x) P_h.
        self.single = (
            len(uses) == 1
            and self.folds[0] == 1
            and self.features[0].dim() == 2
            and isinstance(layer, LinearLayer)
        )
        if len(uses) > 1 or layer.prefers_samples(self.features[0], self.columns[0][0]):
            self._form_gradients()

    def _add_formed(self, formed: Params, fold: int) -> None:
        """Take up weight gradients of rows (B * fold, *parameter) that the recorder formed."""
        part = tuple(
            p.reshape(self.samples, fold, *p.shape[1:]).sum(1, keepdim=True)
            if fold > 1
            else p.unsqueeze(1)
            for p in formed
        )
        self.gradients = part if self.gradients is None else add_all([self.gradients, part])

    def _form_gradients(self) -> None:
        known = [] if self.gradients is None else [self.gradients]
        self.gradients = add_all(known + self._formed())

    def _formed(self, part: slice = ALL) -> list[Params]:
        return [
            self.layer.column_gradients(a[rows], p[:, rows], fold)
            for a, p, fold in zip(self.features, self.columns, self.folds, strict=True)
            for rows in (_rows(part, fold),)
        ]

    def sample_columns(self, part: slice = ALL) -> Params:
        """``P_u`` of every sample, (B, r, *parameter) each; of some of them where asked for."""
        if self.gradients is not None:
            return self.gradients if part is ALL else tuple(g[part] for g in self.gradients)
        return add_all(self._formed(part))

    def factors(self, part: slice = ALL) -> tuple[Tensor, Tensor] | None:
        """Inputs and signals, as ``MatrixLayer.factors``, where gradients need not be formed."""
        if self.gradients is not None or not isinstance(self.layer, MatrixLayer):
            return None
        fold, columns = self.folds[0], self.columns[0]
        if not self.layer.few_locations(columns, fold):
            return None
        rows = _rows(part, fold)
        return self.layer.factors(self.features[0][rows], columns[:, rows], fold)

    @property
    def locations(self) -> int:
        """Locations per sample, over all calls."""
        if self.single:
            return 1
        return self._formed_locations + sum(
            fold * self.layer.cols(p[0]).shape[1]
            for p, fold in zip(self.columns, self.folds, strict=True)
        )

    def _spread(self, coefficients: Tensor, columns: Tensor, fold: int) -> Tensor:
        """``sum_k coefficients_k P_k`` as one signal, (B * fold, *)."""
        if coefficients.dtype != columns.dtype:
            coefficients = coefficients.to(columns.dtype)
        if fold > 1:
            coefficients = coefficients.repeat_interleave(fold, 0)
        ones = (1,) * (columns.dim() - 2)
        if coefficients.dim() == 1:
            return columns[0] * coefficients.view(-1, *ones)
        return (columns * coefficients.t().reshape(*coefficients.t().shape, *ones)).sum(0)

    def weighted(self, coefficients: Tensor) -> Params:
        """``sum_i P_u^(i) c^(i)`` for coefficients (B,) at rank one, else (B, r)."""
        if self.gradients is not None:
            flat = coefficients.to(self.gradients[0].dtype).flatten()
            return tuple(
                (g.reshape(flat.numel(), -1).t() @ flat).view(p.shape)
                for g, p in zip(self.gradients, self.player.params, strict=True)
            )
        return add_all(
            [
                self.layer.gradient(a, self._spread(coefficients, p, fold))
                for a, p, fold in zip(self.features, self.columns, self.folds, strict=True)
            ]
        )

    def rotated(self, metric: Eigen, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Factors, in M's eigenbasis, of ``sum_i P_u^(i) c^(i) = g^T a``.

        For one call of a linear layer at one location per sample (:attr:`single`).

        Args:
            metric: M.
            coefficients: (B,) at rank one, else (B, r).

        Returns:
            ``a`` (B, in), ``g`` (B, out).
        """
        assert isinstance(self.layer, LinearLayer)
        rows, columns = metric.turn_factors(self.layer, self.features[0], self.columns[0])
        return rows, self._spread(coefficients, columns, 1)

    def add_weighted(
        self, base: Params, coefficients: Tensor, scale: float, factor: float = 1.0
    ) -> Params:
        """``factor * base + scale * sum_i P_u^(i) c^(i)``.

        Args:
            base: One tensor per parameter.
            coefficients: (B,) at rank one, else (B, r).
            scale: A number.
            factor: A number.
        """
        if self.gradients is not None:
            flat = coefficients.to(base[0].dtype).flatten()
            return tuple(
                torch.addmv(
                    b.flatten(), g.reshape(flat.numel(), -1).t(), flat, beta=factor, alpha=scale
                ).view(b.shape)
                for b, g in zip(base, self.gradients, strict=True)
            )
        for a, p, fold in zip(self.features, self.columns, self.folds, strict=True):
            signal = self._spread(coefficients, p, fold)
            base = self.layer.add_gradient(base, a, signal, scale, factor)
            factor = 1.0
        return base

    def dots(self, delta: Params) -> Tensor:
        """``P_u^(i)T delta``: how the cost directions move if the player moves by ``delta``.

        Returns:
            (B,) at rank one, else (B, r).
        """
        if self.gradients is not None:
            total: Tensor | None = None
            for g, d in zip(self.gradients, delta, strict=True):
                part = g.reshape(self.samples * self.rank, -1) @ d.flatten()
                total = part if total is None else total + part
            assert total is not None
            return self._shaped(total.view(self.samples, self.rank))
        parts = []
        for a, p, fold in zip(self.features, self.columns, self.folds, strict=True):
            moved = self.layer.apply(a, delta)
            if self.single and self.rank == 1:
                return self._shaped(torch.linalg.vecdot(moved, p[0]).unsqueeze(-1))
            if self.rank == 1 and fold == 1:
                parts.append(torch.linalg.vecdot(moved.flatten(1), p[0].flatten(1)).unsqueeze(-1))
            else:
                products = (p * moved).reshape(self.rank, self.samples, -1).sum(-1)
                parts.append(products.t())
        return self._shaped(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))

    def _shaped(self, values: Tensor) -> Tensor:
        if values.dtype != self.dtype:
            values = values.to(self.dtype)
        return values[:, 0] if self.rank == 1 else values

    def gram(self, metric: Metric) -> Tensor:
        """``P_u^T Q_uu^-1 P_u``: (B,) at rank one, else (B, r, r)."""
        if self.gradients is not None:
            out = metric.sample_gram(self.gradients)
        else:
            out = self.layer.gram(self.features[0], self.columns[0], metric, self.folds[0])
        out = out.to(self.dtype)
        return out[:, 0, 0] if self.rank == 1 else out

    def signal_squares(self) -> Tensor:
        """``|P_h|^2`` of every sample at rank one, over all locations and calls, (B,)."""
        total = torch.zeros(self.samples, dtype=self.dtype, device=self.columns[0].device)
        for p in self.columns:
            total += p[0].reshape(self.samples, -1).to(self.dtype).square().sum(-1)
        return total

    def ratio(self, open_loop: Tensor, feedback: Tensor) -> Tensor:
        """Size of every sample's feedback relative to its open-loop term.

        Both are measured as signals at the player's output, over all its locations and calls.

        Args:
            open_loop: Coefficients of the recorded columns, (B, r).
            feedback: Likewise.

        Returns:
            (B,); infinite where the open-loop term is zero and the feedback is not.
        """
        sizes = []
        for coefficients in (open_loop, feedback):
            total = torch.zeros(self.samples, dtype=self.dtype, device=coefficients.device)
            for p, fold in zip(self.columns, self.folds, strict=True):
                signal = self._spread(coefficients, p, fold)
                total += signal.reshape(self.samples, -1).to(self.dtype).square().sum(-1)
            sizes.append(total.sqrt())
        return torch.where(sizes[1] == 0, sizes[1], sizes[1] / sizes[0])

    def rows(self) -> Tensor:
        """Inputs ``[a; 1]`` for Kronecker factors: (B, L, groups, in), all calls together.

        Raises:
            RecordingError: They were not kept, as no factors were due when the gradient arrived.
        """
        return self._side_by_side([self.layer.rows(a) for a in self.features])

    def cols(self, coefficients: Tensor) -> Tensor:
        """Signals ``sum_k coefficients_k P_k`` likewise: (B, L, groups, out).

        Raises:
            RecordingError: As above.
        """
        return self._side_by_side(
            [
                self.layer.cols(self._spread(coefficients, p, fold))
                for p, fold in zip(self.columns, self.folds, strict=True)
            ]
        )

    def _side_by_side(self, parts: list[Tensor]) -> Tensor:
        if self._formed_locations:
            raise RecordingError(
                f"the Kronecker factors of layer {self.player.name!r} are due now, but were not in "
                "backward(): load a state or change update_every before the forward pass"
            )
        own = [part.reshape(self.samples, -1, *part.shape[2:]) for part in parts]
        return own[0] if len(own) == 1 else torch.cat(own, 1)

    def input_key(self) -> Hashable:
        """The same for traces whose :meth:`rows` are the same, while these traces live."""
        tensors = tuple((a.data_ptr(), a.shape, a.stride()) for a in self.features)
        return tensors, self.dtype, self.layer.row_key, tuple(self.folds)


def outer_norms(traces: list[Trace], metrics: list[Metric]) -> Tensor:
    """``P_u^T Q_uu^-1 P_u`` of several single-location linear players with ``M = I``.

    Args:
        traces: T traces of rank one, one call at one location each.
        metrics: Their metrics.

    Returns:
        (B, T), of the signals as recorded.
    """
    inputs = torch.stack([torch.linalg.vecdot(t.features[0], t.features[0]) for t in traces], 1)
    signals = torch.stack(
        [torch.linalg.vecdot(t.columns[0][0], t.columns[0][0]) for t in traces], 1
    )
    weights = [
        m.rates[0] if t.layer.has_weight else 0.0 for t, m in zip(traces, metrics, strict=True)
    ]
    biases = [
        m.rates[-1] if t.layer.has_bias else 0.0 for t, m in zip(traces, metrics, strict=True)
    ]
    rates = set(weights + biases)
    if len(rates) == 1:
        return (inputs + 1).mul_(signals).mul_(rates.pop())
    grown = inputs * inputs.new_tensor(weights) + inputs.new_tensor(biases)
    return grown.mul_(signals)
