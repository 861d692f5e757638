"""terminal="bounded": the quadratic model promises no loss below zero."""

import pytest
import torch
import torch.nn.functional as F
from oracles import matched_curvature
from torch import nn

import ocnopt
from ocnopt.control.batch import gather


def setting(outputs=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # well and badly fitted samples
    return model, torch.randn(8, 3).double()


def kappas(criterion, target, form, factor=1.0):
    """K at the output as the optimizer sees it, and the network's output."""
    model, x = setting()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, terminal=form)
    output = model(x)
    loss = criterion(output, target)
    (factor * (loss if loss.dim() == 0 else loss.mean())).backward()
    (found,) = gather(optimizer.recorder.take(), optimizer.terminal, optimizer.reduction, 1)
    return found.k, output.detach()


labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
values = torch.linspace(-1, 1, 32).double().reshape(8, 4)
weight = torch.tensor([1.0, 2.0, 0.5, 1.0]).double()

CASES = {
    "cross-entropy": (nn.CrossEntropyLoss(), F.cross_entropy, labels),
    "function": (ocnopt.Criterion(F.cross_entropy), F.cross_entropy, labels),
    "smooth": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
        labels,
    ),
    "huber": (nn.HuberLoss(), F.huber_loss, values),
    "soft-margin": (nn.SoftMarginLoss(), F.soft_margin_loss, values.sign()),
    "unreduced": (nn.CrossEntropyLoss(reduction="none"), F.cross_entropy, labels),
}


@pytest.mark.parametrize("name", CASES)
def test_larger_of_two(name):
    """kappa is the true curvature along the gradient, or 1 / (2 phi) where that is more."""
    criterion, function, target = CASES[name]
    found, output = kappas(criterion, target, "bounded")
    floors = 0
    for i in range(8):
        own = output[i : i + 1].clone().requires_grad_()

        def phi(o, i=i):
            return function(o.reshape(1, -1), target[i : i + 1])

        gradient = torch.autograd.functional.jacobian(phi, own).reshape(-1)
        hessian = torch.autograd.functional.hessian(phi, own).reshape(4, 4)
        least = 0.5 / phi(own.detach())
        matched = matched_curvature(gradient, hessian)
        floors += int(least > matched)
        assert torch.isclose(found[i], torch.maximum(matched, least), rtol=1e-9)
    assert floors > 0


def test_scaled_loss():
    """A factor on the loss enters as it does without the bound."""
    ratios = {}
    for form in ("bounded", "matched"):
        once, _ = kappas(nn.CrossEntropyLoss(), labels, form)
        twice, _ = kappas(nn.CrossEntropyLoss(), labels, form, factor=2.0)
        ratios[form] = twice / once
    assert torch.allclose(ratios["bounded"], ratios["matched"], rtol=1e-9)


def test_class_weights_and_ignored_rows():
    """In the loss's own units; a row that is ignored has neither gradient nor curvature."""
    target = labels.clone()
    target[2] = -100
    criterion = nn.CrossEntropyLoss(weight=weight)
    found, output = kappas(criterion, target, "bounded")
    parts = F.cross_entropy(output, target, weight=weight, reduction="none")
    own = 8 * parts / weight[labels][target >= 0].sum()
    kept = target >= 0
    assert (found[kept] >= 0.5 / own[kept] * (1 - 1e-9)).all()
    assert found[2] == 0


def test_quadratic_loss_is_its_own_bound():
    """For half a squared residual the two agree."""
    bounded, _ = kappas(nn.MSELoss(), values, "bounded")
    matched, _ = kappas(nn.MSELoss(), values, "matched")
    assert torch.allclose(bounded, matched, rtol=1e-9)


def test_without_a_loss_per_sample_or_above_zero_there_is_no_bound():
    plain = ocnopt.Criterion(lambda o, t: F.cross_entropy(o, t))
    bounded, _ = kappas(plain, labels, "bounded")
    matched, _ = kappas(nn.CrossEntropyLoss(), labels, "matched")
    assert torch.allclose(bounded, matched, rtol=1e-9)
    below = ocnopt.Criterion(
        lambda o, t, reduction="mean": F.mse_loss(o, t, reduction=reduction) - 9
    )
    bounded, _ = kappas(below, values, "bounded")
    matched, _ = kappas(nn.MSELoss(), values, "matched")
    assert torch.allclose(bounded, matched, rtol=1e-9)
