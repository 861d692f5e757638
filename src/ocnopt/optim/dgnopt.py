"""DGNOpt (Liu, Chen & Theodorou, ICML 2021): layers as players of a dynamic game."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.control.alignment import Alignment
from ocnopt.control.batch import Batch
from ocnopt.control.diagnostics import Diagnostics
from ocnopt.control.fictitious import Fictitious, require_penalty
from ocnopt.control.game import Game, find_game
from ocnopt.control.grouping import Grouping
from ocnopt.control.passes import Pass
from ocnopt.control.players import Player
from ocnopt.control.replay import autocast_as
from ocnopt.control.turns import Group, Party, Turn
from ocnopt.curvature import Preconditioner
from ocnopt.errors import GraphError, OptionError
from ocnopt.optim.base import Coverage
from ocnopt.optim.feedback import FeedbackOptimizer
from ocnopt.optim.parallel import mean_over, processes
from ocnopt.optim.rounds import Rounds, alignment_named
from ocnopt.real import is_scalar

__all__ = ["DGNOpt"]

INFORMATION = ("open-loop", "feedback", "group-rational")


class DGNOpt(FeedbackOptimizer):
    """Dynamic game theoretic neural optimizer.

    Layers are players of a dynamic game that the network defines. Where it branches, several
    tensors make up the state and several players act at one stage: a projection shortcut beside
    the main path, the branches of an inception block, the query, key and value of attention. What
    a player knows when it acts decides the update:

    - "open-loop": the input alone. The optimizer that lends M.
    - "feedback": the state, that is what the updates of earlier stages have done to it. Every
      player solves for itself; the value function is shared. On a chain this is DDPNOpt.
    - "group-rational": the state and the other players of its stage, with whom it solves jointly:
      M has Kronecker blocks between them, ``E[a_n a_m^T] (x) E[V_h,n V_h,m^T]``. Only a Kronecker
      M has such blocks; under another one, and between players that are too unlike (in locations,
      say), this is "feedback", and :meth:`coverage` says so.

    The game is found from the model itself. A shortcut can stand beside any layer of the path that
    it skips: that choice is its alignment, which does not change what the network computes.

    Args:
        model: Any ``nn.Module``.
        criterion: The module that the training loop calls on the model's output.
        lr: Learning rate.
        information: "open-loop", "feedback" or "group-rational".
        alignment: "early" or "late" (beside the first or the last layer that a shortcut skips),
            "auto" (late), an index (negative ones count from the last), "random", or a bandit:
            "epsilon-greedy", "exp3++" (a choice every 100 steps, rewarded by the loss's decrease,
            which takes the criterion), or an object of ``ocnopt.control.alignment``, for this
            optimizer alone.
        game: The network's game, from ``ocnopt.control.game``; found from the model where not
            given.
        fictitious: A player without parameters at every stage, "cooperative" or "adversarial"
            (robust control), or None; needs a terminal of rank one.
        penalty: What that player pays; see :class:`~ocnopt.control.fictitious.Fictitious`.
        preconditioner: M, as in ``DDPNOpt``; "kfac" and "ekfac" have blocks between players.
        bellman: This and all that follow: as in ``DDPNOpt``. How the value is pulled back through
            a stage.
        rollout: Where the state differential comes from; "nonlinear" needs an alignment in the
            order in which the model calls its layers, which some networks do not have.
        terminal: Hessian of the terminal cost; "full" on chains alone.
        feedback_clip: Bound on a sample's feedback.
        value_reg: Tikhonov term on V_xx, with ``terminal="full"``.
        dynamics_order: Expansion of the dynamics, with ``terminal="full"``.
        momentum: On the preconditioned direction.
        weight_decay: L2 penalty.
        reduction: How the criterion reduces over samples.
        curvature: What M is built from.
        measure_every: Measure the actual decrease every so many steps.
        keep_grad: Whether ``.grad`` is filled.
        keep_policy: Whether the policies of the last step stay at hand; players who solve jointly
            have none of their own.
        params: Parameter groups.

    Raises:
        OptionError: An option that is unknown or out of range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> optimizer = DGNOpt(model, criterion, lr=0.1)
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
        information: str = "group-rational",
        alignment: str | int | Alignment = "auto",
        game: Game | None = None,
        fictitious: str | None = None,
        penalty: float = 1.0,
        preconditioner: str | Preconditioner = "ekfac",
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
        if information not in INFORMATION:
            raise OptionError(
                f"information={information!r} is not known; choose one of {INFORMATION}"
            )
        if game is not None and not isinstance(game, Game):
            raise OptionError(
                f"game: expected a Game, got {type(game).__name__}; ocnopt.control.game has "
                "find_game(model) and Game.described(model, stages)"
            )
        self.information = information
        self.rounds = Rounds(alignment_named(alignment))
        if terminal is None:
            terminal = "outer-product" if criterion is None else "bounded"
        penalty = require_penalty(penalty)
        helper = None if fictitious is None else Fictitious(fictitious, penalty)
        if information == "open-loop":
            bellman = rollout = "off"
            if not keep_grad or keep_policy:
                raise OptionError(
                    "keep_grad=False, but with information='open-loop' the gradient is all that is "
                    "needed; leave keep_grad=True"
                    if not keep_grad
                    else "keep_policy=True, but with information='open-loop' there is no policy"
                )
        elif bellman == rollout == "off":
            raise OptionError(
                f"information={information!r} with bellman='off' and rollout='off' leaves nothing "
                "but the open loop; use information='open-loop'"
            )
        else:
            self._require_rewards(criterion)
        if helper is not None:
            if information == "open-loop":
                raise OptionError("fictitious has no part in information='open-loop'")
            if terminal in ("gauss-newton", "full"):
                raise OptionError(
                    f"fictitious needs a terminal of rank one, such as 'bounded', not {terminal!r}"
                )
        self.game: Game | None = None
        self._grouping = Grouping()
        self._untraceable = ""
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
            fictitious=helper,
        )
        if not self.feedback_on:
            return
        self.rounds.take()
        if game is not None:
            self._play(game)
            return
        with contextlib.suppress(GraphError):  # then the first pass's inputs may help
            self._play(find_game(self.model, self.players))

    def _require_rewards(self, criterion: nn.Module | None) -> None:
        """Raise if the alignment learns from losses that nobody will see."""
        alignment = self.rounds.alignment
        if alignment.learns and alignment.every is not None and criterion is None:
            raise OptionError(
                f"alignment: {type(alignment).__name__} with every={alignment.every} is rewarded "
                "by the criterion's losses; give the criterion, or every=None and "
                "optimizer.reward(value)"
            )

    # the game

    def _play(self, game: Game) -> None:
        """Take a game as the network's.

        Raises:
            OptionError: It has other players, or not the alignment that was asked for.
        """
        if {p.name for p in game.players} != {p.name for p in self.players}:
            raise OptionError("game: its players are not those of this model; find it anew")
        self.rounds.alignment.start(game.alignments)
        self.game = game

    def _find(self, passes: list[Pass]) -> None:
        """Find the game from the inputs of a recorded pass."""
        seen = next((p for p in passes if p.inputs is not None), Pass())
        assert self.recorder is not None
        self.recorder.active = False
        try:
            with autocast_as(seen.autocast):
                game = find_game(self.model, self.players, seen.inputs)
        except GraphError as error:
            self._untraceable = str(error)
            warnings.warn(
                f"the network's game could not be found ({error}); every layer has a stage of its "
                "own, in the order of calls. Describe it: game=Game.described(model, stages)",
                stacklevel=5,
            )
            return
        finally:
            self.recorder.active = True
        self._play(game)

    @property
    def alignment(self) -> int | None:
        """The alignment in play; None before the game is known."""
        return None if self.game is None else self.rounds.alignment.arm

    def _stages(self, turns: list[Turn], batches: list[Batch]) -> list[Group] | None:
        """The turns by stage of the game under the alignment in play."""
        if not self.feedback_on:
            return None  # without feedback there is no order to find
        if self.game is None and not self._untraceable:
            self._find([b.source for b in batches if b.source is not None])
        if self.game is None:
            return None
        stages = self.game.stages(self.rounds.alignment.arm)
        groups = self._grouping.groups(
            [[player.name for player in stage.players] for stage in stages],
            turns,
            batches,
            self.information == "group-rational",
        )
        self._require_own_policies([party for group in groups for party in group.parties])
        return groups

    def _advice(self, called: Sequence[Player]) -> str:
        """The alignment that has the order of the calls, if any has."""
        if self.game is not None:
            for index in range(self.game.alignments):
                place = {p: stage.index for stage in self.game.stages(index) for p in stage.players}
                order = [place[player] for player in called if player in place]
                if order == sorted(order):
                    return f"choose alignment={index}, or rollout='linear'"
        return "no alignment of its game has the order of its calls; use rollout='linear'"

    def _require_own_policies(self, parties: list[Party]) -> None:
        """Raise if policies are to be kept of players who have none but a joint one."""
        if self.keep_policy and parties:
            names = " and ".join(repr(turn.player.name) for turn in parties[0].turns)
            raise OptionError(
                f"keep_policy=True, but {names} solve jointly and have no policies of their own; "
                "use information='feedback'"
            )

    # rounds

    def _step(self) -> None:
        losses = self._losses() if self.rounds.alignment.every is not None else []
        super()._step()
        if self.game is None:
            return
        if losses:
            self.rounds.after_step(self._agreed(sum(losses) / len(losses)))
        elif self.criterion is None:  # only who learns nothing has rounds then: steps count alone
            self.rounds.after_step(0.0)

    def _losses(self) -> list[float]:
        """Mean losses per sample of the passes that are about to be stepped on."""
        if self.recorder is None:
            return []
        calls = [call for recorded in self.recorder.passes for call in recorded.calls]
        # Sums of batches of different sizes cannot be compared.
        summed = self.reduction == "sum"
        return [
            float(call.loss) / max(1, call.rows)
            if summed and not call.loss.dim()
            else float(call.loss.mean())
            for call in calls
        ]

    def _agreed(self, value: float) -> float:
        """The mean over data-parallel processes, which have to choose alike."""
        if processes() == 1:
            return value
        device = self.param_groups[0]["params"][0].device
        (mean,) = mean_over((torch.tensor([value], dtype=torch.float64, device=device),))
        return float(mean)

    def reward(self, value: float | Tensor) -> None:
        """End a round of the bandit over alignments, and choose the next alignment.

        Args:
            value: How well the round went, in [0, 1]: a validation accuracy, say.

        Raises:
            OptionError: The value is no number in [0, 1]; or there is no alignment to choose:
                with ``information="open-loop"``, where the network's game could not be found, or
                before the first step where it takes a batch to find it.
        """
        why = "information='open-loop' has none" if not self.feedback_on else self._untraceable
        if why:
            raise OptionError(f"reward: there is no alignment to choose ({why})")
        if not is_scalar(value):
            raise OptionError(
                f"reward={value!r} must be a number in [0, 1], such as a validation accuracy"
            )
        self.rounds.end(self._agreed(float(value)))

    # what happened

    @property
    def diagnostics(self) -> Diagnostics:
        """Figures of the last step, with the alignment in play and the rounds that have ended."""
        found = super().diagnostics
        found.alignment = self.alignment
        found.rounds = tuple(self.rounds.alignment.history)
        return found

    def coverage(self) -> list[Coverage]:
        """One row per trained parameter; who acts alone at a stage with others says why."""
        names = {player.name: why for player, why in self._grouping.alone.items()}
        return [
            row._replace(reason=names[row.module])
            if row.treatment == "player" and not row.reason and row.module in names
            else row
            for row in super().coverage()
        ]

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the state of the alignment."""
        return {**super().state_dict(), "alignment": self.rounds.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore, the alignment included.

        Raises:
            OptionError: The state is of another kind of alignment, or of another game; nothing
                was loaded.
        """
        if "alignment" in state_dict:
            arms = None if self.game is None else self.game.alignments
            self.rounds.require_loadable(state_dict["alignment"], arms)
        super().load_state_dict(state_dict)
        if "alignment" in state_dict:
            self.rounds.load_state_dict(state_dict["alignment"])
        if self.game is not None:
            self.rounds.alignment.start(self.game.alignments)
        self._grouping.known.clear()
