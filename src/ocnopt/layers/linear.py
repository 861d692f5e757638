"""``nn.Linear`` on inputs of any number of leading dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocnopt.layers.base import Capture, MatrixLayer, Params

if TYPE_CHECKING:
    from ocnopt.curvature.metric import Metric


class LinearLayer(MatrixLayer):
    """``h = W x + b``; ``g_u^T v = vec(v [x; 1]^T)`` (Eq. 13)."""

    kind = "Linear"

    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        """The input."""
        return ((args[0] if args else kwargs["input"]).detach(),)

    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The input itself."""
        x: Tensor = capture[0]
        return x if x.dtype == dtype else x.to(dtype)

    def gradient(self, a: Tensor, g: Tensor) -> Params:
        """``g^T a`` and the column sums of g."""
        flat = g.reshape(-1, g.shape[-1])
        out: tuple[Tensor, ...] = ()
        if self.has_weight:
            out = (flat.t() @ a.reshape(-1, a.shape[-1]),)
        return (*out, flat.sum(0)) if self.has_bias else out

    def add_gradient(
        self, base: Params, a: Tensor, g: Tensor, scale: float, factor: float = 1.0
    ) -> Params:
        """One matrix product, accumulated onto ``base`` as it is made."""
        flat = g if g.dim() == 2 else g.reshape(-1, g.shape[-1])
        out: tuple[Tensor, ...] = ()
        if self.has_weight:
            inputs = a if a.dim() == 2 else a.reshape(-1, a.shape[-1])
            out = (torch.addmm(base[0], flat.t(), inputs, beta=factor, alpha=scale),)
        if self.has_bias:
            out = (*out, torch.mul(base[-1], factor).add_(flat.sum(0), alpha=scale))
        return out

    def apply(self, a: Tensor, delta: Params) -> Tensor:
        """``F.linear`` with the update as weights."""
        if self.has_weight:
            return F.linear(a, delta[0], delta[1] if self.has_bias else None)
        return delta[0].expand(*a.shape[:-1], -1)

    def sample_gradients(self, a: Tensor, g: Tensor) -> Params:
        """Outer products, summed over locations."""
        a3 = a.reshape(a.shape[0], -1, a.shape[-1])
        g3 = g.reshape(g.shape[0], -1, g.shape[-1])
        out: tuple[Tensor, ...] = (g3.transpose(1, 2) @ a3,) if self.has_weight else ()
        return (*out, g3.sum(1)) if self.has_bias else out

    def column_gradients(self, a: Tensor, columns: Tensor, fold: int = 1) -> Params:
        """All columns at once where samples have one location."""
        if a.dim() > 2 or fold > 1:
            return super().column_gradients(a, columns, fold)
        turned = columns.transpose(0, 1)
        out: tuple[Tensor, ...] = ()
        if self.has_weight:
            out = (turned.unsqueeze(-1) * a[:, None, None, :],)
        return (*out, turned) if self.has_bias else out

    def prefers_samples(self, a: Tensor, g: Tensor) -> bool:
        """Never at one location, where norms and products come from the factors."""
        return a.dim() > 2 and super().prefers_samples(a, g)

    def gram(self, a: Tensor, columns: Tensor, metric: Metric, fold: int = 1) -> Tensor:
        """At one location per sample from outer products."""
        if fold > 1:
            a = a.reshape(a.shape[0] // fold, fold, *a.shape[1:])
            columns = columns.reshape(
                columns.shape[0], columns.shape[1] // fold, fold, *columns.shape[2:]
            )
        if a.dim() == 2:
            return metric.outer_gram(self, a, columns)
        return super().gram(a, columns, metric)

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Rows (B, n) times the matrix (1, n, k) of the group: (B, k)."""
        return x @ matrices[0]

    def each(self, values: Tensor, samples: int) -> Tensor:
        """One value per output, (out,), as it meets rows of samples."""
        return values

    def rows(self, a: Tensor) -> Tensor:
        """(B, L, 1, in [+ 1])."""
        return self.homogeneous(a.reshape(a.shape[0], -1, a.shape[-1])).unsqueeze(2)

    def cols(self, g: Tensor) -> Tensor:
        """(B, L, 1, out)."""
        return g.reshape(g.shape[0], -1, 1, g.shape[-1])
