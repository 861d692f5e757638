"""The one place where matrices are factorized, and where a failure is met.

A factorization never raises: it escalates (finite check, more damping, double precision, the
previous result, at last the identity) and counts what it had to do.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ocnopt.finite import all_finite, finite_blocks

__all__ = [
    "Eigenbases",
    "Factorization",
    "definite",
    "eigenbasis",
    "singular_bases",
    "spd_factor",
    "spd_inverse",
]

#: Damping is raised tenfold at most this often before double precision is tried.
RAISES = 6


@dataclass(frozen=True)
class Factorization:
    """A result and what it took.

    Attributes:
        values: The inverse, or the eigenvectors; (groups, n, n).
        spectrum: Eigenvalues (groups, n), clamped at zero, of an eigenbasis; else None.
        damping: Largest damping in use after escalation, in the matrix's units.
        failures: Attempts that failed before this result.
    """

    values: Tensor
    spectrum: Tensor | None
    damping: float
    failures: int


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)


def spd_inverse(matrix: Tensor, damping: Tensor, previous: Tensor | None = None) -> Factorization:
    """``(matrix + damping I)^-1`` of symmetric positive semi-definite blocks.

    A block that fails leaves the others as they are.

    Args:
        matrix: (groups, n, n).
        damping: (groups,), positive.
        previous: What to fall back on where nothing else helps.

    Returns:
        The inverse with its damping and the number of failed attempts.
    """
    failures = 0
    sound = finite_blocks(matrix)
    if not bool(sound.any()):
        return _last_resort(matrix, previous, damping, failures + 1)
    eye = _eye_like(matrix)
    if not bool(sound.all()):
        found = spd_inverse(_where(sound, matrix, eye), damping, previous)
        kept = previous if previous is not None else eye
        values = _where(sound, found.values, kept)
        return Factorization(values, None, found.damping, found.failures + 1)
    # A damping of zero cannot be raised tenfold; rounding noise of the matrix is its unit.
    floor = torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = damping
    for dtype in (matrix.dtype, torch.float64):
        work = matrix.to(dtype)
        for _ in range(RAISES):
            damped = work + level.to(dtype)[:, None, None] * eye.to(dtype)
            factor, info = torch.linalg.cholesky_ex(damped)
            failing = info != 0
            if bool(failing.any()):  # what is no factor cannot be inverted
                factor = _where(~failing, factor, eye.to(dtype))
            inverse = torch.cholesky_inverse(factor).to(matrix.dtype)
            failing |= ~finite_blocks(inverse)
            if not bool(failing.any()):
                return Factorization(inverse, None, float(level.max()), failures)
            failures += 1
            level = torch.where(failing, torch.maximum(level, floor) * 10, level)
        if dtype == torch.float64:
            break
        level = damping
    return _last_resort(matrix, previous, level, failures)


def spd_factor(matrix: Tensor) -> Tensor | None:
    """The Cholesky factor of a matrix (..., n, n), for callers that answer a failure themselves.

    Returns:
        The lower factor; None unless every matrix is positive definite beyond rounding.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor if bool(_beyond_rounding(matrix, factor, info).all()) else None


def definite(matrix: Tensor) -> Tensor:
    """Which blocks of (groups, n, n) are positive definite beyond rounding, (groups,)."""
    return _beyond_rounding(matrix, *torch.linalg.cholesky_ex(matrix))


def _beyond_rounding(matrix: Tensor, factor: Tensor, info: Tensor) -> Tensor:
    floor = torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return (info == 0) & (pivots > floor.unsqueeze(-1)).all(-1)


def singular_bases(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U, s, V`` with ``matrix = U diag(s) V^T``, for callers that answer a failure themselves.

    Args:
        matrix: (groups, n, m).

    Returns:
        (groups, n, k), (groups, k) and (groups, m, k) with k the smaller of n and m.

    Raises:
        ValueError: The decomposition fails in double precision too.
    """
    for dtype in (matrix.dtype, torch.float64):
        try:
            u, s, vh = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        except RuntimeError:
            continue
        if all_finite([u, vh]):
            return u.to(matrix.dtype), s.to(matrix.dtype), vh.mT.to(matrix.dtype)
    raise ValueError("a matrix has no singular vectors that are finite")


def eigenbasis(matrix: Tensor, previous: Tensor | None = None) -> Factorization:
    """Eigenvectors and eigenvalues (clamped at zero) of symmetric blocks.

    Args:
        matrix: (groups, n, n).
        previous: Eigenvectors to keep where the decomposition fails.

    Returns:
        Eigenvectors with their spectrum and the number of failed attempts. With fallen-back
        eigenvectors the spectrum is the diagonal of the matrix in that basis.
    """
    failures = 0
    sound = finite_blocks(matrix)
    if bool(sound.any()) and not bool(sound.all()):
        found = eigenbasis(_where(sound, matrix, _eye_like(matrix)), previous)
        rest = eigenbasis(_where(sound, torch.full_like(matrix, torch.nan), matrix), previous)
        assert found.spectrum is not None and rest.spectrum is not None
        spectrum = torch.where(sound[:, None], found.spectrum, rest.spectrum)
        values = _where(sound, found.values, rest.values)
        return Factorization(values, spectrum, 0.0, found.failures + rest.failures)
    if bool(sound.all()):
        for dtype in (matrix.dtype, torch.float64):
            try:
                values, vectors = torch.linalg.eigh(matrix.to(dtype))
            except RuntimeError:
                failures += 1
                continue
            if all_finite([vectors]):
                spectrum = values.clamp_min(0).to(matrix.dtype)
                return Factorization(vectors.to(matrix.dtype), spectrum, 0.0, failures)
            failures += 1
    else:
        failures += 1
        matrix = torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
    basis = previous if previous is not None else _eye_like(matrix).clone()
    turned = basis.transpose(-1, -2) @ matrix @ basis
    spectrum = turned.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    return Factorization(basis, spectrum, 0.0, failures)


class Eigenbases:
    """Eigenbases that are computed once: layers that read the same input have the same factor.

    One is meant for one step. Matrices count as the same if all their entries are.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[Tensor, Factorization]]] = {}

    def of(self, matrix: Tensor, previous: Tensor | None = None) -> Factorization:
        """:func:`eigenbasis`, found again where it is known."""
        key = (matrix.shape, matrix.dtype, matrix.device, float(matrix.diagonal(0, -2, -1).sum()))
        alike = self._known.setdefault(key, [])
        for known, found in alike:
            if torch.equal(known, matrix):
                return found
        found = eigenbasis(matrix, previous)
        if not found.failures:  # else it may depend on what was there before
            alike.append((matrix, found))
        return found


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Blocks of one where they are chosen, else of the other."""
    return torch.where(chosen[:, None, None], one, other)


def _last_resort(
    matrix: Tensor, previous: Tensor | None, damping: Tensor, failures: int
) -> Factorization:
    kept = previous if previous is not None else _eye_like(matrix).clone()
    return Factorization(kept, None, float(damping.max()), failures)
