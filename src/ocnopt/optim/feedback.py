"""Bellman pass, feedback pass and preconditioner as one step of the ordinary training loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ocnopt.control.batch import Batch, gather
from ocnopt.control.chain import require_apart, watch_chain
from ocnopt.control.dense import DenseBatch, dense_batch
from ocnopt.control.dense_sweep import DenseSweep
from ocnopt.control.diagnostics import Diagnostics, Ledger
from ocnopt.control.fictitious import Fictitious
from ocnopt.control.passes import Pass
from ocnopt.control.players import Player
from ocnopt.control.policy import Policies
from ocnopt.control.record import Recorder
from ocnopt.control.replay import run_again
from ocnopt.control.sweep import Sweep
from ocnopt.control.terminal import TerminalCost
from ocnopt.control.turns import Group, Turn
from ocnopt.curvature import Identity, Preconditioner, preconditioner
from ocnopt.errors import GraphError, OptionError, RecordingError
from ocnopt.optim.base import ModelOptimizer
from ocnopt.optim.feedback_options import require_feedback_options
from ocnopt.optim.listeners import Due, Watcher
from ocnopt.optim.mover import ParamMover
from ocnopt.optim.parallel import mean_over, processes, sum_over
from ocnopt.optim.rescaling import loss_unit, measure_scales, unscale
from ocnopt.optim.second_pass import actual_decrease, nonlinear_rollout
from ocnopt.optim.usable import refuse_unused, require_replayable

__all__ = ["FeedbackOptimizer"]


class FeedbackOptimizer(ModelOptimizer):
    """What ``DDPNOpt`` and the optimizers that lend it their preconditioner have in common.

    Args: as in ``DDPNOpt``; ``rule`` is its ``preconditioner``.

    Raises:
        OptionError: An option that is unknown or out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        *,
        lr: float,
        rule: str | Preconditioner,
        bellman: str,
        rollout: str,
        terminal: str,
        feedback_clip: float | None,
        momentum: float,
        weight_decay: float,
        reduction: str,
        measure_every: int,
        params: Any,
        keep_grad: bool = True,
        curvature: str = "gradient",
        value_reg: float = 0.0,
        dynamics_order: int = 1,
        keep_policy: bool = False,
        fictitious: Fictitious | None = None,
    ) -> None:
        require_feedback_options(
            criterion,
            bellman=bellman,
            rollout=rollout,
            terminal=terminal,
            reduction=reduction,
            measure_every=measure_every,
            keep_grad=keep_grad,
            curvature=curvature,
            value_reg=value_reg,
            dynamics_order=dynamics_order,
            keep_policy=keep_policy,
        )
        self.criterion = criterion
        self.bellman = bellman
        self.rollout = rollout
        self.curvature = curvature
        self.value_reg = float(value_reg)
        self.dynamics_order = dynamics_order
        self.keep_policy = keep_policy
        self.fictitious = fictitious
        self._policy: Policies | None = None
        own = getattr(criterion, "reduction", None)
        self.reduction = own if own in ("mean", "sum") else reduction
        self.measure_every = measure_every
        self.keep_grad = keep_grad
        # So that a GradScaler announces itself: its unscaling would not reach the players.
        self._step_supports_amp_scaling = not keep_grad
        self._steps = 0
        self._warned = False
        self._ledger: Ledger | None = None
        feedback = bellman != "off" or rollout != "off"
        self.terminal = TerminalCost(criterion, terminal)
        if not feedback:  # no curvature is asked for, so none is computed
            self.terminal = TerminalCost(None, "outer-product")
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "feedback_clip": feedback_clip,
            "preconditioner": preconditioner(rule).options(),
        }
        betas = defaults["preconditioner"].get("betas")
        if betas is not None:
            # Where torch's schedulers look for Adam's; they cycle "momentum" only without it.
            defaults["betas"] = betas
        self._ready = False
        super().__init__(model, defaults, params)
        self._hook()
        self._ready = True

    @property
    def feedback_on(self) -> bool:
        """Whether the step differs from the lender's."""
        return self.bellman != "off" or self.rollout != "off"

    @property
    def full(self) -> bool:
        """Whether V_xx is kept as a matrix per sample."""
        return self.feedback_on and self.terminal.form == "full"

    @property
    def measures_next(self) -> bool:
        """Whether the next step measures its actual decrease."""
        return self.measure_every > 0 and (self._steps + 1) % self.measure_every == 0

    def _hook(self) -> None:
        """Hook the model where anything has to be recorded."""
        factored = any(self._build(group).factored for group in self.param_groups)
        if not (self.feedback_on or factored or self.measure_every):
            return
        watch = self.full or self.rollout == "nonlinear" or self.measure_every > 0
        self.recorder = Recorder(
            self.model,
            self.players if self.feedback_on or factored else [],
            self.criterion,
            self.terminal,
            Watcher(self) if watch else None,
            self.keep_grad,
            compact=self.feedback_on
            and not (self.terminal.rank_r or self.full or self.keep_policy)
            and self.fictitious is None,
            whole=Due(self),
        )

    def due(self) -> frozenset[Player]:
        """Players whose Kronecker factors the next step updates, of inputs and signals."""
        group_of, step = self._group_of(), self._clock()
        return frozenset(
            player
            for player in self.players
            if player.layer.kronecker
            and (group := group_of.get(player.params[0])) is not None
            and self._build(group).due(self.state.get(player.params[0], {}), step)
        )

    def _clock(self) -> int:
        """Steps so far, as far as any player has taken part."""
        states = (self.state.get(player.params[0], {}) for player in self.players)
        return max((int(state.get("step", 0)) for state in states), default=0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; hook the model if the new group is the first to need it."""
        super().add_param_group(param_group)
        if self._ready:
            self._hook_if_needed()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; hook the model if the state's preconditioner is the first to need it."""
        super().load_state_dict(state_dict)
        self._hook_if_needed()

    def _hook_if_needed(self) -> None:
        if self.recorder is not None and (self.recorder.players or not self.players):
            return
        if self.recorder is not None:
            self.recorder.remove()
            self.recorder = None
        self._hook()

    # step

    def _step(self) -> None:
        passes = self.recorder.take() if self.recorder is not None else []
        try:
            self._step_on(passes)
        finally:
            for recorded in passes:
                recorded.close()

    def _step_on(self, passes: list[Pass]) -> None:
        self._require_usable(passes)
        measured = self.measures_next
        self._steps += 1
        group_of = self._group_of()
        graded = [p for p in group_of if p.grad is not None]
        turns, batches = self._turns(passes, graded, group_of)
        sweep: Sweep | None = None
        movers = [turn.mover for turn in turns]
        if turns:
            sweep = self._sweep(turns, batches)
            sweep.backward()
            if self.rollout == "nonlinear" and not self.full:
                nonlinear_rollout(self.model, sweep, passes[0], self._advice)
            else:
                sweep.forward()
            turns = sweep.turns
            movers = [turn.mover for turn in turns]
        deltas = [turn.delta for turn in turns]
        done = {p for turn in turns for p in turn.player.params}
        for mover in self._rest([p for p in graded if p not in done], group_of):
            movers.append(mover)
            deltas.append(mover.move(mover.gradient()))
        policy = Policies.of(sweep) if self.keep_policy and sweep is not None else None
        self._apply(movers, deltas)
        self._policy = policy
        self._ledger = None
        if sweep is not None:
            reports = [turn.mover.report for turn in turns]
            unit = loss_unit(turns[0].mover.scale, batches)
            self._ledger = Ledger.of(sweep, reports, unit)
            if measured and passes and self.criterion is not None:
                actual = actual_decrease(self.model, self.criterion, passes)
                self._ledger.actual = None if actual is None else actual * unit / processes()

    def _sweep(self, turns: list[Turn], batches: list[Batch]) -> Sweep:
        """The two passes over the turns, in coefficients or with matrices."""
        sharing = processes() > 1
        others = (
            self.curvature,
            mean_over if sharing else None,
            sum_over if sharing else None,
        )
        if not self.full:
            groups = self._stages(turns, batches)
            if groups is not None:
                turns = [turn for group in groups for turn in group.turns]
            return Sweep(
                turns,
                batches,
                self.bellman,
                self.rollout,
                *others,
                groups=groups,
                fictitious=self.fictitious,
                step=self._clock(),
            )
        dense = [self._dense(batch) for batch in batches]
        return DenseSweep(
            turns,
            dense,
            self.bellman,
            self.rollout,
            *others,
            value_reg=self.value_reg,
            order=self.dynamics_order,
            to_input=self.keep_policy,
            step=self._clock(),
        )

    def _stages(self, turns: list[Turn], batches: list[Batch]) -> list[Group] | None:
        """The turns by stage of the network's game; None where each has a stage of its own."""
        return None

    def _advice(self, called: Sequence[Player]) -> str:
        """What to do where the stages have another order than the calls of these players."""
        return "use rollout='linear'"

    def _dense(self, batch: Batch) -> DenseBatch:
        """A batch with its chain: the forward pass is run once more and watched."""
        recorded = batch.source
        assert recorded is not None
        if recorded.forwards != 1 or recorded.inputs is None or recorded.setting is None:
            raise GraphError(
                f"terminal='full' runs the forward pass again, but the model was called "
                f"{recorded.forwards} times before the loss; use terminal='gauss-newton'"
            )
        require_apart(self.model)
        watch = watch_chain(self.players)
        output = run_again(self.model, recorded.setting, recorded.inputs, watch)
        chain = watch.chain(output)
        calls = [call for call in recorded.calls if call.scale is not None]
        if calls and recorded.result is not None:
            chain.seen_as(calls[0].output, recorded.result)
        return dense_batch(
            batch, chain, calls, self.terminal, self.dynamics_order, self.keep_policy
        )

    def _require_usable(self, passes: list[Pass]) -> None:
        """Refuse what cannot be stepped on, before anything is changed."""
        if not self.keep_grad and (processes() > 1 or getattr(self, "found_inf", None) is not None):
            raise RecordingError(
                "keep_grad=False leaves .grad empty, which a GradScaler and data parallelism need; "
                "build the optimizer with keep_grad=True"
            )
        losses = [c.loss for p in passes for c in p.calls if c.scale is not None]
        self._require_finite_losses(losses)
        if self.criterion is not None and passes and not losses:
            refuse_unused(self.criterion, self.recorder.ignored if self.recorder else "")
        if self.rollout == "nonlinear" and not self.full and passes:
            require_replayable(passes)

    def _turns(
        self,
        passes: list[Pass],
        graded: list[Tensor],
        group_of: dict[Tensor, dict[str, Any]],
    ) -> tuple[list[Turn], list[Batch]]:
        """The players that take part in this step, in forward order, and their samples."""
        if self.recorder is None or not self.recorder.players:
            return [], []
        have = set(graded)
        if not self.keep_grad:
            have.update(q for p in passes for use in p.received for q in use.player.params)
        expected = [p for p in self.players if any(q in have for q in p.params)]
        if not expected:
            return [], []
        if not any(p.received for p in passes):
            self._nothing_recorded(expected)
        self._reasons = {}
        batches = gather(passes, self.terminal, self.reduction, processes())
        order: dict[Player, None] = {}
        for batch in batches:
            self._reasons.update(batch.skipped)
            order.update(dict.fromkeys(batch.traces))
        if not any(batch.samples for batch in batches) and not self._warned:
            self._warned = True
            warnings.warn(
                f"no layer has feedback: {next(iter(self._reasons.values()), 'unknown')}; the "
                "step is the first-order one (said once)",
                stacklevel=4,
            )
        batches = [batch for batch in batches if batch.samples]
        turns = []
        for player in order:
            mine = [group_of[p] for p in player.params if p in group_of]
            if player in self._reasons or len(mine) < len(player.params):
                self._reasons.setdefault(player, "not all of its parameters are optimized")
                continue
            if not all(p in have for p in player.params):
                self._reasons[player] = "one of its parameters received no gradient"
                continue
            rule = self._build(mine[0])
            if rule.factored and not player.layer.kronecker:
                rule = Identity()
            if not (self.feedback_on or rule.factored):
                continue
            states = self._states(player.params)
            mover = ParamMover(
                list(player.params), mine, states, rule, player.layer, not self.keep_grad
            )
            turns.append(Turn(player, mover, mine[0]["feedback_clip"]))
        if not self.keep_grad:
            for player in expected:
                if player in self._reasons:
                    raise RecordingError(
                        f"keep_grad=False, but layer {player.name!r} has no gradient of its own to "
                        f"fall back on ({self._reasons[player]}); use keep_grad=True"
                    )
        for player in expected:
            if player not in order:
                self._reasons.setdefault(
                    player, "its weight was used without calling it, so nothing was recorded"
                )
        for player in self.players:
            if player not in order and player not in self._reasons:
                self._reasons[player] = "it received no gradient in the last step"
        measure_scales(turns, self.recorder.samples)
        if turns:
            unscale(batches, turns[0].mover.scale)
        return turns, batches

    def _nothing_recorded(self, expected: list[Player]) -> None:
        raise RecordingError(
            f"gradients arrived, but no call of any layer was recorded (first: "
            f"{expected[0].name!r}). Build the optimizer before torch.compile and before the "
            "first forward pass; call backward() before every step(), on this model's loss, and "
            "detach() only after the last"
        )

    def _rest(
        self, params: list[Tensor], group_of: dict[Tensor, dict[str, Any]]
    ) -> list[ParamMover]:
        """Parameters without a turn: the first-order rule of their group's preconditioner."""
        by_group: dict[int, list[Tensor]] = {}
        for p in params:
            by_group.setdefault(id(group_of[p]), []).append(p)
        movers = []
        for mine in by_group.values():
            group = group_of[mine[0]]
            rule = self._build(group)
            if rule.factored:
                rule = Identity()
            states = self._states(mine)
            mover = ParamMover(mine, [group] * len(mine), states, rule)
            mover.observe()
            movers.append(mover)
        return movers

    # what happened

    @property
    def diagnostics(self) -> Diagnostics:
        """Figures of the last step, in total and per player; see :class:`Diagnostics`."""
        return Diagnostics() if self._ledger is None else self._ledger.read()

    @property
    def policy(self) -> Policies:
        """Every player's policy in the last step, by module name; see :class:`Policy`.

        Raises:
            OptionError: The optimizer was built without ``keep_policy=True``.
            RecordingError: No step has been taken, or none with feedback.
        """
        if not self.keep_policy:
            raise OptionError("policy: build the optimizer with keep_policy=True to look at it")
        if self._policy is None:
            raise RecordingError("policy: there is none before the first step with feedback")
        return self._policy
