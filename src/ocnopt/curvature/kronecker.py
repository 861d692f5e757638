"""Kronecker-factored preconditioners: KFAC and EKFAC, from V and Q as Table 2 says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocnopt.curvature.base import Observation, Preconditioner, State
from ocnopt.curvature.eigen import Eigen
from ocnopt.curvature.factorize import eigenbasis, spd_inverse
from ocnopt.curvature.metric import Kronecker, Metric


@dataclass(frozen=True)
class Factored(Preconditioner):
    """Running Kronecker factors ``A = E[a a^T]`` and ``B = locations * E[V_h V_h^T]``.

    Args:
        damping: Tikhonov damping, in the units of the curvature.
        decay: Smoothing of the factors; 0 takes the current batch's alone.
        update_every: The optimizer's steps between two updates of the factors and their
            factorization. All layers share them; one that missed its update has it when it is back.
        gram_tolerance: How exactly the Bellman pass measures samples' gradients under M; about
            that much, times how far the value function is shrunk, is the value function's error.
    """

    damping: float = 0.1
    decay: float = 0.9
    update_every: int = 10
    gram_tolerance: float = 0.1

    decay_first: ClassVar[bool] = False
    factored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_number("damping", lambda x: x > 0, "above 0")
        self.check_number("decay", lambda x: 0 <= x < 1, "in [0, 1)")
        self.check_number("update_every", lambda x: x >= 1, "of at least 1")
        self.check_number("gram_tolerance", lambda x: 0 <= x < 1, "in [0, 1)")

    def due(self, state: State, step: int | None = None) -> bool:
        """Whether an observation in that step updates the factors: once every so many steps."""
        step = state.get("step", 0) if step is None else step
        last = state.get("refreshed")
        return bool(last is None or last // self.update_every != step // self.update_every)

    def _begin(self, seen: Observation, state: State) -> bool:
        """Count an observation; whether it updates the factors."""
        step = state.get("step", 0) if seen.step is None else seen.step
        due = self.due(state, step)
        if due:
            state["refreshed"] = step
            state["refreshes"] = state.get("refreshes", 0) + 1
        state["step"] = step + 1
        return due

    def refreshed(self, state: State) -> bool:
        """Whether the last observation updated the factors."""
        return bool(state["refreshed"] == state["step"] - 1)

    def _update_factors(self, seen: Observation, state: State) -> tuple[Tensor, Tensor]:
        assert seen.factors is not None
        for key, batch in zip(("A", "B"), seen.factors(), strict=True):
            kept = state.get(key)
            state[key] = batch if kept is None else torch.lerp(batch, kept, self.decay)
        return state["A"], state["B"]

    def _report(self, seen: Observation, state: State, damping: float, failures: int) -> None:
        state["failures"] = state.get("failures", 0) + failures
        state["damping"] = damping
        seen.report.update(damping=damping, failures=state["failures"])


@dataclass(frozen=True)
class KFAC(Factored):
    """``M = (A + pi sqrt(damping) I) (x) (B + sqrt(damping)/pi I)`` (Martens & Grosse 2015).

    ``pi^2`` is the ratio of the factors' mean eigenvalues.

    Args:
        damping: Tikhonov damping, in the units of the curvature.
        decay: Smoothing of the factors; 0 takes the current batch's alone.
        update_every: Steps between two updates of the factors and their factorization.
        gram_tolerance: How much of the coupling between players who cooperate, in norm, may be
            left out of samples' Gram numbers; a player's own are exact.

    Raises:
        OptionError: An option out of range.
    """

    name: ClassVar[str] = "kfac"

    def observe(self, seen: Observation) -> Metric:
        """Refresh the inverses where they are due."""
        state = seen.states[0]
        if self._begin(seen, state):
            a, b = self._update_factors(seen, state)
            level_a, level_b = split_damping(a, b, self.damping)
            inverse_a = spd_inverse(a, level_a, state.get("A_inverse"))
            inverse_b = spd_inverse(b, level_b, state.get("B_inverse"))
            state["A_inverse"], state["B_inverse"] = inverse_a.values, inverse_b.values
            failures = inverse_a.failures + inverse_b.failures
            in_use = inverse_a.damping * inverse_b.damping if failures else self.damping
            self._report(seen, state, in_use, failures)
        else:
            self._report(seen, state, state["damping"], 0)
        return Kronecker(seen.rates, seen.layer, state["A_inverse"], state["B_inverse"])


@dataclass(frozen=True)
class EKFAC(Factored):
    """Eigenbasis of ``A (x) B`` with corrected eigenvalues (George et al. 2018).

    ``m2 <- eigen_decay m2 + (1 - eigen_decay) N (U_B^T E[Q_u] U_A)^2`` at every step, started
    from the product of the factors' eigenvalues at every refresh; ``M = m2 + damping`` there.

    Args:
        damping: Added to the eigenvalues.
        decay: Smoothing of the factors; 0 takes the current batch's alone.
        update_every: Steps between two updates of the factors and their eigenbasis.
        gram_tolerance: Relative error allowed in a player's samples' Gram numbers, and how much of
            the coupling between players who cooperate, in norm, may be left out of theirs; with 0
            every direction is looked at. A bound: at 0.1 updates were off by 2.5 % at most.
        eigen_decay: Smoothing of the corrected eigenvalues, in [0, 1].

    Raises:
        OptionError: An option out of range.
    """

    eigen_decay: float = 0.75

    name: ClassVar[str] = "ekfac"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("eigen_decay", lambda x: 0 <= x <= 1, "in [0, 1]")

    def observe(self, seen: Observation) -> Metric:
        """Refresh the basis where it is due; correct the eigenvalues."""
        state = seen.states[0]
        failures = 0
        if self._begin(seen, state):
            a, b = self._update_factors(seen, state)
            basis_a = seen.eigenbases.of(a, state.get("U_A"))
            basis_b = eigenbasis(b, state.get("U_B"))
            state["U_A"], state["U_B"] = basis_a.values, basis_b.values
            assert basis_a.spectrum is not None and basis_b.spectrum is not None
            state["m2"] = basis_b.spectrum[:, :, None] * basis_a.spectrum[:, None, :]
            failures = basis_a.failures + basis_b.failures
        self._report(seen, state, self.damping, failures)
        metric = Eigen(
            seen.rates,
            seen.layer,
            state["U_A"],
            state["U_B"],
            state["m2"],
            self.gram_tolerance,
        )
        if self.eigen_decay < 1:
            turned = metric.rotate(seen.mean())
            state["m2"] = torch.mul(state["m2"], self.eigen_decay).addcmul_(
                turned, turned, value=(1 - self.eigen_decay) * seen.samples
            )
        metric.scales = state["m2"] + self.damping
        return metric


def split_damping(a: Tensor, b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``pi sqrt(damping)`` and ``sqrt(damping) / pi`` per group.

    Args:
        a: (groups, in, in).
        b: (groups, out, out).
        damping: Damping of the product.

    Returns:
        Two tensors (groups,).
    """
    trace_a = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    trace_b = b.diagonal(dim1=-2, dim2=-1).mean(-1)
    tiny = torch.finfo(a.dtype).tiny
    pi = (trace_a.clamp_min(tiny) / trace_b.clamp_min(tiny)).sqrt()
    # A factor that is zero says nothing about scale; keep the ratio within what can be inverted.
    pi = pi.nan_to_num(1.0, 1.0, 1.0).clamp(1e-6, 1e6)
    root = damping**0.5
    return pi * root, root / pi
