"""Continuous normalizing flows: densities that a Neural ODE carries to a normal one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ocnopt.errors import OptionError
from ocnopt.ode.divergence import DIVERGENCES, WithDivergence
from ocnopt.ode.neural_ode import NeuralODE

__all__ = ["ContinuousFlow"]


class ContinuousFlow(nn.Module):
    """A density on R^d whose logarithm is known (Chen et al. 2018; Grathwohl et al. 2019).

    Points move by ``dz/dt = F(t, z)`` from a standard normal one at ``t0`` to the data at ``t1``,
    and so ``d log p(z(t))/dt = -div F``:

        log p(x) = log N(z(t0)) - int_t0^t1 div F(t, z(t)) dt,    z(t1) = x.

    It is trained in the ordinary loop, by ``-flow(x).mean()``. For ``SNOpt`` the layers of F are
    layers of a Neural ODE as others are. The divergence depends on their weights in two ways:
    through their outputs, which ``g`` and so the Kronecker factors see, and directly, as a product
    of weights in dF/dx, which they do not (in ``F = W z`` it is all there is). Gradients hold both.

    F has to be smooth: the gradient takes its second derivatives. tanh and softplus are; ReLU's
    are zero where they exist.

    Args:
        field: F, called as ``field(t, z)`` with z (B, d), samples apart from each other (no batch
            norm); or several, one after the other, the first next to the data.
        dim: d.
        divergence: "exact", d products with the Jacobian per evaluation; or "hutchinson", one
            product, an unbiased estimate along a random direction (+1 or -1 in every entry) that
            every sample keeps throughout a solve, forward and backward. Directions are drawn from
            torch's default generator. May be changed at any time (:attr:`divergence`), such as for
            an exact evaluation of what was trained by estimates.
        t0: Time of the normal density.
        t1: Time of the data.
        rtol: Relative tolerance of a solver's step; float32 goes no further than about 1e-6.
        atol: Absolute tolerance.
        **solver: Further options of :class:`NeuralODE`: ``method``, ``adjoint``, ``options``,
            ``adjoint_rtol``, ``adjoint_atol``, ``seminorm``.

    Raises:
        OptionError: An option that cannot be.

    Example::

        flow = ContinuousFlow(field, 2)
        loss = -flow(x).mean()
    """

    def __init__(
        self,
        field: nn.Module | Sequence[nn.Module],
        dim: int,
        *,
        divergence: str = "exact",
        t0: float = 0.0,
        t1: float = 1.0,
        rtol: float = 1e-6,
        atol: float = 1e-8,
        **solver: Any,
    ) -> None:
        super().__init__()
        fields = [field] if isinstance(field, nn.Module) else list(field)
        if not fields:
            raise OptionError("field: expected a module, or several, but there is none")
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise OptionError(f"dim={dim!r}, but it must be a whole number of at least 1")
        self.dim = dim
        self.divergence = divergence
        self.odes = nn.ModuleList(Leg(f, t0, t1, rtol=rtol, atol=atol, **solver) for f in fields)

    @property
    def legs(self) -> list[Leg]:
        """The Neural ODEs, the first next to the data."""
        return [ode for ode in self.odes if isinstance(ode, Leg)]

    @property
    def divergence(self) -> str:
        """How the divergence is computed: "exact" or "hutchinson"."""
        return self._divergence

    @divergence.setter
    def divergence(self, value: str) -> None:
        if value not in DIVERGENCES:
            raise OptionError(f"divergence={value!r} is not known; choose one of {DIVERGENCES}")
        self._divergence = value

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`log_prob`, so that hooks and wrappers of the module see it."""
        z, change = self.to_base(x)
        return _log_normal(z) - change

    def log_prob(self, x: Tensor) -> Tensor:
        """The logarithm of the density, in nats; an estimate with Hutchinson's divergence.

        Args:
            x: Points (B, d).

        Returns:
            (B,).

        Raises:
            OptionError: Points that cannot be.
            SolverError: The solver fails; it says how and what to try.
        """
        found: Tensor = self(x)
        return found

    def to_base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Carry points from the data to the normal density.

        Args:
            x: Points (B, d).

        Returns:
            z (B, d), and ``log N(z) - log p(x)`` (B,).

        Raises:
            OptionError: Points that cannot be.
            SolverError: As in :meth:`log_prob`.
        """
        self._require_points(x)
        z, change = x, x.new_zeros(len(x))
        for ode in self.legs:
            noise = _signs(z) if self.divergence == "hutchinson" else None
            z, part = ode.to_base(z, noise)
            change = change + part
        return z, change

    def from_base(self, z: Tensor) -> Tensor:
        """Carry points from the normal density to the data.

        Args:
            z: Points (B, d).

        Returns:
            (B, d).

        Raises:
            OptionError: Points that cannot be.
            SolverError: As in :meth:`log_prob`.
        """
        self._require_points(z)
        for ode in reversed(self.legs):
            z = ode(z)
        return z

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Draw independent points; no gradient follows them.

        Args:
            n: How many.
            generator: Where randomness is drawn from; None is torch's own.

        Returns:
            (n, d), in the dtype and on the device of the parameters.

        Raises:
            OptionError: A negative n.
            SolverError: As in :meth:`log_prob`.
        """
        if n < 0:
            raise OptionError(f"n={n!r}, but it must be at least 0")
        like = next(self.parameters(), torch.empty(0))
        z = torch.randn(n, self.dim, generator=generator, dtype=like.dtype, device=like.device)
        return self.from_base(z) if n else z

    def extra_repr(self) -> str:
        """Dimension and divergence."""
        return f"dim={self.dim}, divergence={self.divergence!r}"

    def _require_points(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != self.dim:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise OptionError(f"x: expected points (B, {self.dim}), got {shape}")
        if not x.is_floating_point():
            raise OptionError(f"x: expected floating-point numbers, got {x.dtype}")


class Leg(NeuralODE):
    """One field's way; called, it goes from the normal density to the data."""

    def to_base(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the data, with ``int_t0^t1 div F dt``.

        Args:
            x: Points (B, d).
            noise: As in :class:`WithDivergence`.
        """
        real = torch.float64 if x.dtype == torch.float64 else torch.float32
        times = torch.stack([self.t1, self.t0]).to(x.device, real)
        field = WithDivergence(self.func, noise)
        z, change = self._solve(False, field, (x, x.new_zeros(len(x))), times)
        return z[-1].clone(), change[-1]  # no view: what comes next may work in place


def _log_normal(z: Tensor) -> Tensor:
    """Of a standard normal density, (B,)."""
    return -z.square().sum(1) / 2 - z.shape[1] * math.log(2 * math.pi) / 2


def _signs(like: Tensor) -> Tensor:
    """+1 or -1 in every entry, equally likely."""
    return torch.randint_like(like, 2) * 2 - 1
