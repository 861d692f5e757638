"""The backward recursion of the value function, as coefficients of ordinary back-propagation.

With P the back-propagated columns of the terminal factor, every quantity of the linearised
Bellman pass is P times small coefficients: ``V_x = P v``, ``V_xx = P K P^T``, ``Q_u = P_u v'``,
``Q_ux = P_u K' P_x^T`` (primes: the values at the player's output). Pulling the value back through
a player changes v and K alone, by its Gram matrix ``S = P_u^T Q_uu^-1 P_u``.

At rank one (P the ordinary gradient) v and K are scalars per sample, shapes (B,); else (B, r) and
(B, r, r).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PROPORTIONAL", "RECURSIONS", "pull_back", "pull_back_all", "pull_back_joint"]

RECURSIONS = ("share", "sample", "joint", "literal", "off")

#: Recursions that shrink v and K by the same positive factor at rank one.
PROPORTIONAL = ("share", "sample", "off")


def pull_back(
    rule: str, v: Tensor, k: Tensor, s: Tensor, share: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Value coefficients at a player's input from those at its output.

    Args:
        rule: ``share``: ``Q_uu = M / (eta w) + q_u q_u^T`` with w the sample's weight in the
            objective (1/B for a mean); ``sample``: the same with w = 1; ``literal``: Eq. 5 with
            ``Q_uu = M / eta``.
        v: (B,) or (B, r).
        k: (B,) or (B, r, r).
        s: Gram matrix, (B,) or (B, r, r).
        share: w, a number or (B,).

    Returns:
        The pair (v, K), same shapes.
    """
    if rule == "share":
        s = s * (share if isinstance(share, float) or v.dim() == 1 else share[:, None, None])
    if v.dim() == 1:
        if rule == "literal":
            shrink = 1 - k * s
            return v * shrink, k * shrink
        grow = 1 + k * s
        return v / grow, k / grow
    ks = k @ s
    if rule == "literal":
        return v - (ks @ v.unsqueeze(-1)).squeeze(-1), k - ks @ k
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    both, info = torch.linalg.solve_ex(eye + ks, torch.cat([v.unsqueeze(-1), k], -1))
    # A singular matrix is overflow here; as NaN it becomes the error that names the layer.
    both = both.masked_fill_((info != 0)[:, None, None], torch.nan)
    return both[..., 0], both[..., 1:]


def pull_back_joint(v: Tensor, k: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """The stacked-batch form ``V_x = Q_x + Q_ux^T k``, ``V_xx = Q_xx``.

    Args:
        v: (B,) or (B, r).
        k: (B,) or (B, r, r).
        moved: ``P_u^T k`` with the batch's open-loop step k, (B,) or (B, r).

    Returns:
        The pair (v, K), same shapes.
    """
    if v.dim() == 1:
        return v + k * moved, k
    return v + (k @ moved.unsqueeze(-1)).squeeze(-1), k


def pull_back_all(v: Tensor, k: Tensor, s: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rank one, all players at once: ``v_t = v_T / (1 + K_T sum_{tau >= t} s_tau)``, K likewise.

    Args:
        v: v_T, (B,).
        k: K_T, (B,).
        s: Gram numbers times the sample's share, of every player but the first, (B, T - 1).

    Returns:
        The pair (v, K) at the output of every player, first to last.
    """
    later = s.flip(1).cumsum(1)  # column j: the last j + 1 players
    shrink = later.mul_(k.unsqueeze(1)).add_(1).reciprocal_().t()
    both = torch.stack([v, k]).unsqueeze(1) * shrink  # (2, T - 1, B)
    vs, ks = both[0].unbind(0), both[1].unbind(0)
    return [*zip(vs[::-1], ks[::-1], strict=True), (v, k)]
