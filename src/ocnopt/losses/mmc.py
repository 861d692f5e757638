"""The Max-Mahalanobis center loss: fixed centers, as far from each other as they can be.

Pang et al., "Rethinking softmax cross-entropy loss for adversarial robustness", ICLR 2020
(arXiv 1905.10626); the centers are those of Pang et al., "Max-Mahalanobis linear discriminant
analysis networks", ICML 2018.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ocnopt.errors import OptionError
from ocnopt.real import is_real

__all__ = ["REDUCTIONS", "MMCLoss"]

REDUCTIONS = ("mean", "sum", "none")


class MMCLoss(nn.Module):
    """Half the squared distance to the center of the row's class: ``1/2 |z - mu_y|^2``.

    The centers are the corners of a regular simplex around the origin: ``|mu_l| = radius`` and
    ``<mu_l, mu_m> = -radius^2 / (classes - 1)``. They are not trained. Its Hessian is the identity.

    The paper's constant C_MM is the radius: its authors' code multiplies centers of length one by
    C_MM, and C_MM = 10 in all their experiments. (Where C_MM is meant as ``|mu|^2``, ask for
    ``radius=math.sqrt(C_MM)``.) An output of zero, which is also the best constant one where
    classes are balanced, costs ``radius^2 / 2``.

    Args:
        classes: Number of classes L, at least 2.
        dim: Length of an output row, at least ``classes - 1``; None for ``classes``.
        radius: Distance of every center from the origin.
        reduction: "mean", "sum" or "none", over rows.

    Attributes:
        centers: (classes, dim), a buffer.

    Raises:
        OptionError: An option that cannot be.

    Example:
        >>> import torch
        >>> criterion = MMCLoss(3, radius=2.0)
        >>> criterion(torch.zeros(5, 3), torch.tensor([0, 1, 2, 1, 0]))
        tensor(2.)
        >>> criterion.predict(criterion.centers)
        tensor([0, 1, 2])
    """

    centers: Tensor
    #: So that a terminal cost need not differentiate: a row's Hessian is the identity.
    identity_hessian = True

    def __init__(
        self, classes: int, dim: int | None = None, *, radius: float = 10.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if not _whole(classes) or classes < 2:
            raise OptionError(f"classes={classes!r}, but it must be a whole number, 2 or more")
        dim = classes if dim is None else dim
        if not _whole(dim) or dim < classes - 1:
            raise OptionError(
                f"dim={dim!r}, but the centers of {classes} classes need {classes - 1} dimensions "
                "or more; give the network's last layer that many outputs"
            )
        if not is_real(radius) or not 0 < radius < math.inf:
            raise OptionError(f"radius={radius!r}, but it must be a positive number")
        if reduction not in REDUCTIONS:
            raise OptionError(
                f"reduction={reduction!r} is not known; choose one of {', '.join(REDUCTIONS)}"
            )
        self.classes = classes
        self.dim = dim
        self.radius = float(radius)
        self.reduction = reduction
        self.register_buffer("centers", _simplex(classes, dim, self.radius))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: The network's output (B, dim).
            target: Labels (B,), int64.

        Returns:
            A number, or (B,) where nothing is reduced.

        Raises:
            OptionError: Another shape or dtype, or a label that is no class (on an accelerator
                that last one is the device's own index error, as looking first would wait for it).
        """
        if input.dim() != 2 or input.shape[1] != self.dim:
            raise OptionError(
                f"MMCLoss: the output has shape {tuple(input.shape)}, but the centers ask for "
                f"(B, {self.dim}); give the network {self.dim} outputs, or the loss another dim"
            )
        if target.shape != input.shape[:1] or target.dtype != torch.int64:
            raise OptionError(
                f"MMCLoss: the target is {target.dtype} of shape {tuple(target.shape)}, but it "
                f"must hold int64 labels of shape ({input.shape[0]},)"
            )
        try:
            # index_select has no negative indices: each of them is an error.
            centers = self.centers.index_select(0, target)
        except IndexError:
            raise OptionError(
                f"MMCLoss: a label is out of range; labels run from 0 to {self.classes - 1}, these "
                f"from {int(target.min())} to {int(target.max())}"
            ) from None
        values = (input - centers).square().sum(1) / 2
        if self.reduction == "none":
            return values
        return values.mean() if self.reduction == "mean" else values.sum()

    def predict(self, input: Tensor) -> Tensor:
        """The label of the nearest center.

        Args:
            input: Outputs (..., dim).

        Returns:
            Labels (...), int64.
        """
        # All centers are equally long: the nearest has the largest inner product.
        dtype = torch.promote_types(input.dtype, self.centers.dtype)
        return (input.to(dtype) @ self.centers.to(dtype).t()).argmax(-1)

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"{self.classes}, dim={self.dim}, radius={self.radius:g}, reduction={self.reduction!r}"
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _simplex(classes: int, dim: int, radius: float) -> Tensor:
    """The centers (classes, dim), lower triangular.

    The paper's recursion, counted from one: ``mu_1 = e_1``, and for i > j
    ``mu_i(j) = -(1 / (L-1) + <mu_i, mu_j>) / mu_j(j)``, ``mu_i(i) = sqrt(1 - |mu_i|^2)``. All rows
    below the diagonal agree in a column, so that it has a closed form, which unlike the recursion
    does not lose digits (its last ``sqrt`` is of zero):
    ``mu_j(j)^2 = L (L-j) / ((L-1) (L-j+1))`` and ``mu_i(j) = -mu_j(j) / (L-j)``.
    """
    centers = torch.zeros(classes, dim, dtype=torch.float64)
    for j in range(classes - 1):
        left = classes - 1 - j  # rows below the diagonal
        corner = math.sqrt(classes * left / ((classes - 1) * (left + 1)))
        centers[j, j] = corner
        centers[j + 1 :, j] = -corner / left
    return (centers * radius).to(torch.get_default_dtype())
