"""The Hessian of a sample's own cost as a product of factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ocnopt.control.passes import TerminalCall
from ocnopt.control.terminal import TerminalCost
from ocnopt.errors import OptionError
from ocnopt.losses.mmc import REDUCTIONS

__all__ = ["hessian_factor"]


def hessian_factor(
    criterion: nn.Module, output: Tensor, target: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Z with ``Z Z^T`` the Hessian of every sample's own cost ``phi_i`` in its output.

    The loss is the mean (or sum) of the ``phi_i``; under a mean with class weights or ignored
    targets ``phi_i`` is B times the sample's part of the loss. For softmax cross-entropy
    ``Z = diag(sqrt p) - p sqrt(p)^T``, one such block per location; for any other criterion Z comes
    from an eigendecomposition, and where the Hessian is indefinite ``Z Z^T`` is its positive part.

    Args:
        criterion: The loss as a module, twice differentiable in its first argument; a plain
            function is wrapped as ``ocnopt.Criterion(function)``.
        output: The network's output (B, *), n entries per sample; samples come first.
        target: What the criterion is called with besides.
        reduction: "mean", "sum" or "none": how the criterion reduces over samples, where it has
            no attribute ``reduction`` that says so.

    Returns:
        Z (B, n, r), in the output's dtype and without a graph; r = n.

    Raises:
        OptionError: No module, no samples, or an unknown reduction.
        GraphError: More outputs per sample than are supported.

    Example:
        >>> import torch
        >>> z = hessian_factor(torch.nn.CrossEntropyLoss(), torch.zeros(4, 2), torch.ones(4).long())
        >>> (z @ z.mT)[0]
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    if not isinstance(criterion, nn.Module):
        raise OptionError(
            f"criterion: expected an nn.Module, got {type(criterion).__name__}; wrap a plain "
            "function as ocnopt.Criterion(function)"
        )
    if reduction not in REDUCTIONS:
        raise OptionError(
            f"reduction={reduction!r} is not known; choose one of {', '.join(REDUCTIONS)}"
        )
    own = getattr(criterion, "reduction", None)
    reduction = own if own in REDUCTIONS else reduction
    rowless = output.dim() == 1 and isinstance(criterion, nn.CrossEntropyLoss)
    if output.dim() == 0 or output.numel() == 0 or rowless:
        raise OptionError(
            f"output: its shape is {tuple(output.shape)}, but dimension 0 must be that of the "
            "samples; pass a batch, output.unsqueeze(0) for a single sample"
        )
    samples = output.shape[0]
    count = samples if reduction == "mean" else 1
    output = output.detach()
    # The cost looks at the call's arguments only; its value is none of its concern.
    call = TerminalCall(output, (target,), {}, output.new_zeros(()))
    with torch.no_grad():
        columns = TerminalCost(criterion, "gauss-newton").columns(call, samples)
        z = torch.stack([column.reshape(samples, -1) for column in columns], 2)
        return z.mul_(count**0.5)
