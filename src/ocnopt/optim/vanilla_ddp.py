"""Vanilla differential dynamic programming: the baseline that DDPNOpt makes affordable."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.control.affine import AFFINE
from ocnopt.control.chain import Chain, watch_chain
from ocnopt.control.ddp import DDP, Passes, Policy
from ocnopt.control.diagnostics import Diagnostics, Row
from ocnopt.control.low_rank import LowRankDDP
from ocnopt.control.passes import TerminalCall
from ocnopt.control.players import Player, find_players
from ocnopt.control.replay import capture_setting, guarded
from ocnopt.control.terminal import TerminalCost
from ocnopt.curvature.metric import to_float
from ocnopt.errors import OptionError
from ocnopt.finite import all_finite
from ocnopt.layers.base import Params
from ocnopt.optim.base import Coverage
from ocnopt.optim.batchwise import BatchOptimizer, is_number, require, require_finite

__all__ = ["VanillaDDP"]

BATCHES = ("mean", "share", "joint")

#: Damping is raised by the first where a step fails and lowered by the second where it succeeds.
RAISE, LOWER = 10.0, 3.0
#: An accepted alpha below this share of ``lr`` counts as a failure, too.
SHORT = 0.1
#: What a damping of zero is raised to.
LEAST = 1e-6
#: How often it is raised within one step before the step is given up.
RAISES = 20
#: Least actual decrease of an accepted step, relative to the predicted one.
ACCEPT = 1e-4


class VanillaDDP(BatchOptimizer):
    """Differential dynamic programming as in control (Algorithm 1), on a whole batch.

    One step runs the batch forward, expands the Bellman objective of every layer to second order
    with all terms of Eq. 3, makes the policies ``k_t + K_t dx_t`` (Eq. 4) without approximating any
    matrix, and runs forward under ``u_t + alpha k_t + K_t dx_t`` with the largest
    ``alpha = lr, lr/2, ...`` that lowers the cost. It is meant for small networks; ``DDPNOpt`` is
    for the others.

    With ``dynamics_order=1``, no ``state_reg`` and positive damping or weight decay every Q_uu is
    a diagonal plus a matrix of at most the rank r of the criterion's Hessian for every sample. Of
    a batch of B, linear systems then have the smaller of B r and the layer's parameters as their
    side, whatever the layer's width. Otherwise Q_uu is formed and factorized, which takes the
    square and the cube of the layer's number of parameters.

    The cost is the criterion's value plus ``weight_decay / 2 |u|^2``. Damping is raised tenfold
    where some Q_uu is not positive definite (the backward pass starts again), and for the next step
    where no alpha is accepted (the weights stay) or only a short one; it is lowered where the first
    alpha is. The value is that of the
    regularized gains, regularization left out (Tassa, Erez & Todorov 2012, Eq. 11).

    The samples of a batch share their control. Three ways, the same for a single sample:

    * ``"mean"``: Table 2 with a value function per sample, ``M = E[Q_uu]``, ``d = E[Q_u + Q_ux
      dx]``. A sample's value is that of its own policy, as if it were alone with the weights. On
      mini-batches that makes samples strive for whatever makes their own step effective, such as
      large activations, and training can fail ("unstable", says the paper).
    * ``"share"``: the same, but a sample's value is that of the 1/B of its policy that enters
      the update.
    * ``"joint"``: the stacked problem, whose state is that of all samples together, so that a
      sample's policy knows what the others make of the weights. It alone solves every
      linear-quadratic problem in one step, and its time is the O(B^3 X^3 L) of Table 4, "cubic
      w.r.t. BX", which a value per sample would not take.

    Args:
        model: A chain of linear and convolution layers with parameter-free operations between
            them. Other trained parameters stay as they are, with a warning.
        criterion: Called as ``criterion(output, *targets)``; twice differentiable. Unless jointly
            treated, it must be a sum or a mean over samples.
        lr: The first alpha that is tried.
        damping: Levenberg-Marquardt term on Q_uu, in the units of the loss's Hessian: where it
            starts, and the least that it is lowered to.
        state_reg: Tassa's term on V_xx in the Q_uu and Q_ux of the gains.
        batch: "mean", "share" or "joint".
        dynamics_order: 2 is Eq. 3 with every term. 1 leaves the second derivatives of the dynamics
            and the negative part of the criterion's Hessian out (Gauss-Newton, "iLQR"), so that
            every Q_uu is positive; with "mean" it is what trains on mini-batches, with "share" and
            "joint" 2 does (docs/results/baselines.md).
        backtracks: How often alpha is halved; None takes the first as it is.
        weight_decay: Running cost ``l_t(u) = weight_decay / 2 |u|^2``.
        params: Parameter groups by name, prefix, module or parameter, with an ``lr`` and
            ``weight_decay`` of their own.

    Raises:
        OptionError: An option that is unknown or out of range.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = VanillaDDP(model, nn.CrossEntropyLoss())
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> loss = optimizer.step(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        *,
        lr: float = 1.0,
        damping: float = 1e-3,
        state_reg: float = 0.0,
        batch: str = "mean",
        dynamics_order: int = 1,
        backtracks: int | None = 10,
        weight_decay: float = 0.0,
        params: Any = None,
    ) -> None:
        if batch not in BATCHES:
            raise OptionError(f"batch={batch!r} is not known; choose one of {', '.join(BATCHES)}")
        require("damping", damping, is_number(damping), "finite and at least 0")
        require("state_reg", state_reg, is_number(state_reg), "finite and at least 0")
        require("dynamics_order", dynamics_order, dynamics_order in (1, 2), "1 or 2")
        whole = isinstance(backtracks, int) and not isinstance(backtracks, bool)
        fits = backtracks is None or (whole and backtracks >= 0)
        require("backtracks", backtracks, fits, "a whole number of at least 0, or None")
        self.state_reg = float(state_reg)
        self.batch = batch
        self.dynamics_order = dynamics_order
        self.backtracks = backtracks
        self._floor = float(damping)
        self._alpha = 0.0
        self._diagnostics = Diagnostics()
        super().__init__(model, criterion, {"lr": lr, "weight_decay": weight_decay}, params)
        self.terminal = TerminalCost(self.criterion, "full")
        self._warn()

    def _decays(self, group_of: dict[Tensor, dict[str, Any]]) -> dict[Player, Params]:
        """The players that this step controls, with their parameters' weight decay."""
        found: dict[Player, Params] = {}
        for player in find_players(self.model)[0]:
            if _reason(player, group_of):
                continue
            groups = [group_of[p] for p in player.params]
            if len({float(g["lr"]) for g in groups}) > 1:
                raise OptionError(
                    f"layer {player.name!r} has its weight and bias in groups with different "
                    "learning rates, but they are one control; give both the same"
                )
            if float(groups[0]["lr"]) > 0:
                found[player] = tuple(
                    torch.full_like(p, float(g["weight_decay"]))
                    for p, g in zip(player.params, groups, strict=True)
                )
        return found

    # step

    def _step(self, args: tuple[Any, ...], targets: tuple[Any, ...]) -> Tensor:
        self._alpha, self._diagnostics = 0.0, Diagnostics()
        decays = self._decays(self._groups())
        if not decays:  # all rates are zero
            return self._loss(self.model(*args), targets)
        setting = capture_setting(self.model)
        watch = watch_chain(list(decays))
        with watch:
            output = self.model(*args)
        chain = watch.chain(output)
        loss = self._loss(output, targets)
        require_finite(chain, loss)
        # Everything that follows runs parts of the model again.
        with guarded(self.model, setting):
            self._improve(chain, decays, targets, loss)
        return loss

    def _improve(
        self, chain: Chain, decays: dict[Player, Params], targets: tuple[Any, ...], loss: Tensor
    ) -> None:
        """Backward and forward passes, and the damping for the next step."""
        samples = chain.output.shape[0] if self.batch != "joint" and chain.output.dim() else 1
        dtype = to_float(chain.output.dtype)
        with torch.autocast(chain.output.device.type, enabled=False):
            share = 1 / samples if self.batch == "share" else 1.0
            ddp: Passes
            if self._low_rank(decays):
                ddp = LowRankDDP(chain, decays, samples, dtype, share)
            else:
                order = self.dynamics_order
                ddp = DDP(chain, decays, samples, dtype, share, order, self.state_reg)
            call = TerminalCall(chain.output, targets, {}, loss)
            v, k = self.terminal.expansion(call, samples, positive=self.dynamics_order == 1)
            # The sample's own cost, of which the loss is the mean.
            v, k = v.to(dtype) * samples, k.to(dtype) * samples
            damping, failures = self.damping, 0
            policies = ddp.backward(v, k, damping)
            while policies is None and failures < RAISES:
                failures += 1
                damping = max(damping * RAISE, LEAST)
                policies = ddp.backward(v, k, damping)
        row = Row(damping=damping, failures=self._failures + failures)
        if policies is not None:
            row = self._search(ddp, policies, decays, targets, loss, row)
        if self._alpha < SHORT:
            damping = max(damping * RAISE, LEAST)
        elif self._alpha == 1.0:
            damping = damping / LOWER if damping > LEAST else 0.0
            damping = max(damping, self._floor)
        self.state[self._first] = {"damping": damping, "failures": row.failures}
        self._diagnostics = Diagnostics(row)

    def _low_rank(self, decays: dict[Player, Params]) -> bool:
        """Whether every Q_uu is a positive diagonal plus a matrix of low rank."""
        positive = self.damping > 0 or all(
            bool((d > 0).all()) for params in decays.values() for d in params
        )
        return self.dynamics_order == 1 and self.state_reg == 0 and positive

    def _search(
        self,
        ddp: Passes,
        policies: Sequence[Policy | None],
        decays: dict[Player, Params],
        targets: tuple[Any, ...],
        loss: Tensor,
        row: Row,
    ) -> Row:
        """Try alpha, alpha / 2, ... and keep the first new weights that are good enough."""
        group_of = self._groups()
        rates = {player: float(group_of[player.params[0]]["lr"]) for player in decays}
        active = [p for p in policies if p is not None]
        before = float(loss) + _running_cost(decays, {})
        noise = 10 * torch.finfo(loss.dtype).eps * abs(before)
        criterion = self.terminal.criterion
        assert criterion is not None
        for trial in range(1 + (self.backtracks or 0)):
            shrink = 0.5**trial
            alphas = {player: rate * shrink for player, rate in rates.items()}
            predicted = 0.0
            for policy in active:
                alpha = alphas[policy.control.player]
                predicted -= alpha * policy.slope + alpha**2 / 2 * policy.bow
            output, new = ddp.forward(policies, alphas)
            value = float(criterion.forward(output, *targets))
            actual = before - value - _running_cost(decays, new)
            finite = math.isfinite(actual) and all_finite(
                p for params in new.values() for p in params
            )
            if trial == 0:
                row = _with(row, predicted, actual)
            if not finite:
                continue
            # At a minimum both decreases are rounding noise.
            still = abs(predicted) <= noise and actual >= -noise
            if self.backtracks is None or still or (0 < ACCEPT * predicted < actual):
                for player, params in new.items():
                    for p, q in zip(player.params, params, strict=True):
                        p.copy_(q)
                self._alpha = shrink
                return _with(row, predicted, actual)
        return row

    # what happened

    @property
    def _first(self) -> Tensor:
        """The parameter that the optimizer's own state is filed under."""
        first: Tensor = self.param_groups[0]["params"][0]
        return first

    @property
    def _failures(self) -> int:
        return int(self.state[self._first]["failures"]) if self._first in self.state else 0

    @property
    def damping(self) -> float:
        """Damping of Q_uu that the next step begins with."""
        return float(
            self.state[self._first]["damping"] if self._first in self.state else self._floor
        )

    @property
    def alpha(self) -> float:
        """The fraction of ``lr`` that the last step took; 0 where the weights stayed."""
        return self._alpha

    @property
    def diagnostics(self) -> Diagnostics:
        """Predicted and actual decrease of the cost in the last step, and its damping.

        Where no alpha was accepted they are those of the first.
        """
        return self._diagnostics

    def coverage(self) -> list[Coverage]:
        """One row per trained parameter: "player", or "untrained" and why."""
        players, unowned = find_players(self.model)
        group_of = self._groups()
        by_id = {id(u.param): (u.kind, u.reason) for u in unowned}
        for player in players:
            row = (player.layer.kind, _reason(player, group_of))
            by_id.update(dict.fromkeys(map(id, player.params), row))
        rows = []
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                kind, reason = by_id[id(param)]
                treatment = "untrained" if reason else "player"
                rows.append(Coverage(name, name.rpartition(".")[0], kind, treatment, reason))
        return rows

    def _warn(self) -> None:
        """Name the trained parameters that stay as they are.

        Raises:
            OptionError: All do.
        """
        rows = self.coverage()
        left = [row for row in rows if row.reason]
        if left and len(left) == len(rows):
            raise OptionError(
                f"the model has no layer that VanillaDDP can train ({left[0].parameter!r}: "
                f"{left[0].reason}); use DDPNOpt"
            )
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            warnings.warn(
                f"VanillaDDP leaves {left[0].parameter!r}{more} as they are ({left[0].reason}); "
                "coverage() lists them. Freeze them, or use DDPNOpt, which trains them",
                stacklevel=3,
            )


def _reason(player: Player, group_of: dict[Tensor, dict[str, Any]]) -> str:
    """Why a player is not controlled, or nothing."""
    if player.layer.kind not in AFFINE:
        return f"{player.layer.kind} is not affine in its input"
    if any(p not in group_of for p in player.params):
        return "not all of its layer's parameters are optimized"
    return ""


def _running_cost(decays: dict[Player, Params], new: dict[Player, Params]) -> float:
    """``sum_t l_t(u_t)``."""
    total = 0.0
    for player, decay in decays.items():
        for d, p in zip(decay, new.get(player, player.params), strict=True):
            total += float((d * p * p).sum()) / 2
    return total


def _with(row: Row, predicted: float, actual: float) -> Row:
    return Row(predicted, actual, damping=row.damping, failures=row.failures)
