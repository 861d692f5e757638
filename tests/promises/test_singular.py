"""Matrices that cannot be factorized are met by escalation, counted, and never by a raw error."""

import pytest
import torch
from promises.conformance import OPTIMIZERS, batch, mlp
from torch import nn

import ocnopt
from ocnopt.curvature.factorize import eigenbasis, spd_inverse

FACTORED = ["DDPNOpt-kfac", "DDPNOpt-ekfac", "KFAC", "EKFAC"]


def eye(n, dtype=torch.float64):
    return torch.eye(n, dtype=dtype)[None]


def psd(n, rank, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=g, dtype=torch.float64)
    return (x @ x.t())[None].to(dtype)


def test_inverse_of_a_good_matrix():
    matrix = torch.cat([psd(5, 8), psd(5, 9, seed=1)])
    damping = torch.tensor([0.1, 0.3], dtype=torch.float64)
    found = spd_inverse(matrix, damping)
    expected = torch.linalg.inv(matrix + damping[:, None, None] * torch.eye(5).double())
    torch.testing.assert_close(found.values, expected)
    assert found.failures == 0 and found.damping == pytest.approx(0.3) and found.spectrum is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inverse_of_a_non_finite_matrix(value):
    matrix = psd(4, 6)
    matrix[0, 1, 2] = value
    damping = torch.tensor([0.1], dtype=torch.float64)
    found = spd_inverse(matrix, damping)
    assert torch.equal(found.values, eye(4)) and found.failures == 1
    previous = 2 * eye(4)
    assert torch.equal(spd_inverse(matrix, damping, previous).values, previous)


def test_inverse_of_an_indefinite_matrix():
    """Damping is raised until it is definite; what is in use is reported."""
    matrix = torch.diag(torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64))[None]
    found = spd_inverse(matrix, torch.tensor([1e-3], dtype=torch.float64))
    assert found.failures == 3 and found.damping == pytest.approx(1.0)
    torch.testing.assert_close(found.values, torch.linalg.inv(matrix + found.damping * eye(3)))


def test_one_bad_block_does_not_spoil_the_shape():
    matrix = torch.cat([psd(3, 5), -1e-2 * eye(3)])
    found = spd_inverse(matrix, torch.tensor([1e-3, 1e-3], dtype=torch.float64))
    assert found.values.shape == (2, 3, 3) and torch.isfinite(found.values).all()
    assert found.failures > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_inverse_with_zero_damping(rank, dtype):
    matrix = psd(4, max(rank, 1), dtype) * (rank > 0)
    found = spd_inverse(matrix, torch.zeros(1, dtype=dtype))
    assert found.values.dtype == dtype
    assert torch.isfinite(found.values).all()
    assert found.failures > 0
    if rank:
        assert found.damping > 0


def test_hopelessly_indefinite():
    matrix = -1e12 * eye(3)
    found = spd_inverse(matrix, torch.tensor([1e-6], dtype=torch.float64))
    assert torch.equal(found.values, eye(3)) and found.failures >= 6


def test_single_precision_falls_back_on_double():
    """Definite by less than single precision's rounding."""
    matrix = psd(30, 1, torch.float32) * 1e6
    found = spd_inverse(matrix, torch.tensor([1e-9]))
    assert found.values.dtype == torch.float32 and torch.isfinite(found.values).all()


def test_eigenbasis_of_a_good_matrix():
    matrix = torch.cat([psd(5, 8), psd(5, 2, seed=1)])
    found = eigenbasis(matrix)
    rebuilt = found.values @ torch.diag_embed(found.spectrum) @ found.values.transpose(1, 2)
    torch.testing.assert_close(rebuilt, matrix)
    assert found.failures == 0 and (found.spectrum >= 0).all()


