"""How parameters move: gradient, weight decay, preconditioner, momentum, learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ocnopt.control.hooks import GradHook
from ocnopt.curvature import Identity, Observation, Preconditioner
from ocnopt.curvature.factorize import Eigenbases
from ocnopt.curvature.metric import Metric
from ocnopt.layers import Layer, Params

__all__ = ["ParamMover"]


class ParamMover:
    """Parameters that share a preconditioner: a player's, or those no player owns.

    Everything is placed as in the optimizer that lends M, so that without feedback the step is
    that optimizer's: weight decay enters the gradient before M (after it where M is factored),
    momentum smooths the preconditioned direction.

    Args:
        params: The parameters.
        groups: The parameter group of each.
        states: A shallow copy of the optimizer's state of each; tensors in it are replaced, never
            written into, so that a step that fails leaves nothing behind.
        preconditioner: M.
        layer: The player's layer, or None.
        partial: Whether the player's own gradient is not in ``.grad``.
    """

    def __init__(
        self,
        params: list[Tensor],
        groups: list[dict[str, Any]],
        states: list[dict[str, Any]],
        preconditioner: Preconditioner,
        layer: Layer | None = None,
        partial: bool = False,
    ) -> None:
        self.params = params
        self.groups = groups
        self.states = states
        self.preconditioner = preconditioner
        self.layer = layer
        self.rates = tuple(float(group["lr"]) for group in groups)
        self.decays = [float(group["weight_decay"]) for group in groups]
        self.partial = partial
        self.scale = 1.0
        #: Whether the loop, or a hook of a parameter, did more than rescale the gradient.
        self.edited = any(map(_hooked, params))
        self.report: dict[str, float] = {}
        self._metric: Metric | None = None
        self._mean: Params | None = None
        grads = [p.grad for p in params]
        self._base: Params | None = None
        if any(grad is not None for grad in grads):
            self._base = tuple(
                torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
                for p, g in zip(params, grads, strict=True)
            )

    @property
    def plain(self) -> bool:
        """Whether M = I."""
        return isinstance(self.preconditioner, Identity)

    @property
    def only_rate(self) -> float | None:
        """The learning rate, where the move is the direction times it and nothing else."""
        simple = (
            self.plain and not self.edited and not any(self.decays) and len(set(self.rates)) == 1
        )
        if not simple or any(group["momentum"] for group in self.groups):
            return None
        return self.rates[0]

    def base(self) -> Params | None:
        """The gradient as the loop left it; None where autograd formed none."""
        return self._base

    def masked(self, d: Params) -> Params:
        """The direction without the entries that the loop has set to zero in the gradient."""
        if not self.edited or self.partial or self._base is None:
            return d
        return tuple(part.masked_fill(g == 0, 0) for part, g in zip(d, self._base, strict=True))

    def gradient(self) -> Params:
        """The gradient, which autograd did form."""
        assert self._base is not None
        return self._base

    def _decayed(self, d: Params) -> Params:
        if not any(self.decays):
            return d
        return tuple(
            torch.add(part, p, alpha=decay) if decay else part
            for part, p, decay in zip(d, self.params, self.decays, strict=True)
        )

    def observe(
        self,
        mean: Callable[[], Params] | None = None,
        factors: Callable[[], tuple[Tensor, Tensor]] | None = None,
        samples: int = 1,
        step: int | None = None,
        eigenbases: Eigenbases | None = None,
    ) -> Metric:
        """Update the preconditioner with the Bellman objective (by default: the gradient)."""
        first = self.preconditioner.decay_first

        def decayed_mean() -> Params:
            value = self.gradient() if mean is None else mean()
            self._mean = self._decayed(value) if first else value
            return self._mean

        # Nothing that leads back here is kept: a step's tensors are to be freed with it.
        seen = Observation(
            self.states,
            self.rates,
            decayed_mean,
            self.layer,
            factors,
            samples,
            step,
            eigenbases or Eigenbases(),
            self.report,
        )
        self._metric = self.preconditioner.observe(seen)
        return self._metric

    def probe(self, mean: Params) -> Params:
        """The open-loop step ``-eta M^-1 E[Q_u]``."""
        assert self._metric is not None
        return self.scaled(self._metric.solve(mean))

    def scaled(self, u: Params) -> Params:
        """``-eta u``, and nothing else."""
        return tuple(part * -rate for part, rate in zip(u, self.rates, strict=True))

    def move(self, d: Params, bound: float | None = None, own: bool = False) -> Params:
        """The parameters' change for the direction d; momentum is updated.

        Args:
            d: The direction.
            bound: The bound on feedback, or None.
            own: Whether d may be written into. On wide layers new tensors cost more than what is
                computed in them.
        """
        return self.finish(self.solve(self.limited(d, bound, own), own))

    def limited(self, d: Params, bound: float | None = None, own: bool = False) -> Params:
        """The direction as M is to see it: with weight decay where that comes first, and bounded.

        An adaptive M is small where samples cancel; what feedback adds need not cancel, and would
        make a step of any size. No entry of d may therefore exceed ``1 + bound`` times the entry
        that M was built from.

        Args:
            d: The direction.
            bound: The bound on feedback, or None.
            own: Whether d may be written into.
        """
        d = self._decayed(d) if self.preconditioner.decay_first else d
        if bound is None or self._mean is None or not self.preconditioner.adaptive:
            return d
        out = []
        for part, mean in zip(d, self._mean, strict=True):
            most = mean.abs().mul_(1 + bound)
            part = part.clamp_(max=most) if own else part.clamp(max=most)
            out.append(part.clamp_(min=most.neg_()))
        return tuple(out)

    def solve(self, d: Params, own: bool = False) -> Params:
        """``M^-1 d``, for a direction that was :meth:`limited`.

        Args:
            d: The direction.
            own: Whether it may be written into.
        """
        assert self._metric is not None
        return self.preconditioner.direction(self._metric, self.states, d, own)

    def finish(self, u: Params) -> Params:
        """The parameters' change for ``u = M^-1 d``; momentum is updated."""
        if self.preconditioner.factored:
            u = self.masked(u)  # M^-1 mixes entries
        if not self.preconditioner.decay_first:
            u = self._decayed(u)
        own = not self.plain  # else it may be the gradient itself
        out = []
        for part, group, state, rate in zip(u, self.groups, self.states, self.rates, strict=True):
            momentum = group["momentum"]
            if momentum:
                buffer = state.get("momentum_buffer")
                part = part if buffer is None else torch.mul(buffer, momentum).add_(part)
                state["momentum_buffer"] = part
            out.append(part.mul_(-rate) if own and not momentum else part * -rate)
        return tuple(out)


def _hooked(p: Tensor) -> bool:
    """Whether a hook that is not ours may have changed the gradient before it was looked at."""
    after = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return bool(p._backward_hooks) or any(not isinstance(h, GradHook) for h in after.values())
