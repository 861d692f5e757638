"""SNOpt: second-order training of Neural ODEs by the low-rank second-order adjoint."""

from __future__ import annotations

from typing import Any

from torch import nn

from ocnopt.curvature import kronecker
from ocnopt.errors import OptionError
from ocnopt.optim.solving import SolvingOptimizer, require_sample_step

__all__ = ["SNOpt"]


class SNOpt(SolvingOptimizer):
    """Second-order Neural Optimizer (Liu, Chen & Theodorou, NeurIPS 2021).

    The Gauss-Newton terminal cost of rank one makes the second-order adjoint follow the ordinary
    one: ``Q_uu = p p^T`` with ``p = int z (x) g dt`` (methods 4.3, 4.4). Every ``update_every``
    steps the backward solve is looked at every ``sample_step`` in time; the solver's steps and the
    gradient stay what they are. A layer of the vector field, with ``A = mean z z^T`` and
    ``B = sample_step * int E[g g^T] dt``, then moves by

        theta <- theta - eta U_B [ (U_B^T G U_A) / (m2 + damping) ] U_A^T,
        m2 <- eigen_decay m2 + (1 - eigen_decay) N (U_B^T G U_A)^2

    with N samples in the batch, and ``m2`` started from the eigenvalues of ``A (x) B``.

    Args:
        model: Any ``nn.Module`` that holds ``ocnopt.ode.NeuralODE`` blocks.
        lr: Learning rate.
        damping: Added to the eigenvalues.
        update_every: Steps between two updates of the factors and their eigenbasis.
        eigen_decay: Smoothing of the corrected eigenvalues, in [0, 1].
        sample_step: Time between two points at which the adjoint is looked at, in the units of the
            ODE's time. It scales the curvature, too: points in time count as independent. With
            ``adjoint=False`` the solver's own steps are looked at.
        momentum: On the preconditioned direction.
        weight_decay: Added after preconditioning.
        precondition_all: Whether layers outside the Neural ODEs are preconditioned likewise, by
            the factors of an ordinary pass; if not they take gradient steps.
        reduction: Whether the loss is the "mean" or the "sum" over samples.
        params: Parameter groups, as in ``DDPNOpt``. A group with
            ``{"preconditioner": "adam"}`` trains what it names by Adam's rule.

    Raises:
        OptionError: An option out of range, or a model without a Neural ODE.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        damping: float = 0.05,
        update_every: int = 100,
        eigen_decay: float = 0.75,
        sample_step: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        precondition_all: bool = False,
        reduction: str = "mean",
        params: Any = None,
    ) -> None:
        self.precondition_all = precondition_all
        self.sample_step = require_sample_step(sample_step)
        super().__init__(
            model,
            None,
            lr=lr,
            rule=kronecker.EKFAC(
                damping=damping, decay=0.0, update_every=update_every, eigen_decay=eigen_decay
            ),
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

    def _hook(self) -> None:
        if not self._follow().odes:
            raise OptionError(
                "model: it holds no ocnopt.ode.NeuralODE, which SNOpt is for; use EKFAC, or "
                "DDPNOpt or DGNOpt for feedback"
            )
        if self.precondition_all:
            super()._hook()
        else:
            self._reasons = dict.fromkeys(self.players, "outside the Neural ODEs")
