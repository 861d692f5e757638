"""Functions of symmetric matrices, by their eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ocnopt.errors import NonFiniteError
from ocnopt.finite import all_finite

__all__ = ["absolute", "eigenvalues", "positive_part"]


def absolute(k: Tensor, where: str) -> Tensor:
    """The matrices with the absolute values of their eigenvalues.

    Args:
        k: (B, n, n), symmetric.
        where: What they are, for the error.

    Raises:
        NonFiniteError: They are not finite.
    """
    if not bool(torch.linalg.cholesky_ex(k).info.any()):
        return k  # positive already, and that is far cheaper to see
    return _rebuilt(k, torch.abs, where)


def positive_part(k: Tensor, where: str) -> Tensor:
    """The matrices without their negative eigenvalues; arguments as in :func:`absolute`."""
    return _rebuilt(k, lambda values: values.clamp_min(0), where)


def _rebuilt(k: Tensor, change: Callable[[Tensor], Tensor], where: str) -> Tensor:
    values, vectors = eigenvalues(k, where)
    out: Tensor = (vectors * change(values).unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return out.to(k.dtype)


def eigenvalues(k: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, in double precision: in single LAPACK fails where ranks do.

    Raises:
        NonFiniteError: The matrices are not finite.
    """
    if not all_finite([k]):
        raise NonFiniteError(
            f"{where} is not finite; no weight was changed. Skip this batch, lower the learning "
            "rate, or look for a division or logarithm of zero"
        )
    found = torch.linalg.eigh(k.double())
    return found[0], found[1]
