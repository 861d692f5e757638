"""Coordinates in which a player's own Kronecker-factored M is the identity.

With ``M = W^T W`` and ``y = W^-T d`` the preconditioned direction is ``W^-1 y``. What two players'
M have in common is then a correlation, without units: the identity on the diagonal, and off it
``(C_A^T A_nm C_A) (x) (C_B^T B_nm C_B)`` with roots ``C C^T`` of the damped factors' inverses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ocnopt.curvature.correlation import Correlation
from ocnopt.curvature.directions import Directions
from ocnopt.curvature.eigen import Eigen, outer_seen, rotated_factors
from ocnopt.curvature.factorize import spd_factor
from ocnopt.curvature.kronecker import split_damping
from ocnopt.curvature.metric import Kronecker, Metric
from ocnopt.layers.base import Params

if TYPE_CHECKING:
    from ocnopt.layers.linear import LinearLayer

__all__ = ["EigenFrame", "Frame", "KroneckerFrame"]


class Frame(ABC):
    """One player's coordinates; matrices are ``[W | b]`` as (..., groups, out, in)."""

    @property
    @abstractmethod
    def a_root(self) -> Tensor:
        """``C_A``, (groups, in, in)."""

    @property
    @abstractmethod
    def b_root(self) -> Tensor:
        """``C_B``, (groups, out, out)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the coordinates are computed in."""

    @abstractmethod
    def enter(self, matrix: Tensor) -> Tensor:
        """``W^-T d``."""

    @abstractmethod
    def directions(self, outputs: Tensor, inputs: Tensor) -> Directions:
        """Orthonormal columns of the coordinates, (groups, out, s) and (groups, in, r)."""

    @abstractmethod
    def gram_and_seen(
        self, metric: Metric, gradients: Params, where: Directions
    ) -> tuple[Tensor, Tensor]:
        """The player's own Gram matrices, and ``L^T enter(d) R``.

        Args:
            metric: The player's, at its present learning rate.
            gradients: Per sample, (B, r, *parameter).
            where: L and R.

        Returns:
            (B, r, r) and (B, r, groups, columns of L, columns of R).
        """

    @abstractmethod
    def gram_and_seen_factors(
        self, metric: Metric, rows: Tensor, cols: Tensor, where: Directions
    ) -> tuple[Tensor, Tensor]:
        """The same of per-sample gradients that are sums of outer products over locations.

        Args:
            metric: As above.
            rows: Inputs (groups, B, L, in).
            cols: Columns (r, groups, B, L, out).
            where: As above.
        """

    @abstractmethod
    def outer_seen(
        self, metric: Metric, layer: LinearLayer, a: Tensor, columns: Tensor, where: Directions
    ) -> Tensor:
        """``L^T enter(d) R`` of outer products ``d = P_h [a; 1]^T`` at one location per sample.

        Args:
            metric: As above.
            layer: A linear layer.
            a: Inputs (B, in).
            columns: (r, B, out).
            where: As above.

        Returns:
            (B / networks, r, networks, columns of L, columns of R).
        """

    @abstractmethod
    def leave(self, matrix: Tensor) -> Tensor:
        """``W^-1 y``."""

    def correlate(self, a_cross: Tensor, b_cross: Tensor, other: Frame) -> Correlation:
        """What the coordinates of two players have in common.

        Args:
            a_cross: ``A_nm``, (groups, in, in of the other).
            b_cross: ``B_nm``, (groups, out, out of the other).
            other: The other player's coordinates.

        Returns:
            Correlations of inputs and of output gradients; their norms are below one where all
            factors are means over the same samples and the diagonal ones are damped.
        """
        return Correlation(
            self.a_root.mT @ a_cross @ other.a_root, self.b_root.mT @ b_cross @ other.b_root
        )


class KroneckerFrame(Frame):
    """``M = A (x) B``: both roots are all there is.

    Args:
        metric: The inverse of M.

    Raises:
        ValueError: An inverse has no root.
    """

    def __init__(self, metric: Kronecker) -> None:
        roots = [spd_factor(inverse) for inverse in (metric.a_inverse, metric.b_inverse)]
        if roots[0] is None or roots[1] is None:
            raise ValueError("a factor's inverse has no root")
        self._a, self._b = roots[0], roots[1]

    @property
    def a_root(self) -> Tensor:
        """The root of ``A^-1``."""
        return self._a

    @property
    def b_root(self) -> Tensor:
        """The root of ``B^-1``."""
        return self._b

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return self._a.dtype

    def enter(self, matrix: Tensor) -> Tensor:
        """``C_B^T D C_A``."""
        return self.b_root.mT @ (matrix @ self.a_root)

    def directions(self, outputs: Tensor, inputs: Tensor) -> Directions:
        """By the roots."""
        return Directions(outputs, inputs, self.b_root @ outputs, self.a_root @ inputs)

    def gram_and_seen(
        self, metric: Metric, gradients: Params, where: Directions
    ) -> tuple[Tensor, Tensor]:
        """Each by itself."""
        assert isinstance(metric, Kronecker)
        matrix = metric.layer.to_matrix(gradients).to(self.dtype)
        seen = where.outputs_turned.mT @ (matrix @ where.inputs_turned)
        return metric.sample_gram(gradients), seen

    def gram_and_seen_factors(
        self, metric: Metric, rows: Tensor, cols: Tensor, where: Directions
    ) -> tuple[Tensor, Tensor]:
        """Each by itself."""
        rows, cols = rows.to(self.dtype), cols.to(self.dtype)
        seen = rotated_factors(rows, cols, where.inputs_turned, where.outputs_turned)
        return metric.factor_gram(rows, cols), seen

    def outer_seen(
        self, metric: Metric, layer: LinearLayer, a: Tensor, columns: Tensor, where: Directions
    ) -> Tensor:
        """Of factors that are turned by themselves."""
        return outer_seen(layer, a, columns.to(self.dtype), where)

    def leave(self, matrix: Tensor) -> Tensor:
        """``C_B Y C_A^T``."""
        return self.b_root @ matrix @ self.a_root.mT


