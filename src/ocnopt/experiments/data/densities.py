"""Densities in the plane that can be drawn from and written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Generator, Tensor

from ocnopt.experiments.errors import InputError

PlaneName = Literal["circles", "moons", "gaussians", "pinwheel", "checkerboard"]

RADII = (3.0, 1.5)
CIRCLES_NOISE = 0.24
MOON_RADIUS = 2.0
MOONS_NOISE = 0.2
_MOON_NODES = 128  # of the quadrature along a moon
GAUSSIANS = 8
GAUSSIANS_RADIUS = 2.8
GAUSSIANS_NOISE = 0.35
ARMS = 5
ARM_CENTER = 2.0
ARM_DEVIATIONS = (0.6, 0.2)  # along and across
TWIST = 0.5  # radians per unit of radius
_GRID = 2**20  # steps in a checkerboard's column, so that no sample lies on an edge


def sample(name: PlaneName, n: int, generator: Generator | None = None) -> Tensor:
    """Draw independent points.

    All densities have about unit scale and lie in [-4, 4]^2, up to tails:

    - `circles`: two circles around the origin, equally likely, with Gaussian noise.
    - `moons`: two half circles that reach into each other, with Gaussian noise.
    - `gaussians`: eight Gaussians on a circle.
    - `pinwheel`: five Gaussians on a circle, elongated outwards, turned the further the more.
    - `checkerboard`: uniform on every other square of a board of 4 x 4.

    Args:
        name: Which density.
        n: How many points.
        generator: Where randomness is drawn from; None is torch's own.

    Returns:
        (n, 2), float32, on the CPU.

    Raises:
        InputError: If there is no such density, or n is negative.
    """
    if n < 0:
        raise InputError(f"cannot draw {n} points; ask for none or more")
    return _known(name).sample(n, generator)


def log_density(name: PlaneName, x: Tensor) -> Tensor:
    """The logarithm of the density at points, exact up to rounding.

    For `moons` it is a quadrature along the half circles. Within a distance of ten from the origin,
    its error is no larger than float64's rounding.

    Args:
        name: Which density.
        x: (..., 2), floating point; the dtype that is computed in.

    Returns:
        (...); minus infinity where the density is zero.

    Raises:
        InputError: If there is no such density, or x is no points of the plane.
    """
    if x.dim() == 0 or x.shape[-1] != 2 or not x.is_floating_point():
        raise InputError(
            f"points of the plane have shape (..., 2) and a floating type, not {tuple(x.shape)} and"
            f" {x.dtype}"
        )
    return _known(name).log_density(x)


@dataclass(frozen=True)
class _Plane:
    sample: Callable[[int, Generator | None], Tensor]
    log_density: Callable[[Tensor], Tensor]


def _known(name: str) -> _Plane:
    if name not in _PLANES:
        raise InputError(
            f"there is no density {name!r}; choose from {', '.join(get_args(PlaneName))}"
        )
    return _PLANES[name]


def _log_gaussian(square: Tensor, deviation: float) -> Tensor:
    """Of an isotropic Gaussian, by the squared distance from its center."""
    return -square / (2 * deviation**2) - math.log(2 * math.pi * deviation**2)


def _at(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), -1)


def _circles(n: int, generator: Generator | None) -> Tensor:
    radius = torch.tensor(RADII)[torch.randint(2, (n,), generator=generator)]
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    noise = torch.randn(n, 2, generator=generator)
    return radius.unsqueeze(-1) * _at(angle) + CIRCLES_NOISE * noise


def _log_circles(x: Tensor) -> Tensor:
    # A Gaussian averaged over the angle of its center is a Bessel function of the radius.
    distance = x.norm(dim=-1, keepdim=True)
    radii = torch.tensor(RADII, dtype=x.dtype, device=x.device)
    bessel: Tensor = torch.special.i0e(distance * radii / CIRCLES_NOISE**2).log()
    rings = _log_gaussian((distance - radii).square(), CIRCLES_NOISE) + bessel
    return rings.logsumexp(-1) - math.log(2)


def _moon_center(moon: Tensor, angle: Tensor) -> Tensor:
    """Point at an angle in [0, pi] of the upper moon (0) or the lower one (1).

    The lower moon is the upper one turned by half a turn about the origin.
    """
    offset = torch.tensor((0.5, 0.25), dtype=angle.dtype, device=angle.device)
    side = (1 - 2 * moon).to(angle.dtype).unsqueeze(-1)
    return MOON_RADIUS * side * (_at(angle) - offset)


def _moons(n: int, generator: Generator | None) -> Tensor:
    moon = torch.randint(2, (n,), generator=generator)
    angle = math.pi * torch.rand(n, generator=generator)
    return _moon_center(moon, angle) + MOONS_NOISE * torch.randn(n, 2, generator=generator)


def _log_moons(x: Tensor) -> Tensor:
    nodes, weights = np.polynomial.legendre.leggauss(_MOON_NODES)
    angle = torch.from_numpy((nodes + 1) * math.pi / 2).to(x)
    log_weight = torch.from_numpy(np.log(weights / 2)).to(x)
    moons = [_moon_center(torch.full_like(angle, moon), angle) for moon in (0, 1)]
    square = (x.unsqueeze(-2) - torch.cat(moons)).square().sum(-1)
    log_terms = _log_gaussian(square, MOONS_NOISE) + log_weight.repeat(2)
    return log_terms.logsumexp(-1) - math.log(2)


def _ring(of: Tensor, count: int) -> Tensor:
    """Points at equal angles on the unit circle, (count, 2)."""
    turns = torch.arange(count, dtype=of.dtype, device=of.device)
    return _at(2 * math.pi / count * turns)


def _gaussians(n: int, generator: Generator | None) -> Tensor:
    which = torch.randint(GAUSSIANS, (n,), generator=generator)
    noise = torch.randn(n, 2, generator=generator)
    return GAUSSIANS_RADIUS * _ring(noise, GAUSSIANS)[which] + GAUSSIANS_NOISE * noise


def _log_gaussians(x: Tensor) -> Tensor:
    square = (x.unsqueeze(-2) - GAUSSIANS_RADIUS * _ring(x, GAUSSIANS)).square().sum(-1)
    return _log_gaussian(square, GAUSSIANS_NOISE).logsumexp(-1) - math.log(GAUSSIANS)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]), -1)


def _arm_angle(x: Tensor) -> Tensor:
    """By how much a point is turned: a function of its radius, which turning leaves as it is.

    So the map can be undone, and it keeps areas.
    """
    radius: Tensor = x.norm(dim=-1)
    return TWIST * radius


def _pinwheel(n: int, generator: Generator | None) -> Tensor:
    arm = torch.randint(ARMS, (n,), generator=generator)
    straight = torch.randn(n, 2, generator=generator) * torch.tensor(ARM_DEVIATIONS)
    straight[:, 0] += ARM_CENTER
    return _turned(straight, 2 * math.pi / ARMS * arm + _arm_angle(straight))


def _log_pinwheel(x: Tensor) -> Tensor:
    arms = 2 * math.pi / ARMS * torch.arange(ARMS, dtype=x.dtype, device=x.device)
    x = x.unsqueeze(-2)
    straight = _turned(x, -arms - _arm_angle(x))
    along, across = ARM_DEVIATIONS
    square = ((straight[..., 0] - ARM_CENTER) / along).square()
    square = square + (straight[..., 1] / across).square()
    scale = math.log(2 * math.pi * along * across * ARMS)
    return (-square / 2).logsumexp(-1) - scale


def _checkerboard(n: int, generator: Generator | None) -> Tensor:
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    inside = (torch.randint(_GRID, (n, 2), generator=generator) + 0.5) / _GRID
    return 2 * (torch.stack((column, row), -1) + inside) - 4


def _log_checkerboard(x: Tensor) -> Tensor:
    square = ((x + 4) / 2).floor()
    inside = ((square >= 0) & (square < 4)).all(-1) & (square.sum(-1) % 2 == 0)
    return torch.full_like(x[..., 0], -math.log(8 * 4)).masked_fill(~inside, -math.inf)


_PLANES: Mapping[str, _Plane] = {
    "circles": _Plane(_circles, _log_circles),
    "moons": _Plane(_moons, _log_moons),
    "gaussians": _Plane(_gaussians, _log_gaussians),
    "pinwheel": _Plane(_pinwheel, _log_pinwheel),
    "checkerboard": _Plane(_checkerboard, _log_checkerboard),
}
