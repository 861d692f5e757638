"""E-MSA: the baseline that solves Pontryagin's conditions layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ocnopt.control.chain import Chain, watch_chain
from ocnopt.control.hamiltonian import AugmentedHamiltonian, costates
from ocnopt.control.players import Player, find_players
from ocnopt.control.replay import capture_setting, guarded
from ocnopt.errors import GraphError, NonFiniteError, OptionError
from ocnopt.finite import all_finite
from ocnopt.layers.base import Params
from ocnopt.optim.base import Coverage
from ocnopt.optim.batchwise import BatchOptimizer, is_count, is_number, require, require_finite

__all__ = ["EMSA"]

INNER = ("lbfgs", "gradient")
SEARCHES = ("strong_wolfe", None)


class EMSA(BatchOptimizer):
    """Extended method of successive approximations (Li, Chen, Tai & E 2017).

    One step runs the batch forward (states x_t), solves the adjoint equation backward (co-states
    p_t, Eq. 19b of the DDPNOpt paper) and then minimizes, for every layer by itself, the augmented
    Hamiltonian over that layer's weights (Eq. 23 and 24; the mean over the batch):

        u_t <- argmin_u  H_t(x_t, p_{t+1}, u) + rho/2 |x_{t+1} - f_t(x_t, u)|^2
                                              + rho/2 |p_t - grad_x H_t(x_t, p_{t+1}, u)|^2

    with ``H_t = l_t + p_{t+1}^T f_t``, "with L-BFGS per layer and per training iteration". The
    paper prints the norms without their squares; they are squared here, as by Li et al. All layers
    start from the trajectory as it was, and their results are applied together.

    Both norms and their gradients are zero where the minimization starts. A single gradient step
    is therefore SGD's, whatever rho (Lemma 5 and Eq. 22 state it for the Hamiltonian alone), and
    only what comes behind the first step tells the two apart.

    The defaults were chosen on DIGITS (docs/results/baselines.md): of rho .1, 1, 3 and 10 with 5 or
    10 inner steps, 3 with 5 has the lowest training loss; at .1 the loss rises above its start.
    Smaller rho is unstable, and at 0 the minimum need not exist. A step takes tens of SGD's.

    Args:
        model: A chain: every layer reads what the one before it made. Batch statistics are
            allowed, as the state is the whole batch's.
        criterion: Called as ``criterion(output, *targets)``; a mean or a sum over samples.
        lr: Length of an inner gradient step. For L-BFGS the factor on its own step length; with a
            line search that is only the first length that is tried, so use rho and inner_steps
            to make steps smaller. 0 leaves a group's layers as they are.
        rho: Weight of both norms: larger keeps the weights nearer. At 0, the method of successive
            approximations, the minimum need not exist (H is linear in the last layer's weights).
        inner_steps: Iterations of the inner minimization.
        inner: "lbfgs", started afresh for every layer and step, or "gradient".
        line_search: "strong_wolfe" or None; for "lbfgs".
        history_size: Pairs that L-BFGS keeps.
        weight_decay: Running cost ``l_t(u) = weight_decay / 2 |u|^2``.
        reduction: How the criterion reduces over samples, "mean" or "sum"; read off the criterion
            where it says so.
        params: Parameter groups by name, prefix, module or parameter, with ``lr``, ``rho``,
            ``inner_steps`` and ``weight_decay`` of their own.

    Raises:
        OptionError: An option that is unknown or out of range.
        GraphError: A trained parameter that belongs to no layer with a Hamiltonian of its own.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> optimizer = EMSA(model, torch.nn.CrossEntropyLoss())
        >>> loss = optimizer.step(torch.randn(16, 4), torch.randint(3, (16,)))
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        *,
        lr: float = 1.0,
        rho: float = 3.0,
        inner_steps: int = 5,
        inner: str = "lbfgs",
        line_search: str | None = "strong_wolfe",
        history_size: int = 10,
        weight_decay: float = 0.0,
        reduction: str = "mean",
        params: Any = None,
    ) -> None:
        for name, value, choices in (
            ("inner", inner, INNER),
            ("line_search", line_search, SEARCHES),
            ("reduction", reduction, ("mean", "sum")),
        ):
            if value not in choices:
                raise OptionError(f"{name}={value!r} is not known; choose one of {choices}")
        require(
            "history_size", history_size, is_count(history_size), "a whole number of at least 1"
        )
        own = getattr(criterion, "reduction", None)
        self.reduction = own if own in ("mean", "sum") else reduction
        self.inner = inner
        self.line_search = line_search
        self.history_size = history_size
        defaults = {"lr": lr, "rho": rho, "inner_steps": inner_steps, "weight_decay": weight_decay}
        super().__init__(model, criterion, defaults, params)
        for param in find_players(self.model)[1]:
            _refuse(param.name, param.reason)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require("rho", group["rho"], is_number(group["rho"]), "finite and at least 0")
        steps = group["inner_steps"]
        require("inner_steps", steps, is_count(steps), "a whole number of at least 1")

    def _groups_of(self, player: Player, of: dict[Tensor, dict[str, Any]]) -> list[dict[str, Any]]:
        """The group of each of a player's parameters.

        Raises:
            OptionError: One is in no group, or they cannot be minimized over together.
        """
        missing = [n for n, p in zip(player.layer.names, player.params, strict=True) if p not in of]
        if missing:
            raise OptionError(
                f"the {missing[0]} of layer {player.name!r} is in no parameter group; add it with "
                "add_param_group, or freeze it"
            )
        groups = [of[p] for p in player.params]
        shared = ("rho", "inner_steps") + (("lr",) if self.inner == "lbfgs" else ())
        for option in shared:
            if len({float(group[option]) for group in groups}) > 1:
                raise OptionError(
                    f"layer {player.name!r} has its weight and bias in groups with different "
                    f"{option}, but both are minimized over together; give both the same"
                )
        return groups

    # step

    def _step(self, args: tuple[Any, ...], targets: tuple[Any, ...]) -> Tensor:
        setting = capture_setting(self.model)
        watch = watch_chain(find_players(self.model)[0])
        with torch.enable_grad():
            with watch:
                output = self.model(*args)
            chain = watch.chain(output)
            loss = self._loss(output, targets)
        require_finite(chain, loss)
        slope = self._terminal(chain, loss, output)
        # Everything that follows runs parts of the model again.
        with _uncached(), guarded(self.model, setting):
            problems = self._problems(chain, slope)
            solutions = [self._minimize(problem, groups) for problem, groups in problems]
        for (problem, _), solution in zip(problems, solutions, strict=True):
            torch._foreach_copy_(list(problem.link.player.params), list(solution))
        return loss.detach()

    def _terminal(self, chain: Chain, loss: Tensor, output: Tensor) -> Tensor:
        """The loss's gradient in the output.

        Raises:
            GraphError: The loss depends on a trained parameter that no stage owns.
            NonFiniteError: It is not finite.
        """
        owned = {p for link in chain.links for p in link.player.params}
        rest = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        rest = [(n, p) for n, p in rest if p not in owned]
        if not loss.requires_grad:
            return torch.zeros_like(chain.output)
        found = torch.autograd.grad(loss, [output, *(p for _, p in rest)], allow_unused=True)
        for (name, _), other in zip(rest, found[1:], strict=True):
            if other is not None:
                why = {u.name: u.reason for u in find_players(self.model)[1]}
                _refuse(name, why.get(name, "used without calling its layer"))
        slope = torch.zeros_like(chain.output) if found[0] is None else found[0]
        if not all_finite([slope]):
            raise NonFiniteError(
                "the criterion's gradient in the output of the last layer, "
                f"{chain.links[-1].player.name!r}, is not finite; no weight was changed. Skip this "
                "batch, or look for a division or logarithm of zero in the criterion"
            )
        return slope

    def _problems(
        self, chain: Chain, slope: Tensor
    ) -> list[tuple[AugmentedHamiltonian, list[dict[str, Any]]]]:
        """What is to be minimized, per layer that moves.

        Args:
            chain: The network at the batch.
            slope: The loss's gradient in its output.
        """
        rows = chain.output.shape[0] if chain.output.dim() else 1
        weight = 1 / rows if self.reduction == "mean" else 1.0
        p = costates(chain, slope / weight)
        x = [*(link.x for link in chain.links[1:]), chain.output]
        of = {q: group for group in self.param_groups for q in group["params"]}
        problems = []
        for t in range(len(chain.links) - 1, -1, -1):
            link, here, after = chain.links[t], p[t], p[t + 1]
            assert after is not None
            if here is not None and not all_finite([here]):
                raise NonFiniteError(
                    f"the co-state at the input of layer {link.player.name!r} (the cost's gradient "
                    "there) is not finite; no weight was changed. Skip this batch, or look for a "
                    "division or logarithm of zero in that layer or right behind it"
                )
            groups = self._groups_of(link.player, of)
            if not any(float(group["lr"]) for group in groups):
                continue
            decays = tuple(float(group["weight_decay"]) for group in groups)
            rho = float(groups[0]["rho"])
            problem = AugmentedHamiltonian(link, x[t], here, after, weight, rho, decays)
            problems.append((problem, groups))
        return problems

    def _minimize(self, problem: AugmentedHamiltonian, groups: list[dict[str, Any]]) -> Params:
        """New weights of one layer, beginning at those it has.

        Raises:
            NonFiniteError: They are not finite.
        """
        player = problem.link.player
        u = tuple(p.clone().requires_grad_() for p in player.params)
        closure = problem.closure(u)
        steps = int(groups[0]["inner_steps"])
        if self.inner == "lbfgs":
            # The number of iterations is what ends it: torch's other limits are made idle.
            torch.optim.LBFGS(
                list(u),
                lr=float(groups[0]["lr"]),
                max_iter=steps,
                max_eval=25 * steps,
                tolerance_grad=0.0,
                tolerance_change=1e-16,
                history_size=self.history_size,
                line_search_fn=self.line_search,
            ).step(closure)
        else:
            for _ in range(steps):
                closure()
                for part, group in zip(u, groups, strict=True):
                    assert part.grad is not None
                    part.add_(part.grad, alpha=-float(group["lr"]))
        solution = tuple(part.detach() for part in u)
        if not all_finite(solution):
            raise NonFiniteError(
                f"the minimization for layer {player.name!r} left the finite numbers; no weight "
                "was changed. Raise rho, or lower inner_steps or lr"
            )
        return solution

    # what is covered

    def coverage(self) -> list[Coverage]:
        """One row per trained parameter; all are players, as others are refused."""
        return [
            Coverage(f"{pl.name}.{key}" if pl.name else key, pl.name, pl.layer.kind, "player", "")
            for pl in find_players(self.model)[0]
            for key in pl.layer.names
        ]


@contextmanager
def _uncached() -> Iterator[None]:
    """Autocast without its cache of cast weights, which would hide that a trial changed them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _refuse(name: str, why: str) -> NoReturn:
    raise GraphError(
        f"EMSA cannot train parameter {name!r} ({why}); freeze it with requires_grad_(False), or "
        "use DDPNOpt, which trains it"
    )