class EigenFrame(Frame):
    """``M`` diagonal in a Kronecker-factored eigenbasis.

    Correlations come from the factors, as at ``M = A (x) B``; M's own diagonal is the corrected
    one. Without correlation M is therefore EKFAC's.

    Args:
        metric: The inverse of M.
        a: The factor ``A`` that the basis was made of.
        b: The factor ``B``.
        damping: Added to the eigenvalues of M; split between the factors for their roots.
    """

    def __init__(self, metric: Eigen, a: Tensor, b: Tensor, damping: float) -> None:
        self.metric = metric
        self.scales = metric.scales.sqrt()
        self._factors = a, b, damping

    @property
    def dtype(self) -> torch.dtype:
        """That of the basis."""
        return self.metric.basis_a.dtype

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        return split_damping(*self._factors)

    @cached_property
    def _a_spectrum(self) -> tuple[Tensor, Tensor]:
        """Of A, without and with damping, (groups, in)."""
        return _spectrum(self.metric.basis_a, self._factors[0], self._levels[0])

    @cached_property
    def a_root(self) -> Tensor:
        """``C_A``."""
        return self.metric.basis_a / self._a_spectrum[1].sqrt()[:, None, :]

    @cached_property
    def b_root(self) -> Tensor:
        """``C_B``."""
        basis = self.metric.basis_b
        return basis / _spectrum(basis, self._factors[1], self._levels[1])[1].sqrt()[:, None, :]

    def enter(self, matrix: Tensor) -> Tensor:
        """``(U_B^T D U_A) / sqrt(scales)``."""
        return (self.metric.basis_b.mT @ (matrix @ self.metric.basis_a)) / self.scales

    def directions(self, outputs: Tensor, inputs: Tensor) -> Directions:
        """By the bases."""
        metric = self.metric
        return Directions(outputs, inputs, metric.basis_b @ outputs, metric.basis_a @ inputs)

    def correlate(self, a_cross: Tensor, b_cross: Tensor, other: Frame) -> Correlation:
        """Inputs that are the same are correlated each with itself alone."""
        if not (isinstance(other, EigenFrame) and self._same_inputs(a_cross, other)):
            return super().correlate(a_cross, b_cross, other)
        of_b = self.b_root.mT @ b_cross @ other.b_root
        (sizes, mine), (_, theirs) = self._a_spectrum, other._a_spectrum
        return Correlation(sizes / (mine * theirs).sqrt(), of_b)

    def _same_inputs(self, a_cross: Tensor, other: EigenFrame) -> bool:
        one, two = self.metric.basis_a, other.metric.basis_a
        if not a_cross.shape == self._factors[0].shape == other._factors[0].shape:
            return False
        return torch.equal(one, two) and torch.equal(a_cross, self._factors[0])

    def gram_and_seen(
        self, metric: Metric, gradients: Params, where: Directions
    ) -> tuple[Tensor, Tensor]:
        """Both from gradients that are rotated once."""
        assert isinstance(metric, Eigen)
        return metric.sample_gram_and_seen(gradients, where)

    def gram_and_seen_factors(
        self, metric: Metric, rows: Tensor, cols: Tensor, where: Directions
    ) -> tuple[Tensor, Tensor]:
        """Both from factors that are rotated once."""
        assert isinstance(metric, Eigen)
        return metric.factor_gram_and_seen(rows, cols, where)

    def outer_seen(
        self, metric: Metric, layer: LinearLayer, a: Tensor, columns: Tensor, where: Directions
    ) -> Tensor:
        """M's own diagonal stands between the factors."""
        assert isinstance(metric, Eigen)
        return metric.outer_seen(layer, a, columns, where)

    def leave(self, matrix: Tensor) -> Tensor:
        """``U_B (Y / sqrt(scales)) U_A^T``."""
        return self.metric.basis_b @ (matrix / self.scales) @ self.metric.basis_a.mT


def _spectrum(basis: Tensor, factor: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of ``U^T factor U``, without and with damping."""
    sizes = ((basis.mT @ factor) * basis.mT).sum(-1).clamp_min(0)
    return sizes, sizes + level[:, None]
