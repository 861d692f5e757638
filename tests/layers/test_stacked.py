"""Networks trained at once end where each ends alone."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.curvature import EKFAC, KFAC
from ocnopt.curvature.factorize import eigenbasis, spd_inverse
from ocnopt.layers import StackedLinear

#: More samples than inputs: the eigenbasis of a singular factor is decided by rounding.
NETWORKS, BATCH, STEPS = 3, 12, 6
SHAPES = (7, 6, 5, 4)


def alone(seed, bias=True):
    torch.manual_seed(seed)
    layers = []
    for i, o in pairwise(SHAPES):
        layers += [nn.Linear(i, o, bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def together(networks, bias=True):
    layers = []
    for i, o in pairwise(SHAPES):
        layers += [StackedLinear(len(networks), i, o, bias), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.stack([dict(n.named_parameters())[name] for n in networks]))
    return model


def batches():
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        x = torch.randn(NETWORKS, BATCH, SHAPES[0], dtype=torch.float64, generator=generator)
        yield x, torch.randint(SHAPES[-1], (NETWORKS, BATCH), generator=generator)


def compare(build, bias=True):
    criterion = nn.CrossEntropyLoss()
    networks = [alone(seed, bias) for seed in range(NETWORKS)]
    stacked = together(networks, bias)
    optimizers = [build(n, criterion) for n in networks]
    shared = build(stacked, criterion)
    for x, y in batches():
        for i, (n, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            optimizer.zero_grad()
            criterion(n(x[i]), y[i]).backward()
            optimizer.step()
        shared.zero_grad()
        (criterion(stacked(x.flatten(0, 1)), y.flatten()) * NETWORKS).backward()
        shared.step()
    start = together([alone(seed, bias) for seed in range(NETWORKS)], bias)
    for name, param in stacked.named_parameters():
        expected = torch.stack([dict(n.named_parameters())[name] for n in networks])
        moved = not torch.allclose(param, start.get_parameter(name), rtol=1e-3)
        assert moved == param.requires_grad
        torch.testing.assert_close(param, expected, rtol=1e-9, atol=1e-11)


PRECONDITIONERS = {
    "identity": "identity",
    "rmsprop": "rmsprop",
    "adam": "adam",
    "kfac": KFAC(update_every=2),
    "ekfac": EKFAC(update_every=2),
}
FORMS = {
    "default": {},
    "value curvature": {"curvature": "value"},
    "sample": {"bellman": "sample"},
    "joint": {"bellman": "joint"},
    "literal": {"bellman": "literal", "feedback_clip": 0.5},
    "off": {"bellman": "off", "rollout": "off"},
    "nonlinear": {"rollout": "nonlinear"},
    "gauss-newton": {"terminal": "gauss-newton"},
    "full": {"terminal": "full", "value_reg": 1e-2},
    "momentum": {"momentum": 0.9, "weight_decay": 1e-2},
    "no gradients kept": {"keep_grad": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_ddpnopt(preconditioner, form):
    options = {"preconditioner": PRECONDITIONERS[preconditioner], "lr": 0.05, **FORMS[form]}
    compare(lambda model, criterion: ocnopt.DDPNOpt(model, criterion, **options))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("terminal", ["bounded", "full"])
def test_ddpnopt_without_bias(preconditioner, terminal):
    options = {"preconditioner": PRECONDITIONERS[preconditioner], "terminal": terminal, "lr": 0.05}
    compare(lambda model, criterion: ocnopt.DDPNOpt(model, criterion, **options), bias=False)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_one_parameter_frozen(preconditioner, part):
    """A player that owns its weight or its bias alone."""

    def build(model, criterion):
        getattr(model[2], part).requires_grad_(False)
        return ocnopt.DDPNOpt(
            model, criterion, lr=0.05, preconditioner=PRECONDITIONERS[preconditioner]
        )

    compare(build)


@pytest.mark.parametrize(
    "build",
    [
        lambda m, c: ocnopt.KFAC(m, c, lr=0.05, momentum=0.9),
        lambda m, c: ocnopt.EKFAC(m, c, lr=0.05, weight_decay=1e-2),
        lambda m, c: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        lambda m, c: torch.optim.RMSprop(m.parameters(), lr=1e-2),
        lambda m, c: torch.optim.Adam(m.parameters(), lr=1e-2),
    ],
    ids=["kfac", "ekfac", "sgd", "rmsprop", "adam"],
)
def test_lenders(build):
    compare(build)


@pytest.mark.parametrize("bad", [-1.0, float("nan")], ids=["indefinite", "not finite"])
@pytest.mark.parametrize("previous", [None, 3.0])
def test_a_factor_that_fails_leaves_those_of_other_networks(bad, previous):
    torch.manual_seed(0)
    root = torch.randn(3, 4, 4)
    matrix = root @ root.mT
    matrix[1] = bad * torch.eye(4)
    before = None if previous is None else previous * torch.eye(4).expand(3, 4, 4)
    damping = torch.full((3,), 0.1)
    inverse = spd_inverse(matrix, damping, before)
    basis = eigenbasis(matrix, before)
    assert inverse.failures > 0
    for i in (0, 2):
        own = matrix[i : i + 1]
        torch.testing.assert_close(inverse.values[i], spd_inverse(own, damping[:1]).values[0])
        torch.testing.assert_close(basis.spectrum[i], eigenbasis(own).spectrum[0])
        again = basis.values[i] @ basis.spectrum[i].diag() @ basis.values[i].T
        torch.testing.assert_close(again, matrix[i], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(inverse.values).all()
    assert torch.isfinite(basis.values).all()


def test_every_parameter_is_a_player():
    model = together([alone(seed) for seed in range(NETWORKS)])
    optimizer = ocnopt.DDPNOpt(model, nn.CrossEntropyLoss(), lr=0.1)
    assert {(row.kind, row.treatment) for row in optimizer.coverage()} == {
        ("StackedLinear", "player")
    }


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(RuntimeError):
        StackedLinear(3, 4, 2)(torch.randn(7, 4))
