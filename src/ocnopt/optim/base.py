"""What all model-first optimizers share: groups, recording, safety, coverage, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from ocnopt.control.players import Player, Unowned, find_players
from ocnopt.control.record import Recorder
from ocnopt.curvature import Preconditioner, preconditioner
from ocnopt.errors import NonFiniteError, OcnoptError, OptionError
from ocnopt.optim.groups import resolve, resolve_groups
from ocnopt.optim.parallel import processes, sum_over

__all__ = ["Coverage", "ModelOptimizer"]


class Coverage(NamedTuple):
    """How one parameter is treated.

    Attributes:
        parameter: Its name in the model.
        module: The module that owns it.
        kind: The module's kind.
        treatment: "player" (its own stage, with feedback), or "first-order" (the rule that the
            preconditioner reduces to).
        reason: Why it is not a player, or what was left out; empty for a full player.
    """

    parameter: str
    module: str
    kind: str
    treatment: str
    reason: str


class ModelOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that is given the model rather than its parameters.

    Args:
        model: The model, or a wrapper around it.
        defaults: Options of the parameter groups.
        params: Groups by name, prefix, module or parameter; see ``optim.groups``.

    Raises:
        OptionError: An option or a group that cannot be.
    """

    def __init__(self, model: nn.Module, defaults: dict[str, Any], params: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"model: expected an nn.Module, got {type(model).__name__}; pass the model itself "
                "rather than model.parameters()"
            )
        # A model that was wrapped by torch.compile runs its original's layers.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.players, self.unowned = find_players(self.model)
        self.recorder: Recorder | None = None
        self._reasons: dict[Player, str] = {}
        self._built: dict[int, tuple[dict[str, Any], Preconditioner]] = {}
        super().__init__(resolve_groups(self.model, params), defaults)
        self._check_groups()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled: the hooks belong to one model.

        Raises:
            OcnoptError: Always.
        """
        raise OcnoptError(
            f"{type(self).__name__} cannot be copied or pickled, as it is tied to its model by "
            "hooks; build a new one on the copied model and load_state_dict(old.state_dict())"
        )

    # groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``params`` may be names, prefixes or modules.

        Raises:
            OptionError: An option out of range or an unknown name.
        """
        group = dict(param_group)
        group["params"] = resolve(self.model, group["params"])
        if "preconditioner" in group:
            group["preconditioner"] = preconditioner(group["preconditioner"]).options()
        else:
            group["preconditioner"] = dict(self.defaults["preconditioner"])
        super().add_param_group(group)
        self._check_groups()

    def _check_groups(self) -> None:
        for i, group in enumerate(self.param_groups):
            where = f"parameter group {i}: " if len(self.param_groups) > 1 else ""
            _check(where, "lr", group["lr"], group["lr"] >= 0, "at least 0")
            _check(where, "momentum", group["momentum"], 0 <= group["momentum"] < 1, "in [0, 1)")
            decay = group["weight_decay"]
            _check(where, "weight_decay", decay, decay >= 0, "at least 0")
            clip = group["feedback_clip"]
            _check(where, "feedback_clip", clip, clip is None or clip > 0, "positive or None")
        group_of = self._group_of()
        for player in self.players:
            mine = [group_of[p] for p in player.params if p in group_of]
            if len({repr(g["preconditioner"]) for g in mine}) > 1:
                raise OptionError(
                    f"layer {player.name!r} has its weight and bias in groups with different "
                    "preconditioners; give both the same"
                )
            if mine and len({g["lr"] for g in mine}) > 1 and self._build(mine[0]).factored:
                raise OptionError(
                    f"layer {player.name!r} has its weight and bias in groups with different "
                    f"learning rates, which {mine[0]['preconditioner']['name']!r} cannot take "
                    "apart; give both the same"
                )

    def _group_of(self) -> dict[Tensor, dict[str, Any]]:
        return {p: group for group in self.param_groups for p in group["params"]}

    def _build(self, group: dict[str, Any]) -> Preconditioner:
        options = group["preconditioner"]
        known = self._built.get(id(group))
        if known is None or known[0] != options:
            known = self._built[id(group)] = (dict(options), preconditioner(options))
        return known[1]

    # step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step.

        Args:
            closure: Runs the model again and returns the loss (optional, as in torch).

        Raises:
            NonFiniteError: A loss or gradient that is not finite; no weight was changed.
            RecordingError: The pass could not be recorded; see the message.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        raise NotImplementedError  # every subclass has its own

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the passes that made them."""
        super().zero_grad(set_to_none)
        if self.recorder is not None:
            self.recorder.clear()

    def detach(self) -> None:
        """Take every hook off the model; the optimizer cannot step with feedback after that."""
        if self.recorder is not None:
            self.recorder.remove()

    def _require_finite(self, losses: list[Tensor]) -> None:
        """Raise unless every loss and gradient is finite, on every process."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
        ok = all(math.isfinite(x) for loss in losses for x in loss.flatten().tolist())
        if ok and dense:
            ok = math.isfinite(_total_norm(dense))
        if processes() > 1:
            (bad,) = sum_over((torch.tensor([0.0 if ok else 1.0], device=dense[0].device),))
            ok = float(bad) == 0
        if ok:
            return
        if self.recorder is not None:
            self.recorder.clear()
        names: dict[Tensor, str] = {p: n for n, p in self.model.named_parameters()}
        bad_names = [
            names.get(p, "?")
            for g in self.param_groups
            for p in g["params"]
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        where = f"the gradient of {bad_names[-1]!r}" if bad_names else "the loss"
        more = f" (and {len(bad_names) - 1} more)" if len(bad_names) > 1 else ""
        raise NonFiniteError(
            f"{where}{more} is not finite; no weight was changed. Skip this batch, lower the "
            "learning rate, or look for a division or logarithm of zero in the model"
        )

    def _apply(self, params: list[Tensor], deltas: list[Tensor]) -> None:
        """Add the updates, unless one of them is not finite."""
        if not params:
            return
        if not math.isfinite(_total_norm(deltas)):
            names: dict[Tensor, str] = {p: n for n, p in self.model.named_parameters()}
            bad = next(
                names.get(p, "?")
                for p, d in zip(params, deltas, strict=True)
                if not bool(torch.isfinite(d).all())
            )
            raise NonFiniteError(
                f"the update of {bad!r} is not finite; no weight was changed. Lower the learning "
                "rate, set feedback_clip, or raise the preconditioner's damping"
            )
        torch._foreach_add_(params, deltas)

    # what is covered

    def coverage(self) -> list[Coverage]:
        """One row per trained parameter: how it is treated, and why."""
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        by_id: dict[int, Player | Unowned] = {id(u.param): u for u in self.unowned}
        by_id.update({id(p): player for player in self.players for p in player.params})
        rows = []
        for name, param in self.model.named_parameters():
            if id(param) not in owned:
                continue
            entry = by_id.get(id(param))
            module, _, _ = name.rpartition(".")
            if isinstance(entry, Player):
                reason = self._reasons.get(entry, "")
                treatment = "player" if self._is_player(entry) else "first-order"
                rows.append(Coverage(name, module, entry.layer.kind, treatment, reason))
            elif entry is not None:
                rows.append(Coverage(name, module, entry.kind, "first-order", entry.reason))
            else:
                rows.append(
                    Coverage(
                        name, module, "?", "first-order", "trained since the optimizer was built"
                    )
                )
        return rows

    def _is_player(self, player: Player) -> bool:
        return self.recorder is not None and player not in self._reasons

    # checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; every tensor keeps the dtype it was saved in.

        ``torch.optim`` casts floating-point state to the parameter's dtype, which would round the
        factors of a bfloat16 model.
        """
        super().load_state_dict(state_dict)
        saved_groups, saved = state_dict["param_groups"], state_dict["state"]
        for group, now in zip(saved_groups, self.param_groups, strict=True):
            for key, param in zip(group["params"], now["params"], strict=True):
                for name, value in saved.get(key, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][name] = value.detach().to(param.device, copy=True)
        self._built.clear()
        if self.recorder is not None:
            self.recorder.clear()


def _check(where: str, option: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise OptionError(f"{where}{option}={value!r}, but it must be {wanted}")


def _total_norm(tensors: list[Tensor]) -> float:
    """A number that is finite exactly if all entries are (norms in at least single precision)."""
    norms = torch._foreach_norm(tensors, float("inf"))
    return (
        float(torch.stack([n.float() for n in norms]).sum()) if len(norms) > 1 else float(norms[0])
    )
