"""Coordinates in which a player's own Kronecker-factored M is the identity.

With ``M = W^T W`` and ``y = W^-T d`` the preconditioned direction is ``W^-1 y``. What two players'
M have in common is then a correlation, without units: the identity on the diagonal, and off it
``(C_A^T A_nm C_A) (x) (C_B^T B_nm C_B)`` with roots ``C C^T`` of the damped factors' inverses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from ocnopt.curvature.eigen import Eigen, rotated_factors
from ocnopt.curvature.factorize import spd_factor
from ocnopt.curvature.kronecker import split_damping
from ocnopt.curvature.metric import Kronecker, Metric
from ocnopt.layers.base import Params

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
    def enter(self, matrix: Tensor, inputs: Tensor | None = None) -> Tensor:
        """``W^-T d``, of all coordinates of the inputs or of some."""

    @abstractmethod
    def gram_and_enter(
        self, metric: Metric, gradients: Params, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The player's own Gram matrices, and :meth:`enter` for some of the inputs.

        Args:
            metric: The player's, at its present learning rate.
            gradients: Per sample, (B, r, *parameter).
            inputs: Indices in ascending order.

        Returns:
            (B, r, r) and (B, r, groups, out, kept).
        """

    @abstractmethod
    def gram_and_enter_factors(
        self, metric: Metric, rows: Tensor, cols: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of per-sample gradients that are sums of outer products over locations.

        Args:
            metric: As above.
            rows: Inputs (groups, B, L, in).
            cols: Columns (r, groups, B, L, out).
            inputs: As above.
        """

    @abstractmethod
    def sides(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """What :meth:`enter` does to an outer product ``g a^T``, for some of the inputs.

        Returns:
            Matrices that turn ``a``, (groups, in, kept), and ``g``, (groups, out, out), and what
            their product is divided by: (groups, out, kept) or a number.
        """

    @abstractmethod
    def leave(self, matrix: Tensor) -> Tensor:
        """``W^-1 y``."""

    def correlate(self, a_cross: Tensor, b_cross: Tensor, other: Frame) -> tuple[Tensor, Tensor]:
        """Correlations of inputs and of output gradients with those of another player.

        Args:
            a_cross: ``A_nm``, (groups, in, in of the other).
            b_cross: ``B_nm``, (groups, out, out of the other).
            other: The other player's coordinates.

        Returns:
            Tensors of the same shapes; their norms are below one where all factors are means over
            the same samples and the diagonal ones are damped.
        """
        return self.a_root.mT @ a_cross @ other.a_root, self.b_root.mT @ b_cross @ other.b_root


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

    def enter(self, matrix: Tensor, inputs: Tensor | None = None) -> Tensor:
        """``C_B^T D C_A``."""
        a_root = self.a_root if inputs is None else self.a_root[:, :, inputs]
        return self.b_root.mT @ (matrix @ a_root)

    def gram_and_enter(
        self, metric: Metric, gradients: Params, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each by itself."""
        assert isinstance(metric, Kronecker)
        matrix = metric.layer.to_matrix(gradients).to(self.dtype)
        return metric.sample_gram(gradients), self.enter(matrix, inputs)

    def gram_and_enter_factors(
        self, metric: Metric, rows: Tensor, cols: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each by itself."""
        a_root, b_root, _ = self.sides(inputs)
        turned = rotated_factors(rows.to(self.dtype), cols.to(self.dtype), a_root, b_root)
        return metric.factor_gram(rows, cols), turned

    def sides(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """The roots, and one."""
        return self.a_root[:, :, inputs], self.b_root, 1.0

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
    def _roots(self) -> tuple[Tensor, Tensor]:
        a, b, damping = self._factors
        level_a, level_b = split_damping(a, b, damping)
        return (
            _scaled_basis(self.metric.basis_a, a, level_a),
            _scaled_basis(self.metric.basis_b, b, level_b),
        )

    @property
    def a_root(self) -> Tensor:
        """``C_A``."""
        return self._roots[0]

    @property
    def b_root(self) -> Tensor:
        """``C_B``."""
        return self._roots[1]

    def enter(self, matrix: Tensor, inputs: Tensor | None = None) -> Tensor:
        """``(U_B^T D U_A) / sqrt(scales)``."""
        basis, scales = self.metric.basis_a, self.scales
        if inputs is not None:
            basis, scales = basis[:, :, inputs], scales[:, :, inputs]
        return (self.metric.basis_b.mT @ (matrix @ basis)) / scales

    def gram_and_enter(
        self, metric: Metric, gradients: Params, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both from gradients that are rotated once."""
        assert isinstance(metric, Eigen)
        gram, turned = metric.sample_gram_and_rotated(gradients, inputs)
        return gram, turned / self.scales[:, :, inputs]

    def gram_and_enter_factors(
        self, metric: Metric, rows: Tensor, cols: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both from factors that are rotated once."""
        assert isinstance(metric, Eigen)
        gram, turned = metric.factor_gram_and_rotated(rows, cols, inputs)
        return gram, turned / self.scales[:, :, inputs]

    def sides(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """The bases, and the root of the scales."""
        basis_a, basis_b = self.metric.basis_a, self.metric.basis_b
        return basis_a[:, :, inputs], basis_b, self.scales[:, :, inputs]

    def leave(self, matrix: Tensor) -> Tensor:
        """``U_B (Y / sqrt(scales)) U_A^T``."""
        return self.metric.basis_b @ (matrix / self.scales) @ self.metric.basis_a.mT


def _scaled_basis(basis: Tensor, factor: Tensor, level: Tensor) -> Tensor:
    """``U (U^T factor U + level)^-1/2``, the product's diagonal alone."""
    spectrum = ((basis.mT @ factor) * basis.mT).sum(-1).clamp_min(0)
    return basis / (spectrum + level[:, None]).sqrt()[:, None, :]
