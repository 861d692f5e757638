"""Gram numbers that look at salient directions alone: their error is what was allowed."""

import pytest
import torch
from torch import nn

from ocnopt.curvature.directions import Directions
from ocnopt.curvature.eigen import Eigen
from ocnopt.layers.conv import ConvLayer
from ocnopt.layers.linear import LinearLayer


def bases(layer, inputs, outputs, dtype):
    make = torch.Generator().manual_seed(0)

    def orthonormal(n):
        q, _ = torch.linalg.qr(torch.randn(n, n, generator=make, dtype=torch.float64))
        return q[None].to(dtype)

    spectrum = torch.logspace(1, -9, outputs)[:, None] * torch.logspace(1, -12, inputs)[None]
    jitter = torch.rand(outputs, inputs, generator=make)
    scales = (spectrum * jitter + 0.1)[None].to(dtype)
    return (0.3,), layer, orthonormal(inputs), orthonormal(outputs), scales


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 0.1), (torch.float32, 0.01), (torch.float64, 0.5), (torch.float64, 1e-3)],
)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_error_is_within_the_tolerance(kind, dtype, tolerance):
    torch.manual_seed(1)
    if kind == "linear":
        layer = LinearLayer(nn.Linear(80, 40), ("weight", "bias"))
        parts = bases(layer, 81, 40, dtype)
        a, columns = torch.randn(7, 80, dtype=dtype), torch.randn(2, 7, 40, dtype=dtype)
        exact, rough = (Eigen(*parts, t).outer_gram(layer, a, columns) for t in (0.0, tolerance))
    else:
        layer = ConvLayer(nn.Conv2d(9, 40, 3), ("weight", "bias"))
        parts = bases(layer, 82, 40, dtype)
        gradients = (
            torch.randn(7, 2, 40, 9, 3, 3, dtype=dtype),
            torch.randn(7, 2, 40, dtype=dtype),
        )
        exact, rough = (Eigen(*parts, t).sample_gram(gradients) for t in (0.0, tolerance))
    kept = Eigen(*parts, tolerance).salient
    assert kept.floor is not None, "nothing was left out: the test would prove nothing"
    assert kept.inputs.shape[-1] * kept.outputs.shape[-1] < 81 * 40 / 2
    size = exact.diagonal(dim1=1, dim2=2).max()
    error = (rough - exact).abs().max() / size
    assert float(error) <= tolerance


def test_a_spectrum_too_wide_for_the_dtype_is_looked_at_in_full():
    layer = LinearLayer(nn.Linear(80, 40), ("weight", "bias"))
    rates, _, basis_a, basis_b, scales = bases(layer, 81, 40, torch.float32)
    wide = scales.clone()
    wide[0, 0, 0] = 1e6
    assert Eigen(rates, layer, basis_a, basis_b, wide, 0.01).salient.floor is None
    assert Eigen(rates, layer, basis_a, basis_b, scales, 0.01).salient.floor is not None


@pytest.mark.parametrize("ratio", [100.0, 1000.0])
def test_a_gradient_along_the_largest_direction_is_measured_to_the_tolerance(ratio):
    """There the rest is next to nothing, and the floor magnifies what rounding leaves of it."""
    make = torch.Generator().manual_seed(0)
    out, inputs = 128, 577
    turn_a, turn_b = (
        torch.linalg.qr(torch.randn(n, n, generator=make, dtype=torch.float64))[0]
        for n in (inputs, out)
    )
    spectrum = torch.logspace(0, -8, out)[:, None] * torch.logspace(0, -8, inputs)[None]
    scales = 0.1 * (1 + ratio * spectrum.double())
    gradients = turn_b[:, :1] @ turn_a[:, :1].T + 1e-4 * torch.randn(
        4, out, inputs, generator=make, dtype=torch.float64
    )
    exact = ((turn_b.T @ gradients @ turn_a).square() / scales).sum((1, 2))
    layer = ConvLayer(nn.Conv2d(64, out, 3), ("weight", "bias"))
    parts = (turn_a[None].float(), turn_b[None].float(), scales[None].float())
    metric = Eigen((1.0,), layer, *parts, 0.01)
    assert metric.salient.floor is not None
    rough = metric.sample_gram(layer.from_matrix(gradients.float()[:, None, None]))[:, 0, 0]
    assert float(((rough - exact) / exact).abs().max()) < 1e-3


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("by", ["gradients", "factors", "outer products"])
def test_rotated_once_for_gram_numbers_and_for_others(by, tolerance):
    """What two look at is what each would see alone, and no Gram number is less exact for it."""
    torch.manual_seed(1)
    if by == "outer products":
        layer = LinearLayer(nn.Linear(81, 40), ("weight", "bias"))
    else:
        layer = ConvLayer(nn.Conv2d(9, 40, 3), ("weight", "bias"))
    parts = bases(layer, 82, 40, torch.float64)
    _, _, basis_a, basis_b, scales = parts
    rows = torch.randn(1, 7, 1 if by == "outer products" else 3, 82, dtype=torch.float64)
    rows[..., -1] = 1
    cols = torch.randn(2, 1, 7, rows.shape[2], 40, dtype=torch.float64)
    matrix = torch.einsum("kgblo,gbli->bkgoi", cols, rows)
    gradients = layer.from_matrix(matrix)
    left, right = (
        torch.linalg.qr(torch.randn(1, n, k, dtype=torch.float64))[0] for n, k in ((40, 3), (82, 5))
    )
    where = Directions(left, right, basis_b @ left, basis_a @ right)
    metric = Eigen(*parts, tolerance)
    assert (metric.salient.floor is None) == (tolerance == 0)
    if by == "outer products":
        a, columns = rows[0, :, 0, :-1], cols[:, 0, :, 0]
        gram = metric.outer_gram(layer, a, columns)
        seen = metric.outer_seen(layer, a, columns, where)
    elif by == "gradients":
        gram, seen = metric.sample_gram_and_seen(gradients, where)
    else:
        gram, seen = metric.factor_gram_and_seen(rows, cols, where)
    whole = (basis_b.mT @ matrix @ basis_a) / scales.sqrt()
    error = (seen - left.mT @ whole @ right).flatten(2).norm(dim=-1) / whole.flatten(2).norm(dim=-1)
    assert float(error.max()) <= max(tolerance / 2, 1e-12)
    exact = Eigen(*parts, 0.0).sample_gram(gradients)
    size = exact.diagonal(dim1=1, dim2=2).max()
    assert float((gram - exact).abs().max() / size) <= max(tolerance, 1e-12)
