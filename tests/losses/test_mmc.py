"""The centers are a regular simplex, the loss is theirs, and DDPNOpt knows its curvature."""

from __future__ import annotations

import copy
import doctest
import math
import pickle

import cases
import comparison
import pytest
import torch
from oracles import Options, distance
from torch import Tensor, nn

import ocnopt
from ocnopt.losses import mmc

SIZES = [(2, 1), (2, 2), (3, 2), (3, 3), (5, 4), (10, 9), (10, 10), (10, 64), (100, 99)]


def recursion(classes: int, dim: int) -> Tensor:
    """The paper's algorithm to the letter, at length one; counted from zero."""
    mu = torch.zeros(classes, dim)
    mu[0, 0] = 1
    for i in range(1, classes):
        for j in range(min(i, dim)):
            mu[i, j] = -(1 + mu[i] @ mu[j] * (classes - 1)) / (mu[j, j] * (classes - 1))
        if i < dim:
            mu[i, i] = (1 - mu[i] @ mu[i]).clamp_min(0).sqrt()
    return mu


# --- centers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "dim"), SIZES)
@pytest.mark.parametrize("radius", [1.0, 10.0])
def test_centers_are_a_regular_simplex(classes, dim, radius):
    centers = ocnopt.MMCLoss(classes, dim, radius=radius).centers
    assert centers.shape == (classes, dim)
    gram = centers @ centers.t() / radius**2
    expected = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1)
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(centers.sum(0), torch.zeros(dim), rtol=0, atol=1e-12 * radius)


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_centers_are_those_of_the_paper(classes):
    # In one dimension more than needed the recursion's last step is the root of a rounding error.
    expected = recursion(classes, classes - 1)
    actual = ocnopt.MMCLoss(classes, classes - 1, radius=1.0).centers
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    padded = ocnopt.MMCLoss(classes, classes + 2, radius=1.0).centers
    assert torch.equal(padded[:, : classes - 1], actual)
    assert not padded[:, classes - 1 :].any()


def test_dim_is_the_number_of_classes_and_radius_ten_by_default():
    centers = ocnopt.MMCLoss(4).centers
    assert centers.shape == (4, 4)
    torch.testing.assert_close(centers.norm(dim=1), torch.full((4,), 10.0))


# --- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "dim"), [(3, 2), (4, 4), (4, 7)])
def test_value_and_gradient(classes, dim):
    y = torch.tensor([0, 2, 1, 2, 0])
    z = torch.randn(5, dim, requires_grad=True)
    each = ocnopt.MMCLoss(classes, dim, radius=1.5, reduction="none")
    mu = 1.5 * recursion(classes, classes - 1)
    mu = nn.functional.pad(mu, (0, dim - classes + 1))
    pairs = zip(z.tolist(), mu[y].tolist(), strict=True)
    rows = [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / 2 for pair in pairs]
    torch.testing.assert_close(each(z, y), torch.tensor(rows), rtol=1e-12, atol=0)
    total = ocnopt.MMCLoss(classes, dim, radius=1.5, reduction="sum")(z, y)
    mean = ocnopt.MMCLoss(classes, dim, radius=1.5)(z, y)
    torch.testing.assert_close(total, torch.tensor(sum(rows)), rtol=1e-12, atol=0)
    torch.testing.assert_close(mean, torch.tensor(sum(rows) / 5), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(mean, z)
    torch.testing.assert_close(gradient, (z.detach() - mu[y]) / 5, rtol=0, atol=1e-12)


def test_an_output_of_zero_costs_half_the_squared_radius():
    y = torch.arange(10)
    assert float(ocnopt.MMCLoss(10)(torch.zeros(10, 10), y)) == pytest.approx(50, rel=1e-14)
    small = ocnopt.MMCLoss(10, radius=math.sqrt(20))
    assert float(small(torch.zeros(10, 10), y)) == pytest.approx(10, rel=1e-14)
    # ... and no other constant output costs less, as the centers add to zero.
    assert all(float(small(torch.randn(10).expand(10, 10), y)) > 10 for _ in range(5))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_predict_is_the_nearest_center(shape):
    criterion = ocnopt.MMCLoss(5, 6, radius=2.0)
    z = torch.randn(shape) * 3
    nearest = torch.cdist(z.reshape(-1, 6), criterion.centers).argmin(-1).reshape(shape[:-1])
    assert torch.equal(criterion.predict(z), nearest)
    assert torch.equal(criterion.predict(criterion.centers), torch.arange(5))


def test_lower_precision():
    """Half-precision outputs are measured against centers in the precision they were made in."""
    criterion = ocnopt.MMCLoss(4, radius=2.0).float()
    z, y = torch.randn(6, 4).bfloat16(), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = criterion(z, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, criterion(z.float(), y))
    assert torch.equal(criterion.predict(z), criterion.predict(z.double()))


# --- a module ------------------------------------------------------------------------------------


def test_centers_are_a_buffer():
    criterion = ocnopt.MMCLoss(3)
    assert list(criterion.parameters()) == []
    assert list(criterion.state_dict()) == ["centers"]
    assert criterion.to(torch.float32).centers.dtype == torch.float32
    assert criterion.to("meta").centers.device.type == "meta"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(copied):
    criterion = ocnopt.MMCLoss(3, 5, radius=2.0, reduction="sum")
    other = copied(criterion)
    z, y = torch.randn(4, 5), torch.tensor([0, 2, 1, 1])
    assert torch.equal(criterion(z, y), other(z, y))
    assert repr(other) == "MMCLoss(3, dim=5, radius=2, reduction='sum')"


def test_docstring():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert doctest.testmod(mmc).failed == 0
    torch.set_default_dtype(before)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((1,), {}, "classes=1"),
        ((2.5,), {}, r"classes=2\.5"),
        ((True,), {}, "classes=True"),
        ((5, 3), {}, "dim=3.*4 dimensions"),
        ((5, "5"), {}, "dim='5'"),
        ((5,), {"radius": 0.0}, r"radius=0\.0"),
        ((5,), {"radius": math.inf}, "radius=inf"),
        ((5,), {"radius": math.nan}, "radius=nan"),
        ((5,), {"radius": "10"}, "radius='10'"),
        ((5,), {"reduction": "average"}, "reduction='average'.*mean, sum, none"),
    ],
)
def test_options_that_cannot_be(arguments, options, words):
    with pytest.raises(ocnopt.OptionError, match=words):
        ocnopt.MMCLoss(*arguments, **options)