def test_eigenbasis_clamps():
    found = eigenbasis(torch.diag(torch.tensor([1.0, -2.0]))[None])
    assert sorted(found.spectrum[0].tolist()) == [0.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_eigenbasis_of_a_non_finite_matrix(value):
    matrix = psd(3, 5)
    matrix[0, 0, 0] = value
    found = eigenbasis(matrix)
    assert torch.equal(found.values, eye(3)) and found.failures == 1
    assert torch.isfinite(found.spectrum).all() and (found.spectrum >= 0).all()
    previous, _ = torch.linalg.qr(psd(3, 3, seed=4))
    kept = eigenbasis(matrix, previous)
    assert torch.equal(kept.values, previous) and torch.isfinite(kept.spectrum).all()


def test_eigenbasis_when_the_library_fails(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    found = eigenbasis(psd(3, 5))
    assert torch.equal(found.values, eye(3)) and found.failures == 2
    torch.testing.assert_close(found.spectrum, psd(3, 5).diagonal(dim1=1, dim2=2))


def data(kind, dtype):
    x, y = batch(dtype=dtype)
    if kind == "zero column":
        x[:, 2] = 0
    elif kind == "duplicated columns":
        x[:, 3] = x[:, 1]
        x[:, 4] = x[:, 1]
    elif kind == "one sample":
        x, y = x[:1], y[:1]
    elif kind == "equal samples":
        x, y = x[:1].expand(12, -1).contiguous(), y[:1].expand(12)
    elif kind == "zero input":
        x.zero_()
    return x, y


@pytest.mark.parametrize("damping", [1e-2, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "kind",
    ["zero column", "duplicated columns", "one sample", "equal samples", "zero input", "zero loss"],
)
@pytest.mark.parametrize("name", FACTORED)
def test_degenerate_batches_train_on(name, kind, dtype, damping):
    """Rank-deficient factors; with a damping below rounding the factorization has to escalate."""
    model = mlp(dtype)
    factor = 0.0 if kind == "zero loss" else 1.0
    criterion = ocnopt.Criterion(lambda out, y: factor * nn.functional.cross_entropy(out, y))
    options = {"lr": 1e-3}
    if name.startswith("DDPNOpt"):
        rule = {"DDPNOpt-kfac": ocnopt.curvature.KFAC, "DDPNOpt-ekfac": ocnopt.curvature.EKFAC}
        options["preconditioner"] = rule[name](damping=damping, update_every=1, decay=0.5)
    else:
        options.update(damping=damping, update_every=1, decay=0.5)
    optimizer = OPTIMIZERS[name](model, criterion, **options)
    x, y = data(kind, dtype)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        try:
            optimizer.step()
        except ocnopt.NonFiniteError:
            assert damping < 1e-10  # named, and nothing was changed
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.diagnostics.total.failures >= 0


def test_failures_are_counted_and_damping_reported():
    """A factor of rank one cannot be inverted at a damping below rounding."""
    model = mlp(torch.float32)
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.KFAC(model, criterion, lr=1e-6, damping=1e-30, update_every=1)
    x, y = data("equal samples", torch.float32)
    counts = []
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x * 100), y).backward()
        optimizer.step()
        counts.append(optimizer.diagnostics.total.failures)
    assert 0 < counts[0] < counts[1] < counts[2]
    assert optimizer.diagnostics.total.damping > 1e-30
    assert sum(r.failures for r in optimizer.diagnostics.players.values()) == counts[2]


@pytest.mark.parametrize("name", FACTORED)
def test_factorization_that_always_fails(name, monkeypatch):
    """Counted, and the step is a gradient step (KFAC) or one in the identity's basis (EKFAC)."""
    monkeypatch.setattr(
        torch.linalg,
        "cholesky_ex",
        lambda m: (torch.zeros_like(m), torch.ones(m.shape[:-2], dtype=torch.int32)),
    )

    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert optimizer.diagnostics.total.failures > 0
    assert all(r.failures > 0 for r in optimizer.diagnostics.players.values())
