"""KFAC and EKFAC as optimizers of their own: the baselines that lend ``M = A (x) B``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ocnopt.curvature import kronecker
from ocnopt.curvature.base import Preconditioner
from ocnopt.optim.feedback import FeedbackOptimizer

__all__ = ["EKFAC", "KFAC"]


class _Factored(FeedbackOptimizer):
    """No Bellman recursion, no feedback: a preconditioned gradient step."""

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        rule: Preconditioner,
        lr: float,
        momentum: float,
        weight_decay: float,
        reduction: str,
        params: Any,
    ) -> None:
        super().__init__(
            model,
            criterion,
            lr=lr,
            rule=rule,
            bellman="off",
            rollout="off",
            terminal="outer-product",
            feedback_clip=None,
            momentum=momentum,
            weight_decay=weight_decay,
            reduction=reduction,
            measure_every=0,
            params=params,
        )


class KFAC(_Factored):
    """Kronecker-factored approximate curvature (Martens & Grosse 2015), empirical Fisher.

        theta <- theta - eta (B + sqrt(damping)/pi I)^-1 G (A + pi sqrt(damping) I)^-1

    with ``A = E[a a^T]``, ``B = locations * E[g g^T]`` over samples and locations (Table 2 of the
    DDPNOpt paper). Layers without Kronecker structure take a gradient step.

    Args:
        model: Any ``nn.Module``.
        criterion: The module the loop calls, so that a loss divided for accumulation is known;
            without it the loss is taken to be the mean over all samples since ``zero_grad``.
        lr: Learning rate.
        damping: Tikhonov damping, in the units of the curvature.
        decay: Smoothing of the factors; 0 takes the current batch's alone.
        update_every: Steps between two updates of the factors and their inverses.
        momentum: On the preconditioned direction.
        weight_decay: Added after preconditioning.
        reduction: "mean" or "sum".
        params: Parameter groups, as in ``DDPNOpt``.

    Raises:
        OptionError: An option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None = None,
        *,
        lr: float,
        damping: float = 0.1,
        decay: float = 0.9,
        update_every: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        reduction: str = "mean",
        params: Any = None,
    ) -> None:
        rule = kronecker.KFAC(damping=damping, decay=decay, update_every=update_every)
        super().__init__(model, criterion, rule, lr, momentum, weight_decay, reduction, params)


class EKFAC(_Factored):
    """KFAC in its eigenbasis with corrected eigenvalues (George et al. 2018).

        theta <- theta - eta U_B [ (U_B^T G U_A) / (m2 + damping) ] U_A^T

    Args:
        model: Any ``nn.Module``.
        criterion: As in :class:`KFAC`.
        lr: Learning rate.
        damping: Added to the eigenvalues.
        decay: Smoothing of the factors; 0 takes the current batch's alone.
        update_every: Steps between two updates of the factors and their eigenbasis.
        eigen_decay: Smoothing of the corrected eigenvalues.
        momentum: On the preconditioned direction.
        weight_decay: Added after preconditioning.
        reduction: "mean" or "sum".
        params: Parameter groups, as in ``DDPNOpt``.

    Raises:
        OptionError: An option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None = None,
        *,
        lr: float,
        damping: float = 0.1,
        decay: float = 0.9,
        update_every: int = 10,
        eigen_decay: float = 0.75,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        reduction: str = "mean",
        params: Any = None,
    ) -> None:
        rule = kronecker.EKFAC(
            damping=damping, decay=decay, update_every=update_every, eigen_decay=eigen_decay
        )
        super().__init__(model, criterion, rule, lr, momentum, weight_decay, reduction, params)