@pytest.mark.parametrize(
    ("output", "target", "words"),
    [
        (torch.zeros(2, 4), torch.tensor([0, 1]), r"\(2, 4\).*\(B, 3\)"),
        (torch.zeros(3), torch.tensor(1), r"\(3,\).*\(B, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0]), r"\(1,\).*\(2,\)"),
        (torch.zeros(2, 3), torch.tensor([[0], [1]]), r"\(2, 1\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "int64"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "from 0 to 2, these from 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 2]), "from 0 to 2, these from -1 to 2"),
    ],
)
def test_batches_that_cannot_be(output, target, words):
    with pytest.raises(ocnopt.OptionError, match=words):
        ocnopt.MMCLoss(3)(output, target)


# --- under DDPNOpt -------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", cases.TERMINALS)
@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("bellman", ["off", "share", "joint", "literal"])
def test_step_is_the_oracles(classes, terminal, bellman):
    case = cases.fc_chain(ocnopt.MMCLoss(classes, 3, radius=1.5))
    for rollout in ("linear", "nonlinear"):
        options = Options(lr=0.3, terminal=terminal, bellman=bellman, rollout=rollout)
        expected = case.chain_step(options)
        first_order = case.chain_step(Options(lr=0.3, bellman="off", rollout="off"))
        assert distance(expected.new, first_order.new) > 1e-2, "curvature must matter here"
        actual = comparison.package_step(case, options)
        comparison.assert_same_step(case, actual, expected.new)


@pytest.mark.parametrize("terminal", ["matched", "gauss-newton"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_are_one_step(reduction, terminal):
    """However it is reduced: the same mean, written by the loop, is the same step."""
    case = cases.fc_chain(ocnopt.MMCLoss(3, radius=1.5))
    options = Options(lr=0.3, terminal=terminal)
    expected = case.chain_step(options)
    model, criterion = copy.deepcopy(case.model), ocnopt.MMCLoss(3, radius=1.5, reduction=reduction)
    optimizer = comparison.optimizer_for(model, criterion, options)
    value = criterion(model(case.x), case.y)
    (value.sum() / len(case.x)).backward()
    optimizer.step()
    actual = {name: p.detach() for name, p in model.named_parameters()}
    comparison.assert_same_step(case, actual, expected.new)


@pytest.mark.parametrize("terminal", [None, "gauss-newton"])
def test_it_trains(terminal):
    x = torch.randn(90, 5)
    y = x[:, :3].argmax(1)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    criterion = ocnopt.MMCLoss(3, radius=2.0)
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, terminal=terminal)
    losses = [float(comparison.train_step(optimizer, model, criterion, x, y)) for _ in range(150)]
    assert losses[-1] < 0.45 * losses[0]
    assert float((criterion.predict(model(x)) == y).double().mean()) > 0.9
