import math
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.datasets import make_circles, make_moons

from ocnopt.experiments.data import densities
from ocnopt.experiments.data.densities import PlaneName, log_density, sample
from ocnopt.experiments.errors import InputError

NAMES = get_args(PlaneName)
STEP = 0.05
SIDE = 6.0


@pytest.fixture(params=NAMES, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def masses(name):
    """Centers of small squares of [-6, 6]^2 and their probabilities, by the midpoint rule."""
    line = torch.arange(-SIDE + STEP / 2, SIDE, STEP, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    logs = torch.cat([log_density(name, some) for some in points.split(10_000)])
    return points, logs.exp() * STEP**2


def draws(name, n=20_000, seed=0):
    return sample(name, n, torch.Generator().manual_seed(seed))


def test_it_is_a_density(masses):
    # Midpoints are exact to rounding for what is smooth and gone at the border.
    assert float(masses[1].sum()) == pytest.approx(1, abs=1e-9)


def assert_follows(points, masses):
    """Counts in cells of side 1 are those of independent draws, up to five deviations."""
    centers, mass = masses
    edges = np.arange(-SIDE, SIDE + 0.5)
    expected, _, _ = np.histogram2d(*centers.T.numpy(), bins=edges, weights=mass.numpy())
    counts, _, _ = np.histogram2d(*points.double().T.numpy(), bins=edges)
    n = len(points)
    assert counts.sum() == n
    spread = np.sqrt(n * expected * (1 - expected))
    # In cells where next to nothing is expected, a few draws are no sign of anything.
    assert (np.abs(counts - n * expected) <= 5 * spread + 3).all()


def test_draws_follow_the_density(name, masses):
    points = draws(name)
    assert points.shape == (20_000, 2) and points.dtype == torch.float32
    assert_follows(points, masses)


def test_log_density_of_draws_has_the_entropy_as_its_mean(name, masses):
    _, mass = masses
    entropy = -float(torch.special.xlogy(mass, mass / STEP**2).sum())
    logs = log_density(name, draws(name, seed=1).double())
    error = float(logs.std()) / math.sqrt(len(logs))
    assert float(-logs.mean()) == pytest.approx(entropy, abs=5 * error + 1e-9)


@pytest.mark.parametrize("name", ["gaussians"], indirect=True)
def test_gaussians_by_the_formula(name):
    x = draws(name, 50).double()
    total = torch.zeros(50, dtype=torch.float64)
    for k in range(8):
        center = torch.tensor([math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)]).double() * 2.8
        for row, point in enumerate(x):
            square = float(((point - center) ** 2).sum())
            total[row] += math.exp(-square / (2 * 0.35**2)) / (2 * math.pi * 0.35**2) / 8
    torch.testing.assert_close(log_density(name, x), total.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["circles", "moons"], indirect=True)
def test_circles_and_moons_by_a_fine_sum_over_centers(name):
    """The density is a Gaussian's average over the curve that it moves along."""
    angle = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * math.pi
    cos, sin = angle.cos(), angle.sin()
    if name == "circles":
        noise = densities.CIRCLES_NOISE
        half = torch.cat([r * torch.stack((cos, sin), -1) for r in densities.RADII])
        centers = torch.cat((half, -half))
    else:
        noise = densities.MOONS_NOISE
        upper = torch.stack((cos, sin), -1)
        lower = torch.stack((1 - cos, 0.5 - sin), -1)
        centers = 2 * (torch.cat((upper, lower)) - torch.tensor([0.5, 0.25]))
    x = torch.cat((draws(name, 15).double(), torch.tensor([[4.0, -5.0], [0.0, 0.0]]).double()))
    square = (x.unsqueeze(1) - centers).square().sum(-1)
    expected = (-square / (2 * noise**2)).logsumexp(-1) - math.log(len(centers))
    expected -= math.log(2 * math.pi * noise**2)
    torch.testing.assert_close(log_density(name, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["circles", "moons"], indirect=True)
def test_circles_and_moons_are_the_well_known_ones(name, masses):
    """Scikit-learn spaces its angles evenly, so its counts vary less than those of draws."""
    if name == "circles":
        noise = densities.CIRCLES_NOISE / densities.RADII[0]
        points = 3 * make_circles(20_000, factor=0.5, noise=noise, random_state=0)[0]
    else:
        points = make_moons(20_000, noise=densities.MOONS_NOISE / 2, random_state=0)[0]
        points = 2 * (points - [0.5, 0.25])
    assert_follows(torch.from_numpy(points), masses)


def test_pinwheel_is_undone_by_turning_back():
    """Untwisted, its arms are Gaussians: the outermost of them has its mean and deviations."""
    x = draws("pinwheel", 50_000).double()
    z = torch.complex(x[:, 0], x[:, 1])
    z = z * torch.polar(torch.ones(len(z)).double(), -densities.TWIST * z.abs())
    nearest = (z.angle() / (2 * math.pi / 5)).round()
    z = z * torch.polar(torch.ones(len(z)).double(), -nearest * 2 * math.pi / 5)
    assert float(z.real.mean()) == pytest.approx(2, abs=0.03)
    assert float(z.real.std()) == pytest.approx(0.6, abs=0.02)
    assert float(z.imag.std()) == pytest.approx(0.2, abs=0.01)
    assert torch.bincount(nearest.long() % 5).double().std() < 500


def test_checkerboard_is_flat_and_ends_sharply():
    x = draws("checkerboard")
    assert log_density("checkerboard", x).unique().tolist() == pytest.approx([-math.log(32)])
    inside = torch.tensor([[-3.99, -3.99], [-1.99, -1.99], [-3.99, 0.01], [3.99, 3.99]])
    outside = torch.tensor([[-4.01, -3.99], [-1.99, -3.99], [4.01, 3.99], [0.1, 9.9], [-9.0, -9.0]])
    assert torch.isfinite(log_density("checkerboard", inside)).all()
    assert (log_density("checkerboard", outside) == -math.inf).all()


def test_draws_depend_on_the_generator_alone(name):
    first, state = draws(name, 100, seed=3), torch.get_rng_state()
    assert torch.equal(draws(name, 100, seed=3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draws(name, 100, seed=4), first)
    torch.manual_seed(3)
    assert sample(name, 5).shape == (5, 2)
    assert sample(name, 0).shape == (0, 2)


def test_shapes_and_types(name):
    x = draws(name, 12)
    logs = log_density(name, x)
    assert logs.shape == (12,) and logs.dtype == torch.float32
    assert torch.equal(log_density(name, x.reshape(3, 4, 2)), logs.reshape(3, 4))
    torch.testing.assert_close(logs.double(), log_density(name, x.double()), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(logs).all()


def test_far_away_it_is_small_and_finite():
    far = torch.tensor([[30.0, -40.0]])
    for name in NAMES[:4]:
        assert -1e6 < float(log_density(name, far)) < -1e3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sample("spiral", 3), "no density 'spiral'; choose from circles, moons"),
        (lambda: log_density("spiral", torch.zeros(3, 2)), "no density 'spiral'"),
        (lambda: sample("moons", -1), "cannot draw -1 points"),
        (lambda: log_density("moons", torch.zeros(3, 3)), r"not \(3, 3\)"),
        (lambda: log_density("moons", torch.zeros(())), r"not \(\)"),
        (lambda: log_density("moons", torch.zeros(3, 2, dtype=torch.long)), "int64"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
