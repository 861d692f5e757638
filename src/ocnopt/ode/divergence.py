"""The divergence of a vector field: exact, or estimated along one random direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DIVERGENCES", "WithDivergence", "exact_divergence", "hutchinson_divergence"]

#: How a divergence may be computed.
DIVERGENCES = ("exact", "hutchinson")


def exact_divergence(f: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """``sum_i dF_i/dx_i``: one vector-Jacobian product per dimension.

    Args:
        f: F at x, computed from it: (B, d), a sample's row from its row of x alone.
        x: Points (B, d) that require a gradient.
        create_graph: Whether the result can be differentiated.

    Returns:
        (B,).
    """
    found = f.new_zeros(len(f))
    for i, row in enumerate(torch.eye(f.shape[1], dtype=f.dtype, device=f.device)):
        found = found + _pulled_back(f, x, row.expand_as(f), create_graph)[:, i]
    return found


def hutchinson_divergence(
    f: Tensor, x: Tensor, noise: Tensor, *, create_graph: bool = False
) -> Tensor:
    """``e^T (dF/dx) e``: one product in all; its mean over noise e is the divergence.

    Args:
        f: F at x, as in :func:`exact_divergence`.
        x: Points (B, d) that require a gradient.
        noise: e (B, d), of mean zero and covariance one.
        create_graph: Whether the result can be differentiated.

    Returns:
        (B,).
    """
    return (_pulled_back(f, x, noise, create_graph) * noise).sum(1)


def _pulled_back(f: Tensor, x: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    """``v^T dF/dx`` (B, d); zeros where F does not depend on x."""
    (found,) = torch.autograd.grad(
        f, x, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(x) if found is None else found


class WithDivergence(nn.Module):
    """``d(z, l)/dt = (F(t, z), -div F(t, z))``: a point, and the log-density that it carries along.

    The noise belongs to this object, and a solve's backward pass calls the object that the forward
    pass called: both see the same noise, whatever was drawn in between.

    Args:
        func: F, called as ``func(t, z)``.
        noise: e (B, d) of Hutchinson's estimate; None for the exact divergence.
    """

    def __init__(self, func: nn.Module, noise: Tensor | None = None) -> None:
        super().__init__()
        self.func = func
        self.noise = noise

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Slopes of z (B, d) and of l (B,).

        They are differentiable once more unless gradients are switched off.
        """
        wanted = torch.is_grad_enabled()
        z = state[0]
        with torch.enable_grad():  # the divergence itself is made of derivatives
            z = z if z.requires_grad else z.detach().requires_grad_()
            f: Tensor = self.func(t, z)
            if not f.requires_grad:  # a field of the time alone
                return f, z.new_zeros(len(z))
            if self.noise is None:
                divergence = exact_divergence(f, z, create_graph=wanted)
            else:
                divergence = hutchinson_divergence(f, z, self.noise, create_graph=wanted)
        return (f, -divergence) if wanted else (f.detach(), -divergence.detach())
