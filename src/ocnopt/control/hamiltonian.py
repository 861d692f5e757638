"""Co-states and the augmented Hamiltonian of a chain (DDPNOpt paper, appendix A.1).

The state is that of the whole batch, one row per sample, and a co-state has its shape. Row i of
``p_t`` is the gradient of sample i's own cost, so that sums over rows carry the sample's weight w:
1/B for a criterion that is a mean, 1 for a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ocnopt.control.chain import Chain, Link
from ocnopt.layers.base import Params

__all__ = ["AugmentedHamiltonian", "costates", "gradient"]


def costates(chain: Chain, end: Tensor) -> list[Tensor | None]:
    """Solve the adjoint equation ``p_t = grad_x H_t(x_t, p_{t+1}, u_t)`` (Eq. 19b).

    Args:
        chain: The network at a batch.
        end: ``p_T``, shaped as the network's output.

    Returns:
        ``p_0`` to ``p_T``, each shaped as its state; ``p_0`` is None where the first layer reads
        integers (an embedding).
    """
    found: list[Tensor | None] = [end]
    p = end
    for link in reversed(chain.links):
        if not link.x.is_floating_point():
            found.append(None)
            break  # it is the first: what a layer makes has a derivative
        with torch.enable_grad():
            x = link.x.detach().requires_grad_()
            transported = (p * link.f(x, tuple(q.detach() for q in link.player.params))).sum()
        (p,) = gradient(transported, (x,))
        found.append(p)
    return found[::-1]


@dataclass
class AugmentedHamiltonian:
    """Eq. 23 of one stage as a function of its control, from the trajectory as it was.

        w sum_i [ p'^T f(x, u) + rho/2 |x' - f(x, u)|^2 + rho/2 |p - grad_x H(x, p', u)|^2 ] + l(u)

    The paper prints the norms without their squares; Li et al. (2017) square them, and so does
    this. ``H = l + p'^T f`` is minimized (Eq. 20 and 24). The running cost ``l(u) = decay/2 |u|^2``
    is counted once for the batch, as torch counts weight decay, and has no gradient in x.

    Attributes:
        link: The stage t.
        after: ``x_{t+1}`` as recorded, (B, *).
        p: ``p_t``; None drops the last norm.
        p_after: ``p_{t+1}``, (B, *).
        weight: w.
        rho: Weight of both norms.
        decays: Weight decay of each of the player's parameters.
    """

    link: Link
    after: Tensor
    p: Tensor | None
    p_after: Tensor
    weight: float
    rho: float
    decays: tuple[float, ...]

    def __call__(self, u: Params) -> Tensor:
        """Its value, differentiable in u.

        Args:
            u: Aligned with the player's parameters.
        """
        costate = self.p if self.rho else None
        with torch.enable_grad():
            x = self.link.x.detach().requires_grad_(costate is not None)
            y = self.link.f(x, u)
            transported = (self.p_after * y).sum()
            total = transported
            if self.rho:
                total = total + self.rho / 2 * (self.after - y).square().sum()
            if costate is not None:
                (slope,) = gradient(transported, (x,), create_graph=True)
                total = total + self.rho / 2 * (costate - slope).square().sum()
            total = self.weight * total
            for part, decay in zip(u, self.decays, strict=True):
                if decay:
                    total = total + decay / 2 * part.square().sum()
        return total

    def closure(self, u: Params) -> Callable[[], Tensor]:
        """A function for ``torch.optim``: the value, with its gradient left in ``.grad``.

        Args:
            u: Leaves.
        """

        def evaluate() -> Tensor:
            value = self(u)
            for part, slope in zip(u, gradient(value, u), strict=True):
                part.grad = slope.contiguous()  # L-BFGS strings views together
            return value.detach()

        return evaluate


def gradient(value: Tensor, of: tuple[Tensor, ...], create_graph: bool = False) -> Params:
    """Gradients of a number, dense, with zeros where it does not depend on a tensor."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(x) for x in of)
    found = torch.autograd.grad(
        value, of, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return tuple(g.to_dense() if g.is_sparse else g for g in found)
