"""What the optimizers that run the batch themselves have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.control.chain import Chain
from ocnopt.control.terminal import Criterion
from ocnopt.errors import NonFiniteError, OcnoptError, OptionError
from ocnopt.finite import all_finite
from ocnopt.optim.groups import resolve, resolve_groups
from ocnopt.optim.parallel import processes
from ocnopt.real import is_scalar, plain

__all__ = ["BatchOptimizer", "is_count", "is_number", "require", "require_finite"]


class BatchOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step takes a batch: ``loss = optimizer.step(x, y)``.

    Args:
        model: The model, or what ``torch.compile`` made of it.
        criterion: Called as ``criterion(output, *targets)``.
        defaults: Options of the parameter groups.
        params: Groups by name, prefix, module or parameter; see ``optim.groups``.

    Raises:
        OptionError: An option or a group that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        defaults: dict[str, Any],
        params: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"model: expected an nn.Module, got {type(model).__name__}; pass the model itself "
                "rather than model.parameters()"
            )
        if not callable(criterion):
            raise OptionError(
                f"criterion: expected a loss function, got {type(criterion).__name__}; pass what "
                "gives the loss as criterion(model(x), y)"
            )
        # A model that was wrapped by torch.compile runs its original's layers.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.criterion = criterion if isinstance(criterion, nn.Module) else Criterion(criterion)
        super().__init__(resolve_groups(self.model, params), defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled: the optimizer belongs to one model.

        Raises:
            OcnoptError: Always.
        """
        raise OcnoptError(
            f"{type(self).__name__} cannot be copied or pickled, as it is tied to its model; build "
            "a new one on the copied model and load_state_dict(old.state_dict())"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``params`` may be names, prefixes or modules.

        Raises:
            OptionError: An option out of range or an unknown name.
        """
        unknown = param_group.keys() - {"params", "initial_lr", "name"} - self.defaults.keys()
        if unknown:
            raise OptionError(
                f"params: a group has no option {sorted(unknown)[0]!r}; choose from "
                f"{', '.join(self.defaults)}"
            )
        group = plain({**self.defaults, **param_group})
        self._check_group(group)
        group["params"] = resolve(self.model, group["params"])
        super().add_param_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise OptionError where a group's option is out of range."""
        for option in ("lr", "weight_decay"):
            require(option, group[option], is_number(group[option]), "finite and at least 0")

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """The group of every parameter."""
        return {p: group for group in self.param_groups for p in group["params"]}

    def step(self, inputs: Any = None, *targets: Any) -> Tensor:  # type: ignore[override]
        """Improve the weights on a batch.

        Args:
            inputs: The batch: what the model is called on; a tuple is taken for several arguments.
            *targets: What the criterion is called on behind the model's output.

        Returns:
            The loss before the step, detached.

        Raises:
            NonFiniteError: With the layer at which it began; no weight or buffer was changed.
            GraphError: The model is no chain, or too large.
        """
        name = type(self).__name__
        if inputs is None or callable(inputs):
            raise OptionError(
                f"step: {name} runs the batch itself, without backward(); call "
                "loss = optimizer.step(x, y)"
            )
        if processes() > 1:
            raise OcnoptError(
                f"{name} works on one batch on one process; its weights would differ between the "
                f"{processes()} processes here. Use DDPNOpt, or one process"
            )
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        before = [(b, b.clone()) for b in self.model.buffers()]
        try:
            with torch.no_grad():
                loss = self._step(args, targets)
            torch.clear_autocast_cache()  # it holds casts of the old weights
            return loss
        except Exception:
            with torch.no_grad():
                for buffer, kept in before:  # running statistics of a batch that was refused
                    buffer.copy_(kept)
            raise

    @abstractmethod
    def _step(self, args: tuple[Any, ...], targets: tuple[Any, ...]) -> Tensor:
        """Improve the weights; the loss before."""

    def _loss(self, output: Any, targets: tuple[Any, ...]) -> Tensor:
        loss: Tensor = self.criterion(output, *targets)
        if loss.numel() != 1:
            raise OptionError(
                f"criterion: it returned a tensor of shape {tuple(loss.shape)} where the loss must "
                "be one number; use reduction='mean' or 'sum'"
            )
        return loss.reshape(())


def require_finite(chain: Chain, loss: Tensor) -> None:
    """Raise unless the loss is finite, naming the first layer whose input or output is not."""
    if bool(loss.isfinite()):
        return
    for link in chain.links:
        for what, tensor in (("input", link.x), ("output", link.h)):
            if not all_finite([tensor]):
                raise NonFiniteError(
                    f"the {what} of layer {link.player.name!r} is not finite, and so the loss; no "
                    "weight was changed. Skip this batch, or look for what made it"
                )
    raise NonFiniteError(
        f"the loss is not finite, though the output of layer {chain.links[-1].player.name!r} is; "
        "no weight was changed. Skip this batch, or look at the operations behind that layer, at "
        "the criterion and at the targets"
    )


def is_number(value: object) -> bool:
    """Whether it is a finite number that is not negative."""
    return is_scalar(value) and 0 <= float(value) < math.inf


def is_count(value: object) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def require(option: str, value: object, ok: bool, wanted: str) -> None:
    """Raise OptionError unless ok."""
    if not ok:
        raise OptionError(f"{option}={value!r}, but it must be {wanted}")
