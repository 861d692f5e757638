"""Linear layers of several networks of one shape, applied at once."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ocnopt.layers.base import Params
from ocnopt.layers.linear import LinearLayer

__all__ = ["StackedLinear", "StackedLinearLayer"]


class StackedLinear(nn.Module):
    """The linear layers of S networks that share nothing but their shape.

    Small networks spend their time on the number of operations, not on their size: S of them
    trained at once (over seeds, say) take little longer than one. Inputs are the samples of the
    first network, then those of the second, and so on, equally many each. With the sum of the S
    losses as objective every network is trained as if it were alone, by torch's elementwise
    optimizers and by those of ``ocnopt``.

    Args:
        networks: S.
        in_features: Length of an input.
        out_features: Length of an output.
        bias: Whether a bias is added.

    Attributes:
        weight: (S, out, in).
        bias: (S, out), or None.
    """

    def __init__(
        self, networks: int, in_features: int, out_features: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.networks = networks
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(networks, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(networks, out_features)) if bias else None
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        for param in self.parameters():  # as nn.Linear does
            nn.init.uniform_(param, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply every network's layer to its own samples.

        Args:
            x: (S * B, in), the first B rows being the first network's.

        Returns:
            (S * B, out).
        """
        own = x.unflatten(0, (self.networks, -1))
        if self.bias is None:
            return torch.bmm(own, self.weight.mT).flatten(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), own, self.weight.mT).flatten(0, 1)

    def extra_repr(self) -> str:
        """Its shape."""
        return (
            f"networks={self.networks}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class StackedLinearLayer(LinearLayer):
    """``h = W_s x + b_s`` with s the network that a sample belongs to."""

    kind: ClassVar[str] = "StackedLinear"

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        assert isinstance(module, StackedLinear)
        self.networks = module.networks

    def _own(self, x: Tensor) -> Tensor:
        """(S * B, n) as (S, B, n)."""
        own: Tensor = x.unflatten(0, (self.networks, -1))
        return own

    def gradient(self, a: Tensor, g: Tensor) -> Params:
        """``g^T a`` and the column sums of g, network by network."""
        own = self._own(g)
        out: tuple[Tensor, ...] = ()
        if self.has_weight:
            out = (own.mT @ self._own(a),)
        return (*out, own.sum(1)) if self.has_bias else out

    def add_gradient(
        self, base: Params, a: Tensor, g: Tensor, scale: float, factor: float = 1.0
    ) -> Params:
        """One product per network, accumulated onto ``base`` as it is made."""
        own = self._own(g)
        out: tuple[Tensor, ...] = ()
        if self.has_weight:
            out = (torch.baddbmm(base[0], own.mT, self._own(a), beta=factor, alpha=scale),)
        if self.has_bias:
            out = (*out, torch.mul(base[-1], factor).add_(own.sum(1), alpha=scale))
        return out

    def apply(self, a: Tensor, delta: Params) -> Tensor:
        """The layer with the update as weights."""
        if not self.has_weight:
            return self.each(delta[0], a.shape[0])
        own = self._own(a)
        if self.has_bias:
            return torch.baddbmm(delta[1].unsqueeze(1), own, delta[0].mT).flatten(0, 1)
        return torch.bmm(own, delta[0].mT).flatten(0, 1)

    def sample_gradients(self, a: Tensor, g: Tensor) -> Params:
        """Outer products, zero in the networks that a sample does not belong to."""
        samples = a.shape[0]
        index = torch.arange(samples, device=a.device)
        network = index // (samples // self.networks)
        out = []
        dense: tuple[Tensor, ...] = (g.unsqueeze(-1) * a.unsqueeze(1),) if self.has_weight else ()
        for part in (*dense, g) if self.has_bias else dense:
            full = part.new_zeros(samples, self.networks, *part.shape[1:])
            full[index, network] = part
            out.append(full)
        return tuple(out)

    def column_gradients(self, a: Tensor, columns: Tensor, fold: int = 1) -> Params:
        """Column by column."""
        per_column = [self.sample_gradients(a, column) for column in columns]
        return tuple(torch.stack(parts, 1) for parts in zip(*per_column, strict=True))

    def to_matrix(self, params: Params) -> Tensor:
        """``[W | b]`` as (..., S, out, in)."""
        blocks = []
        if self.has_weight:
            blocks.append(params[0])
        if self.has_bias:
            blocks.append(params[-1].unsqueeze(-1))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Every sample with its own network's matrix."""
        return (self._own(x) @ matrices).flatten(0, 1)

    def each(self, values: Tensor, samples: int) -> Tensor:
        """Every sample its own network's."""
        return values.repeat_interleave(samples // self.networks, 0)

    def cross_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """Per network: (B, L, 1, n) and (B, L, 1, m) to (S, n, m)."""
        left, right = (z.reshape(self.networks, -1, z.shape[-1]) for z in (x, y))
        return left.mT @ right
