"""``g_u`` of a layer that is affine in its parameters and in its input, as linear maps.

S samples with R locations and N = R out outputs each, n inputs, m parameters. A "sample" may be a
whole batch: then R counts the locations of all its rows, and S = 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ocnopt.control.chain import Link
from ocnopt.control.transport import unit_columns
from ocnopt.layers.base import Params
from ocnopt.layers.linear import LinearLayer

__all__ = ["AFFINE", "Control", "control_of", "control_room"]

#: Kinds of layers that are affine in their input, too.
AFFINE = ("Linear", "Conv")


class Control(ABC):
    """A player's parameters as the control u (m) of a stage.

    Args:
        link: The stage.
        samples: S.
        dtype: The dtype of values.
    """

    def __init__(self, link: Link, samples: int, dtype: torch.dtype) -> None:
        self.player = link.player
        self.layer = link.player.layer
        self.samples = samples
        self.dtype = dtype
        self.size = self.layer.numel

    @abstractmethod
    def join(self, params: Params) -> Tensor:
        """Parameters as one vector (m)."""

    @abstractmethod
    def split(self, u: Tensor) -> Params:
        """The inverse of :meth:`join`, in the parameters' own dtypes."""

    @abstractmethod
    def pull(self, k: Tensor) -> Tensor:
        """``g_u^T k``, (S, N, c) to (S, m, c)."""

    @abstractmethod
    def push(self, k: Tensor) -> Tensor:
        """``g_u k``, (S, m, c) to (S, N, c)."""

    @abstractmethod
    def curvature(self, k: Tensor) -> Tensor:
        """The mean over samples of ``g_u^T K g_u``, (S, N, N) to (m, m)."""

    def stacked(self, z: Tensor) -> Tensor:
        """``g_u^T z`` of all rows, (S, r, N) to (m, S r)."""
        return self.pull(z.mT).transpose(0, 1).reshape(self.size, -1)

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """``g_u u`` of one u for all samples, (m) to (S, N)."""

    @abstractmethod
    def total(self, v: Tensor) -> Tensor:
        """``sum_i g_u^T v_i``, (S, N) to (m)."""

    def gram(self, z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """``(g_u^T z)^T diag(weight) (g_u^T y)`` of all rows with all rows.

        Args:
            z: (S, r, N).
            y: (S, c, N).
            weight: (m), the same throughout a parameter.

        Returns:
            (S r, S c).
        """
        left = self.stacked(z)
        right = left if y is z else self.stacked(y)
        return left.t() @ (weight.unsqueeze(-1) * right)

    @abstractmethod
    def mixed(self, v: Tensor) -> Tensor | None:
        """``V_h . g_ux``, (S, N) to (S, m, n); None where it is zero."""


class _LinearControl(Control):
    """``g_u = a (x) I``, never formed: u is [W | b] row by row, a = [x; 1] (Eq. 13)."""

    def __init__(self, link: Link, samples: int, dtype: torch.dtype) -> None:
        super().__init__(link, samples, dtype)
        assert isinstance(self.layer, LinearLayer)
        self.inputs, self.out = link.x.shape[-1], link.h.shape[-1]
        x = link.x.to(dtype).reshape(samples, -1, self.inputs)
        self.a = self.layer.homogeneous(x)  # (S, R, in)

    def join(self, params: Params) -> Tensor:
        assert isinstance(self.layer, LinearLayer)
        return self.layer.to_matrix(params).reshape(-1).to(self.dtype)

    def split(self, u: Tensor) -> Params:
        assert isinstance(self.layer, LinearLayer)
        found = self.layer.from_matrix(u.reshape(1, self.out, -1))
        return tuple(d.to(p.dtype) for d, p in zip(found, self.player.params, strict=True))

    def pull(self, k: Tensor) -> Tensor:
        k = k.reshape(self.samples, -1, self.out, k.shape[-1])
        return torch.einsum("sri,sroc->soic", self.a, k).reshape(self.samples, self.size, -1)

    def push(self, k: Tensor) -> Tensor:
        c = k.shape[-1]
        k = k.reshape(self.samples, self.out, -1, c)
        return torch.einsum("sri,soic->sroc", self.a, k).reshape(self.samples, -1, c)

    def curvature(self, k: Tensor) -> Tensor:
        r = self.a.shape[1]
        k = k.reshape(self.samples, r, self.out, r, self.out)
        if r == 1:
            k = k.reshape(self.samples, self.out, self.out)
            squares = torch.einsum("si,sj->sij", self.a[:, 0], self.a[:, 0])
            total = torch.einsum("sij,sop->oipj", squares, k)
        else:
            half = torch.einsum("sroqp,sqj->sropj", k, self.a)
            total = torch.einsum("sri,sropj->oipj", self.a, half)
        return total.reshape(self.size, self.size) / self.samples

    def apply(self, u: Tensor) -> Tensor:
        return (self.a @ u.reshape(self.out, -1).t()).reshape(self.samples, -1)

    def total(self, v: Tensor) -> Tensor:
        return (v.reshape(-1, self.out).t() @ self.a.flatten(0, 1)).reshape(-1)

    def gram(self, z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Without ``g_u^T z``, where locations are few: it is ``a . a`` times ``z . y``."""
        samples, locations, width = self.a.shape
        if locations > width:
            return super().gram(z, y, weight)
        weighted = self.a * weight.reshape(self.out, -1)[0]
        dots = torch.einsum("sri,tqi->srtq", weighted, self.a)
        z = z.reshape(samples, -1, locations, self.out)
        y = y.reshape(samples, -1, locations, self.out)
        half = torch.einsum("srtq,tcqo->srotc", dots, y).reshape(samples, locations * self.out, -1)
        return (z.flatten(2) @ half).reshape(z.shape[0] * z.shape[1], -1)

    def mixed(self, v: Tensor) -> Tensor | None:
        if not self.layer.has_weight:
            return None
        r = self.a.shape[1]
        found = v.new_zeros(self.samples, self.out, self.a.shape[2], r, self.inputs)
        # d(W x_r)_o / dW_oi dx_rj is one where i = j, for every location r.
        same = found[:, :, : self.inputs].diagonal(dim1=2, dim2=4)  # (S, out, R, in)
        same.copy_(v.reshape(self.samples, r, self.out).transpose(1, 2).unsqueeze(-1))
        return found.reshape(self.samples, self.size, r * self.inputs)


class _DenseControl(Control):
    """``g_u`` as a matrix (S, N, m): u is the weight behind which the bias follows (Eq. 14)."""

    def __init__(self, link: Link, samples: int, dtype: torch.dtype) -> None:
        super().__init__(link, samples, dtype)
        self.x, self.h = link.x.to(dtype), link.h.to(dtype)
        self.fold = self.h.shape[0] // samples
        a = self.layer.features((self.x,), dtype)
        units = unit_columns(self.h, self.h.numel() // samples, samples)
        self.g_u = self._flat(self.layer.column_gradients(a, units, self.fold))

    def _flat(self, parts: Params) -> Tensor:
        """(S, c, *parameter) each, as (S, c, m)."""
        return torch.cat([p.flatten(2) for p in parts], 2)

    def join(self, params: Params) -> Tensor:
        return torch.cat([p.reshape(-1) for p in params]).to(self.dtype)

    def split(self, u: Tensor) -> Params:
        parts = u.split([p.numel() for p in self.player.params])
        return tuple(
            d.reshape(p.shape).to(p.dtype) for d, p in zip(parts, self.player.params, strict=True)
        )

    def pull(self, k: Tensor) -> Tensor:
        return self.g_u.transpose(1, 2) @ k

    def push(self, k: Tensor) -> Tensor:
        return self.g_u @ k

    def curvature(self, k: Tensor) -> Tensor:
        return self.g_u.flatten(0, 1).t() @ (k @ self.g_u).flatten(0, 1) / self.samples

    def apply(self, u: Tensor) -> Tensor:
        return self.g_u @ u

    def total(self, v: Tensor) -> Tensor:
        return self.g_u.flatten(0, 1).t() @ v.reshape(-1)

    def mixed(self, v: Tensor) -> Tensor | None:
        if not self.layer.has_weight:
            return None
        n, rows = self.x.numel() // self.samples, self.x.shape[0]
        units = unit_columns(self.x, n, self.samples).reshape(n * rows, *self.x.shape[1:])
        v = v.reshape(self.h.shape)
        signals = v.expand(n, *v.shape).reshape(n * rows, *v.shape[1:])
        parts = list(
            self.layer.sample_gradients(self.layer.features((units,), self.dtype), signals)
        )
        if self.layer.has_bias:  # it does not multiply x
            parts[-1] = torch.zeros_like(parts[-1])
        folded = [p.reshape(n, self.samples, self.fold, *p.shape[1:]).sum(2) for p in parts]
        return self._flat(tuple(p.transpose(0, 1) for p in folded)).transpose(1, 2)


def control_of(link: Link, samples: int, dtype: torch.dtype) -> Control:
    """The control of a stage whose player's layer is affine.

    Args:
        link: The stage.
        samples: S.
        dtype: The dtype of values.
    """
    kind = _LinearControl if isinstance(link.player.layer, LinearLayer) else _DenseControl
    return kind(link, samples, dtype)


def control_room(link: Link, samples: int, first: bool) -> int:
    """About how many numbers the Q's of a stage and their Jacobians take.

    Args:
        link: The stage.
        samples: S.
        first: Whether nothing before it is controlled, so that its state is fixed.
    """
    m: int = link.player.layer.numel
    n, h = link.x.numel() // samples, link.h.numel() // samples
    size = 4 * m * m + samples * 3 * h * h
    if not first:
        size += samples * (4 * m * n + 3 * n * n + 2 * h * n)
    if not isinstance(link.player.layer, LinearLayer):
        size += 2 * samples * h * m
    return size
