"""Z Z^T is the dense Hessian that autograd finds for every sample's own cost."""

from __future__ import annotations

import doctest

import cases
import pytest
import torch
import torch.nn.functional as F
from oracles import row_losses, terminal_derivatives
from torch import Tensor, nn

import ocnopt
from ocnopt.losses import hessian, hessian_factor

LABELS = torch.tensor([0, 2, 1, 1])
REAL = torch.tensor([[0.1, 0.7, -0.2], [0.3, -1.3, 0.4], [1.0, 0.0, 0.0], [0.2, 0.2, 2.0]])
WEIGHT = [0.5, 2.0, 1.0]


def weight() -> Tensor:
    return torch.tensor(WEIGHT)


CRITERIA = {
    "cross-entropy": (lambda **o: nn.CrossEntropyLoss(**o), LABELS),
    "class weights": (lambda **o: nn.CrossEntropyLoss(weight=weight(), **o), LABELS),
    "label smoothing": (lambda **o: nn.CrossEntropyLoss(label_smoothing=0.2, **o), LABELS),
    "weights and smoothing": (
        lambda **o: nn.CrossEntropyLoss(weight=weight(), label_smoothing=0.2, **o),
        LABELS,
    ),
    "ignored target": (
        lambda **o: nn.CrossEntropyLoss(weight=weight(), **o),
        torch.tensor([0, -100, 1, 2]),
    ),
    "soft targets": (lambda **o: nn.CrossEntropyLoss(**o), torch.softmax(REAL, 1)),
    "squared error": (lambda **o: nn.MSELoss(**o), REAL),
    "binary cross-entropy": (lambda **o: nn.BCEWithLogitsLoss(**o), (REAL > 0.25).double()),
    "MMC": (lambda **o: ocnopt.MMCLoss(3, radius=2.0, **o), LABELS),
    "MMC, four classes": (lambda **o: ocnopt.MMCLoss(4, 3, radius=2.0, **o), LABELS),
}


def own_hessians(criterion: nn.Module, output: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Every sample's Hessian (B, n, n), one at a time from the whole loss."""
    phi = row_losses(lambda o, y: criterion(o, y).sum(), output, target)
    count = 1 if reduction == "mean" else len(output)  # the oracle multiplies by B
    found = [terminal_derivatives(phi, output[i : i + 1], i)[1] for i in range(len(output))]
    return torch.stack(found) / count


def assert_is_factor(z: Tensor, expected: Tensor) -> None:
    assert z.shape[:2] == expected.shape[:2]
    assert not z.requires_grad
    torch.testing.assert_close(z @ z.mT, expected.to(z.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CRITERIA)
def test_against_dense_hessians(name, reduction):
    make, target = CRITERIA[name]
    criterion = make(reduction=reduction)
    output = torch.randn(4, 3) * 1.5
    expected = own_hessians(criterion, output, target, reduction)
    assert float(expected.abs().max()) > 0.05
    assert_is_factor(hessian_factor(criterion, output.requires_grad_(), target), expected)


def test_cross_entropy_is_the_known_factor():
    output = torch.randn(4, 3)
    p = output.softmax(1)
    z = hessian_factor(nn.CrossEntropyLoss(), output, LABELS)
    root = p.sqrt()
    expected = torch.diag_embed(root) - p.unsqueeze(2) * root.unsqueeze(1)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-14)


def test_mmc_is_the_identity():
    z = hessian_factor(ocnopt.MMCLoss(3), torch.randn(4, 3), LABELS)
    torch.testing.assert_close(z @ z.mT, torch.eye(3).expand(4, 3, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_locations_per_sample(reduction):
    """(B, classes, positions): n and r run over both."""
    criterion = nn.CrossEntropyLoss(weight=weight(), reduction=reduction)
    output, target = torch.randn(2, 3, 4), torch.randint(3, (2, 4))
    target[0, 1] = -100
    expected = own_hessians(criterion, output, target, reduction)
    assert expected.shape == (2, 12, 12)
    assert_is_factor(hessian_factor(criterion, output, target), expected)


def test_a_criterion_of_ones_own():
    criterion = ocnopt.Criterion(cases.log_cosh)
    output = torch.randn(4, 3)
    assert_is_factor(
        hessian_factor(criterion, output, REAL), own_hessians(criterion, output, REAL, "mean")
    )
    total = ocnopt.Criterion(lambda o, y: len(o) * cases.log_cosh(o, y))
    expected = own_hessians(total, output, REAL, "sum")
    assert_is_factor(hessian_factor(total, output, REAL, reduction="sum"), expected)


def test_a_mixed_hessian_and_its_positive_part():
    """The cost couples the outputs; where it curves downwards nothing is left of it."""

    def coupled(output: Tensor, target: Tensor) -> Tensor:
        return (target * output[:, 0] * output[:, 1]).mean() + output.pow(2).sum() / len(output)

    criterion = ocnopt.Criterion(coupled)
    target = torch.tensor([0.5, -1.0, 5.0])  # eigenvalues 2 - |target| and 2 + |target|
    z = hessian_factor(criterion, torch.randn(3, 2), target)
    hessians = own_hessians(criterion, torch.zeros(3, 2), target, "mean")
    torch.testing.assert_close(z[:2] @ z[:2].mT, hessians[:2], rtol=0, atol=1e-12)
    assert float(torch.linalg.eigvalsh(hessians[2]).min()) == pytest.approx(-3)
    torch.testing.assert_close(z[2] @ z[2].mT, torch.full((2, 2), 3.5), rtol=0, atol=1e-12)


def test_one_output_per_sample():
    criterion = nn.BCEWithLogitsLoss()
    output, target = torch.randn(5), torch.ones(5)
    z = hessian_factor(criterion, output, target)
    p = output.sigmoid()
    assert z.shape == (5, 1, 1)
    torch.testing.assert_close(z.square().flatten(), p * (1 - p), rtol=0, atol=1e-14)


def test_single_precision():
    output = torch.randn(4, 3)
    z = hessian_factor(nn.CrossEntropyLoss(), output.float(), LABELS)
    assert z.dtype == torch.float32
    exact = hessian_factor(nn.CrossEntropyLoss(), output, LABELS)
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=1e-6)


def test_errors():
    output = torch.randn(4, 3)
    with pytest.raises(ocnopt.OptionError, match=r"ocnopt\.Criterion"):
        hessian_factor(F.cross_entropy, output, LABELS)
    with pytest.raises(ocnopt.OptionError, match="reduction='batch'"):
        hessian_factor(nn.CrossEntropyLoss(), output, LABELS, reduction="batch")
    with pytest.raises(ocnopt.OptionError, match="unsqueeze"):
        hessian_factor(nn.CrossEntropyLoss(), output[0], LABELS[0])
    with pytest.raises(ocnopt.OptionError, match="samples"):
        hessian_factor(nn.MSELoss(), output[:0], output[:0])
    with pytest.raises(ocnopt.GraphError, match="2000"):
        hessian_factor(nn.MSELoss(), torch.zeros(1, 2000), torch.zeros(1, 2000))


def test_docstring():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert doctest.testmod(hessian).failed == 0
    torch.set_default_dtype(before)
