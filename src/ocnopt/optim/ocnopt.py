"""OCNOpt: one optimizer for chains, branches and Neural ODEs, each by its rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ocnopt.control.players import find_solved
from ocnopt.curvature import Preconditioner
from ocnopt.curvature.kronecker import EKFAC
from ocnopt.optim.dgnopt import DGNOpt
from ocnopt.optim.groups import resolve
from ocnopt.optim.solving import SolvingOptimizer, require_sample_step

__all__ = ["OCNOpt"]


class OCNOpt(SolvingOptimizer, DGNOpt):
    """Optimal Control Theoretic Neural Optimizer (Liu, Chen & Theodorou, arXiv 2510.14168).

    Looks at the model and treats every part by the rule that was made for it; :meth:`coverage`
    says which part got which:

    - layers in a row, each a stage of its own: ``DDPNOpt``'s feedback;
    - stages where several layers act, on skips and branches: ``DGNOpt``'s, jointly under a
      Kronecker M;
    - layers of an ``ocnopt.ode.NeuralODE``: ``SNOpt``'s second-order adjoint.

    Feedback passes through a Neural ODE: layers after one answer what layers before it have done.
    What the Neural ODE's own layers do is not answered in the same step, and they answer nothing:
    one weight for all times leaves no time to answer at.

    On a model without Neural ODEs it is ``DGNOpt``, on a chain therefore ``DDPNOpt``.

    Args:
        model: Any ``nn.Module``.
        criterion: The module that the training loop calls on the model's output.
        lr: Learning rate.
        solved: The rule for layers of Neural ODEs that no group of ``params`` names: an ``EKFAC``
            with ``SNOpt``'s defaults unless given.
        sample_step: Time between two points at which the adjoint is looked at, as in ``SNOpt``.
        params: Parameter groups, as in ``DDPNOpt``.
        **options: Those of ``DGNOpt``: information, alignment, preconditioner, bellman, ...

    Raises:
        OptionError: An option that is unknown or out of range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> optimizer = OCNOpt(model, criterion, lr=0.1)
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
        solved: str | dict[str, Any] | Preconditioner | None = None,
        sample_step: float = 0.01,
        params: Any = None,
        **options: Any,
    ) -> None:
        self.sample_step = require_sample_step(sample_step)
        if solved is None:
            solved = EKFAC(damping=0.05, decay=0.0, update_every=100)
        if isinstance(model, nn.Module):
            params = _with_solved(getattr(model, "_orig_mod", model), params, solved)
        super().__init__(model, criterion, lr=lr, params=params, **options)


def _with_solved(model: nn.Module, params: Any, rule: str | dict[str, Any] | Preconditioner) -> Any:
    """Groups with one more: the Neural ODEs' layers that are in none."""
    layers: list[Tensor] = [p for player in find_solved(model) for p in player.params]
    if not layers:
        return params
    entries = [] if params is None else [params] if isinstance(params, (str, dict)) else [*params]
    named = {
        id(p)
        for entry in entries
        if isinstance(entry, dict) and "params" in entry
        for p in resolve(model, entry["params"])
    }
    left = [p for p in layers if id(p) not in named]
    return [*entries, {"params": left, "preconditioner": rule}] if left else params
