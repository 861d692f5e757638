"""``nn.Embedding``: a linear layer on one-hot inputs that are never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocnopt.layers.base import Capture, Layer, Params

if TYPE_CHECKING:
    from ocnopt.curvature.metric import Metric


class EmbeddingLayer(Layer):
    """``h_l = W[x_l]``; the padding row receives no gradient."""

    kind = "Embedding"

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        assert isinstance(module, nn.Embedding)
        self.padding_idx = module.padding_idx

    @classmethod
    def refuse(cls, module: nn.Module) -> str | None:
        """Embeddings that rescale rows or gradients are not linear in their weight."""
        assert isinstance(module, nn.Embedding)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"{option} is set, so the output is not linear in the weight"
        return None

    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        """The indices."""
        return (args[0] if args else kwargs["input"],)

    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The indices (B, *)."""
        indices: Tensor = capture[0]
        return indices

    def _masked(self, a: Tensor, g: Tensor) -> Tensor:
        if self.padding_idx is None:
            return g
        return g.masked_fill((a == self.padding_idx).unsqueeze(-1), 0)

    def gradient(self, a: Tensor, g: Tensor) -> Params:
        """Rows of g added up by index."""
        g = self._masked(a, g)
        weight = g.new_zeros(self.shapes[0])
        return (weight.index_add_(0, a.flatten(), g.reshape(-1, g.shape[-1])),)

    def apply(self, a: Tensor, delta: Params) -> Tensor:
        """Rows of the update."""
        return F.embedding(a, delta[0])

    def sample_gradients(self, a: Tensor, g: Tensor) -> Params:
        """Dense, (B, rows, width): for oracles and tiny tables only."""
        g = self._masked(a, g)
        batch = a.shape[0]
        a2, g3 = a.reshape(batch, -1), g.reshape(batch, -1, g.shape[-1])
        weight = g.new_zeros(batch, *self.shapes[0])
        index = a2.unsqueeze(-1).expand(-1, -1, g.shape[-1])
        return (weight.scatter_add_(1, index, g3),)

    def prefers_samples(self, a: Tensor, g: Tensor) -> bool:
        """Never: the table is larger than what a sample touches of it."""
        return False

    def gram(self, a: Tensor, columns: Tensor, metric: Metric, fold: int = 1) -> Tensor:
        """From the rows a sample touches: equal indices within a sample are added up first."""
        rank, width = columns.shape[0], columns.shape[-1]
        batch = a.shape[0] // fold
        a2 = a.reshape(batch, -1)
        cols = torch.stack([self._masked(a, c) for c in columns]).reshape(rank, batch, -1, width)
        same = (a2.unsqueeze(1) == a2.unsqueeze(2)).to(cols.dtype)  # (B, L, L)
        rows = same @ cols  # (r, B, L, width): the gradient's row at each location's index
        return torch.einsum("rbld,sbld->brs", cols, metric.solve_rows(rows, a2))
