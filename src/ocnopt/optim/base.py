"""What all model-first optimizers share: groups, recording, safety, coverage, checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, overload

import torch
from torch import Tensor, nn

from ocnopt.control.players import Player, Unowned, find_players
from ocnopt.control.record import Recorder
from ocnopt.control.replay import without_autocast
from ocnopt.control.turns import Mover
from ocnopt.curvature import Preconditioner, preconditioner
from ocnopt.errors import NonFiniteError, OcnoptError, OptionError
from ocnopt.finite import all_finite
from ocnopt.layers import Params
from ocnopt.optim.groups import resolve, resolve_groups
from ocnopt.optim.parallel import processes, sum_over
from ocnopt.real import is_scalar, plain

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


class ModelOptimizer(torch.optim.Optimizer, ABC):
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
        self._group_key: list[tuple[int, int]] = []
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._built: dict[int, tuple[dict[str, Any], Preconditioner]] = {}
        self._frozen: set[Tensor] = set()
        super().__init__(resolve_groups(self.model, params), plain(defaults))
        self._frozen = {p for p in self.model.parameters() if not p.requires_grad}
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
        group = plain(param_group)
        known = {"params", "initial_lr", "name", "betas"} | self.defaults.keys()
        unknown = group.keys() - known
        if unknown:
            raise OptionError(
                f"params: a group has no option {sorted(unknown)[0]!r}; choose from "
                f"{', '.join(self.defaults)}"
            )
        group["params"] = resolve(self.model, group["params"])
        if "preconditioner" in group:
            group["preconditioner"] = preconditioner(group["preconditioner"]).options()
        else:
            group["preconditioner"] = dict(self.defaults["preconditioner"])
        if "betas" in group["preconditioner"]:
            group.setdefault("betas", tuple(group["preconditioner"]["betas"]))
        # A frozen parameter waits in the group it was given first; unfrozen, it may be moved.
        moved = self._frozen.intersection(group["params"])
        for other in self.param_groups:
            if moved and any(p in moved for p in other["params"]):
                other["params"] = [p for p in other["params"] if p not in moved]
        self._frozen -= moved
        super().add_param_group(group)
        self._check_groups()

    def _check_groups(self) -> None:
        for i, group in enumerate(self.param_groups):
            where = f"parameter group {i}: " if len(self.param_groups) > 1 else ""
            for option in ("lr", "momentum", "weight_decay", "feedback_clip"):
                value = group[option]
                none = value is None and option == "feedback_clip"
                _check(where, option, value, is_scalar(value) or none, "a number")
            rate = float(group["lr"])
            _check(where, "lr", group["lr"], 0 <= rate < math.inf, "finite and at least 0")
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
            if mine and len({float(g["lr"]) for g in mine}) > 1 and self._build(mine[0]).factored:
                raise OptionError(
                    f"layer {player.name!r} has its weight and bias in groups with different "
                    f"learning rates, which {mine[0]['preconditioner']['name']!r} cannot take "
                    "apart; give both the same"
                )

    def _group_of(self) -> dict[Tensor, dict[str, Any]]:
        """The group of every parameter; groups are replaced when a state is loaded."""
        key = [(id(group), len(group["params"])) for group in self.param_groups]
        if key != self._group_key:
            self._group_key = key
            self._groups = {p: group for group in self.param_groups for p in group["params"]}
        return self._groups

    def _build(self, group: dict[str, Any]) -> Preconditioner:
        options = group["preconditioner"]
        if "betas" in options and "betas" in group:
            betas = group["betas"]
            options = {**options, "betas": tuple(betas) if isinstance(betas, Iterable) else betas}
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
        """Perform one step; factors and solves keep their precision inside an autocast.

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
        with torch.no_grad(), without_autocast():
            self._step()
        return loss

    @abstractmethod
    def _step(self) -> None:
        """Change the weights; gradients and autocast are off."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the passes that made them."""
        super().zero_grad(set_to_none)
        if self.recorder is not None:
            self.recorder.forget()

    def detach(self) -> None:
        """Take every hook off the model; the optimizer cannot step with feedback after that."""
        if self.recorder is not None:
            self.recorder.remove()

    def _require_finite_losses(self, losses: list[Tensor]) -> None:
        """Raise unless every recorded loss is finite, on every process."""
        ok = all(math.isfinite(x) for loss in losses for x in loss.flatten().tolist())
        if not self._all_agree(ok):
            self._refuse([])

    def _all_agree(self, ok: bool) -> bool:
        """Whether ``ok`` holds on every process."""
        if processes() == 1:
            return ok
        device = self.param_groups[0]["params"][0].device
        (bad,) = sum_over((torch.tensor([0.0 if ok else 1.0], device=device),))
        return float(bad) == 0

    def _apply(self, movers: Sequence[Mover], deltas: list[Params]) -> None:
        """Add the updates and keep the movers' new state, unless an update is not finite."""
        params = [p for mover in movers for p in mover.params]
        changes = [d for delta in deltas for d in delta]
        if not params:
            return
        if not self._all_agree(all_finite(changes)):
            self._refuse([p for p, d in zip(params, changes, strict=True) if not all_finite([d])])
        torch._foreach_add_(params, changes)
        for mover in movers:
            for p, state in zip(mover.params, mover.states, strict=True):
                if state:
                    self.state[p] = state

    def _states(self, params: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Shallow copies of the state, to be put back by :meth:`_apply`."""
        return [dict(self.state[p]) if p in self.state else {} for p in params]

    def _refuse(self, updates: list[Tensor]) -> NoReturn:
        """Say what is not finite, the gradient closest to the loss or else the update."""
        if self.recorder is not None:
            self.recorder.clear()
        names: dict[Tensor, str] = {p: n for n, p in self.model.named_parameters()}
        graded = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        bad = [p for p in graded if p.grad is not None and not all_finite([p.grad])]
        if not bad and updates:
            raise NonFiniteError(
                f"the update of {names.get(updates[0], '?')!r} is not finite; no weight was "
                "changed. Lower the learning rate, set feedback_clip, or raise the "
                "preconditioner's damping"
            )
        where = f"the gradient of {names.get(bad[-1], '?')!r}" if bad else "the loss"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise NonFiniteError(
            f"{where}{more} is not finite; no weight was changed. Skip this batch, lower the "
            "learning rate, or look for a division or logarithm of zero in the model"
        )

    # what is covered

    def coverage(self) -> list[Coverage]:
        """One row per trained parameter: how it is treated, and why."""
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        by_id: dict[int, Player | Unowned] = {id(u.param): u for u in self.unowned}
        by_id.update({id(p): player for player in self.players for p in player.params})
        rows = []
        for name, param in self.model.named_parameters():
            if id(param) not in owned or not param.requires_grad:
                continue
            entry = by_id.get(id(param))
            module, _, _ = name.rpartition(".")
            if isinstance(entry, Player):
                reason = self._reasons.get(entry, "")
                rule = self._build(self._group_of()[param])
                if not reason and rule.factored and not entry.layer.kronecker:
                    reason = "no Kronecker factors: M = I"
                treatment = "player" if self._is_player(entry) else "first-order"
                rows.append(Coverage(name, module, entry.layer.kind, treatment, reason))
            elif entry is not None:
                rows.append(Coverage(name, module, entry.kind, "first-order", entry.reason))
            else:
                why = "unfrozen since the optimizer was built; build it anew for feedback"
                rows.append(Coverage(name, module, "?", "first-order", why))
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
        self._group_key = []
        if self.recorder is not None:
            self.recorder.clear()


def _check(where: str, option: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise OptionError(f"{where}{option}={value!r}, but it must be {wanted}")
