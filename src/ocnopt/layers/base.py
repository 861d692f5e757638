"""What a kind of parametrized layer provides to the optimal-control core.

Shapes used throughout: ``B`` samples, ``*`` any number of locations per sample, ``r`` columns of
the terminal factor. A layer's parameters travel as a tuple aligned with :attr:`Layer.names`
(those of ``weight`` and ``bias`` that exist and are trained).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ocnopt.curvature.metric import Metric

Params = tuple[Tensor, ...]
Capture = tuple[Any, ...]

#: Elements of per-sample gradients that are formed at once when they are only needed for a sum. So
#: many stay in a cache, and their memory is used again for the next.
CHUNK = 1 << 22


def inner(left: Params, right: Params, keep: int) -> Tensor:
    """Inner product over all dimensions but the first ``keep``, summed over the parameters."""
    parts = [(a * b).flatten(keep).sum(-1) for a, b in zip(left, right, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def add_all(parts: list[Params]) -> Params:
    """Sum of several sets of parameters."""
    total = parts[0]
    for part in parts[1:]:
        total = tuple(x + y for x, y in zip(total, part, strict=True))
    return total


class Layer(ABC):
    """One parametrized layer as the core sees it: the affine map ``h = g(x, u)`` of Eq. 6 and 12.

    Args:
        module: The layer.
        names: Which of its parameters the player owns, in the order of all tuples.
    """

    kind: ClassVar[str]
    #: Whether Kronecker factors are defined for this kind.
    kronecker: ClassVar[bool] = False
    #: Networks that the module stacks; a sample passes through one of them alone.
    networks: int = 1

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self.names = names
        self.has_weight = "weight" in names
        self.has_bias = "bias" in names
        self.shapes = tuple(tuple(getattr(module, name).shape) for name in names)
        self.numel = sum(getattr(module, name).numel() for name in names)

    @classmethod
    def refuse(cls, module: nn.Module) -> str | None:
        """Why this module cannot be a player, or None."""
        return None

    @abstractmethod
    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        """What must be kept of a call; the first entry is the input tensor, detached."""

    @abstractmethod
    def features(self, capture: Capture, dtype: torch.dtype) -> Tensor:
        """The tensor ``a`` that multiplies the weight, cast to the parameters' dtype."""

    @abstractmethod
    def gradient(self, a: Tensor, g: Tensor) -> Params:
        """``sum_i g_u^T g^(i)``: the weight gradient for output gradients ``g`` (B, *)."""

    @abstractmethod
    def apply(self, a: Tensor, delta: Params) -> Tensor:
        """``g(x; delta)``: the layer applied with ``delta`` as its parameters, shape of h."""

    @abstractmethod
    def sample_gradients(self, a: Tensor, g: Tensor) -> Params:
        """The weight gradient of every sample, each of shape (B, *parameter)."""

    def add_gradient(
        self, base: Params, a: Tensor, g: Tensor, scale: float, factor: float = 1.0
    ) -> Params:
        """``factor * base + scale * gradient(a, g)``."""
        return tuple(
            torch.mul(b, factor).add_(d, alpha=scale)
            for b, d in zip(base, self.gradient(a, g), strict=True)
        )

    def prefers_samples(self, a: Tensor, g: Tensor) -> bool:
        """Whether per-sample gradients take less room than the input and output gradient."""
        return bool(self.numel * g.shape[0] <= a.numel() + g.numel())

    def gram(self, a: Tensor, columns: Tensor, metric: Metric, fold: int = 1) -> Tensor:
        """``P_u^T Q_uu^-1 P_u`` of every sample, with ``Q_uu = M / eta``.

        Args:
            a: Features (B * fold, *).
            columns: Back-propagated columns (r, B * fold, *).
            metric: The preconditioner's inverse.
            fold: Consecutive rows that belong to one sample.

        Returns:
            (B, r, r).
        """
        rows = columns.shape[1]
        step = max(1, CHUNK // max(1, self.numel * columns.shape[0] * fold)) * fold
        parts = []
        for start in range(0, rows, step):
            part = slice(start, start + step)
            gradients = self.column_gradients(a[part], columns[:, part], fold)
            parts.append(metric.sample_gram(gradients))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def column_gradients(self, a: Tensor, columns: Tensor, fold: int = 1) -> Params:
        """Per-sample gradients of every column, each (B, r, *parameter)."""
        per_column = [self.sample_gradients(a, column) for column in columns]
        stacked = (
            parts[0].unsqueeze(1) if len(parts) == 1 else torch.stack(parts, 1)
            for parts in zip(*per_column, strict=True)
        )
        if fold == 1:
            return tuple(stacked)
        return tuple(p.reshape(p.shape[0] // fold, fold, *p.shape[1:]).sum(1) for p in stacked)

    @property
    def row_key(self) -> tuple[Any, ...]:
        """What makes rows of the same input differ between layers."""
        return (self.kind, self.networks, self.has_weight, self.has_bias)

    # Kronecker structure; kinds with ``kronecker = True`` override them all.

    def rows(self, a: Tensor) -> Tensor:
        """Homogeneous inputs ``[a; 1]``, (B, L, groups, in)."""
        raise TypeError(f"{self.kind} has no Kronecker factors")

    def cols(self, g: Tensor) -> Tensor:
        """Output gradients, (B, L, groups, out)."""
        raise TypeError(f"{self.kind} has no Kronecker factors")

    def to_matrix(self, params: Params) -> Tensor:
        """``[W | b]`` as (..., groups, out, in); leading dimensions are kept."""
        raise TypeError(f"{self.kind} has no Kronecker factors")

    def from_matrix(self, matrix: Tensor) -> Params:
        """Inverse of :meth:`to_matrix`."""
        raise TypeError(f"{self.kind} has no Kronecker factors")

    def cross_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of outer products ``x y^T`` over samples and locations."""
        raise TypeError(f"{self.kind} has no Kronecker factors")

    def second_moment(self, x: Tensor) -> Tensor:
        """Sum of outer products over samples and locations."""
        return self.cross_moment(x, x)


class MatrixLayer(Layer):
    """A layer whose parameters form ``[W | b]``, one block per group."""

    kronecker = True
    groups: int = 1

    def to_matrix(self, params: Params) -> Tensor:
        """``[W | b]`` as (..., groups, out / groups, in); leading dimensions are kept."""
        blocks = []
        if self.has_weight:
            shape = self.shapes[0]
            weight = params[0]
            lead = weight.shape[: weight.dim() - len(shape)]
            blocks.append(weight.reshape(*lead, self.groups, shape[0] // self.groups, -1))
        if self.has_bias:
            bias = params[-1]
            blocks.append(bias.reshape(*bias.shape[:-1], self.groups, -1, 1))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)

    def from_matrix(self, matrix: Tensor) -> Params:
        """Inverse of :meth:`to_matrix`."""
        lead = matrix.shape[:-3]
        if not self.has_bias:
            return (matrix.reshape(*lead, *self.shapes[0]),)
        bias = matrix[..., -1].reshape(*lead, *self.shapes[-1])
        if not self.has_weight:
            return (bias,)
        return matrix[..., :-1].reshape(*lead, *self.shapes[0]), bias

    def gram(self, a: Tensor, columns: Tensor, metric: Metric, fold: int = 1) -> Tensor:
        """From inputs and signals where locations are few, else from per-sample gradients."""
        if not metric.factored or not self.few_locations(columns, fold):
            return super().gram(a, columns, metric, fold)
        samples = columns.shape[1] // fold
        size = self.rows(a[:1]).numel() + columns[:, 0].numel()
        step = max(1, CHUNK // (fold * size))
        parts = []
        for start in range(0, samples, step):
            part = slice(start * fold, (start + step) * fold)
            rows, cols = self.factors(a[part], columns[:, part], fold)
            parts.append(metric.factor_gram(rows, cols).to(columns.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def few_locations(self, columns: Tensor, fold: int = 1) -> bool:
        """Whether products of :meth:`factors` take fewer operations than of their gradients.

        Args:
            columns: (r, B * fold, *).
            fold: Consecutive rows that belong to one sample.
        """
        channels = self.shapes[0][0]
        into, out = self.numel // channels, channels // self.groups
        locations = fold * columns[0, 0].numel() // channels
        return self.networks == 1 and locations * (into + out) < into * out

    def factors(self, a: Tensor, columns: Tensor, fold: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and signals whose outer products, summed over locations, are the gradients.

        Args:
            a: Features (B * fold, *).
            columns: (r, B * fold, *).
            fold: Consecutive rows that belong to one sample.

        Returns:
            (groups, B, L, in), (r, groups, B, L, out).
        """
        cols = torch.stack([_by_sample(self.cols(p), fold) for p in columns])
        return _by_sample(self.rows(a), fold), cols

    def cross_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of ``x y^T`` of (B, L, groups, n) and (B, L, groups, m): (groups, n, m)."""
        left, right = (z.reshape(-1, *z.shape[2:]).transpose(0, 1) for z in (x, y))
        return left.transpose(1, 2) @ right

    def homogeneous(self, rows: Tensor) -> Tensor:
        """Append the constant one of ``[a; 1]`` as this player's parameters ask for it."""
        if not self.has_bias:
            return rows
        ones = rows.new_ones(*rows.shape[:-1], 1)
        return torch.cat([rows, ones], -1) if self.has_weight else ones


def _by_sample(x: Tensor, fold: int) -> Tensor:
    """(B * fold, L, groups, n) as (groups, B, fold * L, n)."""
    return x.reshape(x.shape[0] // fold, -1, *x.shape[2:]).permute(2, 0, 1, 3)
