"""DDPNOpt (Liu, Chen & Theodorou, ICLR 2021) in the ordinary training loop."""

from __future__ import annotations

from typing import Any

from torch import nn

from ocnopt.curvature import Preconditioner
from ocnopt.optim.feedback import FeedbackOptimizer

__all__ = ["DDPNOpt"]


class DDPNOpt(FeedbackOptimizer):
    """Differential dynamic programming neural optimizer.

    Every layer is a stage of an optimal-control problem and its update a feedback policy:

        theta_t <- theta_t - eta M_t^-1 (1/B) sum_i P_u^(i) [ v^(i) + clip(K^(i) rho^(i)) ]

    with the value function pulled back from the terminal cost (v, K) and rho the change of the
    sample's cost that the updates of earlier layers have already caused. With ``bellman="off",
    rollout="off"`` it is the optimizer that lends M, step for step. Sources: the paper's Eq. 5,
    12, 16, 17, Table 2 and Algorithm 3.

    Args:
        model: Any ``nn.Module``; its layers are recorded by hooks, its code is not changed.
        criterion: The module that the training loop calls on the model's output; its curvature is
            the terminal cost's. Wrap a function as ``ocnopt.Criterion(function)``.
        lr: Learning rate eta.
        preconditioner: M: "identity", "rmsprop", "adam", "kfac", "ekfac", or an object of
            ``ocnopt.curvature`` with options of its own.
        bellman: How the value is pulled back through a player: "share", "sample", "joint",
            "literal" (Eq. 5 as printed) or "off" (the value is the gradient).
        rollout: Where the state differential comes from: "linear", "nonlinear" (the paper's
            second forward pass) or "off" (no feedback).
        terminal: Hessian of the terminal cost: "bounded" (rank one with the true curvature along
            the gradient, but enough to promise no loss below zero; the default with a criterion),
            "matched" (the true curvature alone), "outer-product" (rank one as in Prop. 3; the
            default without a criterion), "gauss-newton" (exact, rank r), "full" (V_xx as a matrix
            per sample, for chains: "gauss-newton", as value_reg and dynamics_order need it).
        feedback_clip: Bound on a sample's feedback relative to its open-loop term, and on what it
            may add to an entry that an adaptive M was built from; None for none.
        value_reg: Tikhonov term on V_xx at the input of every layer (Algorithm 3, line 12); needs
            ``terminal="full"``.
        dynamics_order: 2 keeps the second derivatives of the dynamics (Eq. 26, "DDPNOpt2nd");
            needs ``terminal="full"`` and a chain of Linear and convolution layers.
        momentum: As in ``torch.optim.SGD``, on the preconditioned direction.
        weight_decay: L2 penalty, placed as in the optimizer that lends M.
        reduction: How the criterion reduces over samples, "mean" or "sum"; read off the criterion
            where it says so.
        curvature: What M is built from: "gradient" (J_u and J_h, as the lender does) or "value"
            (Q_u and V_h, as in Table 2: an adaptive M then normalizes away what the value function
            holds back).
        measure_every: Measure the actual decrease on the same batch every so many steps, at the
            cost of a forward pass; 0 for never.
        keep_grad: Whether ``.grad`` is filled as the loop expects. If not, a step saves one weight
            gradient per layer and the memory for it, but clipping, a ``GradScaler`` and data
            parallelism, which work on ``.grad``, are not possible.
        keep_policy: Whether the policies of the last step stay at hand as ``optimizer.policy``, at
            the cost of that step's activations and a copy of the weights.
        params: Parameter groups by name, prefix, module or parameter, with options of their own;
            what no group names gets the constructor's.

    Raises:
        OptionError: An option that is unknown or out of range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> optimizer = DDPNOpt(model, criterion, lr=0.1)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> optimizer.zero_grad()
        >>> criterion(model(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None = None,
        *,
        lr: float,
        preconditioner: str | Preconditioner = "identity",
        bellman: str = "share",
        rollout: str = "linear",
        terminal: str | None = None,
        feedback_clip: float | None = 1.0,
        value_reg: float = 0.0,
        dynamics_order: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        reduction: str = "mean",
        curvature: str = "gradient",
        measure_every: int = 0,
        keep_grad: bool = True,
        keep_policy: bool = False,
        params: Any = None,
    ) -> None:
        if terminal is None:
            terminal = "outer-product" if criterion is None else "bounded"
        super().__init__(
            model,
            criterion,
            lr=lr,
            rule=preconditioner,
            bellman=bellman,
            rollout=rollout,
            terminal=terminal,
            feedback_clip=feedback_clip,
            value_reg=value_reg,
            dynamics_order=dynamics_order,
            momentum=momentum,
            weight_decay=weight_decay,
            reduction=reduction,
            measure_every=measure_every,
            params=params,
            keep_grad=keep_grad,
            keep_policy=keep_policy,
            curvature=curvature,
        )
