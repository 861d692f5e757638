"""Feedback directions, their projection to the input, and spectra of batch policies."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ocnopt
from ocnopt.errors import GraphError, OptionError
from ocnopt.experiments.figures import (
    Spectra,
    count_above_bulk,
    differential_image,
    feedback_direction,
    feedback_spectrum,
    save_feedback_images,
    save_spectra,
    to_image,
)


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def policies(model, criterion, x, y, **options):
    """The policies of one step at x, and the model with the weights from before it."""
    stepped = copy.deepcopy(model)
    optimizer = ocnopt.DDPNOpt(stepped, criterion, lr=0.1, keep_policy=True, **options)
    criterion(stepped(x), y).backward()
    optimizer.step()
    return optimizer.policy


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    ).eval()


def batch(shape=(6, 1, 8, 8), classes=3):
    torch.manual_seed(1)
    return torch.randn(shape), torch.arange(shape[0]) % classes


# directions


@pytest.mark.parametrize("terminal", ["outer-product", "matched"])
def test_rank_one_direction_is_the_gradient(double, terminal):
    """Methods row 19: parallel to J_x, at every layer, and of its sign."""
    model, criterion, (x, y) = cnn(), nn.CrossEntropyLoss(), batch()
    states = {}
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda m, a, name=name: states.update({name: a[0]}))
    x.requires_grad_()
    loss = criterion(model(x), y)
    gradients = dict(zip(states, torch.autograd.grad(loss, list(states.values())), strict=True))
    seen = policies(model, criterion, x.detach(), y, terminal=terminal)
    for name, policy in seen.items():
        j_x = gradients[name]
        direction = feedback_direction(policy)
        assert direction.shape == policy.V_x.shape
        torch.testing.assert_close(direction.norm(dim=1), torch.ones(6))
        cosine = F.cosine_similarity(direction, j_x.flatten(1))
        torch.testing.assert_close(cosine, torch.ones(6))


@pytest.mark.parametrize(
    "options",
    [
        {"terminal": "gauss-newton"},
        {"terminal": "full"},
        {"terminal": "full", "dynamics_order": 2},
        {"terminal": "gauss-newton", "preconditioner": "kfac"},
    ],
)
def test_direction_is_the_svd_of_the_whole_matrix(double, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = batch((7, 6))
    for policy in policies(model, nn.CrossEntropyLoss(), x, y, **options).values():
        direction = feedback_direction(policy)
        _, _, right = torch.linalg.svd(policy.K.materialize())
        cosine = F.cosine_similarity(direction, right[:, 0]).abs()
        torch.testing.assert_close(cosine, torch.ones(7))
        assert ((direction * policy.V_x).sum(1) >= 0).all()


def test_no_policy_has_no_direction():
    """Classes that are certain: the Hessian is zero, K is, and no direction is made up."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e4, 0.0], [0.0, 1e4]]))
    x, y = torch.eye(2), torch.tensor([0, 1])
    (policy,) = policies(model, nn.CrossEntropyLoss(), x, y, terminal="gauss-newton").values()
    assert feedback_direction(policy).tolist() == [[0.0, 0.0], [0.0, 0.0]]


# projection


def linear_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(12, 7), nn.Identity(), nn.Linear(7, 3)),
    )


@pytest.mark.parametrize("rule", ["deconvnet", "adjoint"])
@pytest.mark.parametrize("layer", ["0", "3", "5"])
def test_projection_is_the_adjoint_of_a_linear_network(double, layer, rule):
    """<D u, v> = <u, J v>."""
    model = linear_cnn()
    x, v = torch.randn(2, 4, 2, 8, 8)
    below = model[: int(layer)]
    jv = (below(x + v) - below(x)).flatten(1)
    u = torch.randn_like(jv)
    image = to_image(model, layer, u, x, rule=rule)
    assert image.shape == x.shape
    torch.testing.assert_close((image * v).flatten(1).sum(1), (u * jv).sum(1))


def test_adjoint_is_back_propagation(double):
    model, (x, _) = cnn(), batch()
    for layer in ("3", "8", "10"):
        leaf = x.clone().requires_grad_()
        state = model[: int(layer)](leaf)
        u = torch.randn_like(state)
        (expected,) = torch.autograd.grad(state, leaf, u)
        found = to_image(model, layer, u.flatten(1), x, rule="adjoint")
        torch.testing.assert_close(found, expected)


def test_deconvnet_by_hand(double):
    """Zeiler & Fergus: unpool with the switches, rectify the signal, transpose the filter."""
    model, (x, _) = cnn(), batch()
    first, second = model[0], model[3]
    pooled, switches = F.max_pool2d(first(x).relu(), 2, return_indices=True)
    u = torch.randn(6, 4)
    tanh = F.interpolate(u.view(6, 4, 1, 1) / 4, scale_factor=2)  # average pooling's adjoint
    signal = F.conv_transpose2d(tanh, second.weight)  # nothing happens to it at tanh
    assert signal.shape == pooled.shape
    signal = F.max_unpool2d(signal, switches, 2).clamp(min=0)
    expected = F.conv_transpose2d(signal, first.weight, padding=1)
    torch.testing.assert_close(to_image(model, "8", u, x), expected)
    # Where a ReLU made the layer's input, the direction itself is rectified ...
    u = torch.randn(6, 5)
    positive = to_image(model, "10", u.clamp(min=0), x)
    torch.testing.assert_close(to_image(model, "10", u, x), positive)
    # ... and the differential image shows both parts.
    negative = to_image(model, "10", (-u).clamp(min=0), x)
    torch.testing.assert_close(differential_image(model, "10", u, x), (positive - negative) / 2)


def test_first_layer_shows_the_direction_itself():
    model, (x, _) = cnn(), batch()
    u = torch.randn(6, 64)
    assert torch.equal(to_image(model, "0", u, x), u.view_as(x))
    assert torch.equal(differential_image(model, "0", u, x), u.view_as(x))


class Written(nn.Module):
    """A chain in code, with functions instead of modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.relu(self.a(x.view(x.size(0), -1)))
        return self.b(h)


def test_chains_in_code():
    torch.manual_seed(0)
    model, x, u = Written(), torch.randn(3, 2, 3), torch.randn(3, 5)
    expected = u.clamp(min=0) @ model.a.weight
    torch.testing.assert_close(to_image(model, "b", u, x), expected.view_as(x))


def test_projection_leaves_model_and_optimizer_alone():
    criterion, (x, y) = nn.CrossEntropyLoss(), batch()
    models = [cnn(), cnn()]
    for look, model in zip((False, True), models, strict=True):
        model.train()
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, keep_policy=True)
        for _ in range(2):
            torch.manual_seed(0)  # dropout
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            if look:
                to_image(model, "8", torch.randn(6, 4), x)
            optimizer.step()
            if look:
                to_image(model, "8", feedback_direction(optimizer.policy["8"]), x)
        assert all(module.training for module in model.modules())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.grad is not None


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x) + x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.a(x))


@pytest.mark.parametrize(
    ("model", "layer", "error", "says"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "2", GraphError, "gelu"),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), "1", GraphError, "layer_norm"),
        (Skip(), "b", GraphError, "chain"),
        (Twice(), "a", GraphError, "more than once"),
        (nn.Sequential(nn.Linear(4, 2)), "5", OptionError, "no such module"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "1", OptionError, "shape"),
    ],
)
def test_what_cannot_be_projected_is_named(model, layer, error, says):
    with pytest.raises(error, match=says):
        to_image(model, layer, torch.randn(3, 4), torch.randn(3, 4))


def test_unknown_rule():
    with pytest.raises(OptionError, match="deconvnet, adjoint"):
        to_image(nn.Linear(2, 2), "", torch.ones(1, 2), torch.ones(1, 2), rule="guided")


# spectra


class OneHotMSE(nn.Module):
    def forward(self, z, y):
        return F.mse_loss(z, F.one_hot(y, z.shape[1]).to(z.dtype))


@pytest.mark.parametrize("preconditioner", ["identity", "rmsprop"])
@pytest.mark.parametrize(
    ("criterion", "count"),
    [(nn.CrossEntropyLoss(), 3), (OneHotMSE(), 4), (ocnopt.MMCLoss(4), 4)],
)
def test_count_is_the_rank_of_the_criterions_hessian(criterion, count, preconditioner):
    """Methods row 20: with k outputs k - 1 for cross-entropy, k for squared errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    x, y = batch((20, 6), classes=4)
    options = {"terminal": "full", "preconditioner": preconditioner}
    *_, last = policies(model, criterion, x, y, **options).values()
    values = feedback_spectrum(last)
    assert values.shape == (9,) and values.dtype == torch.float64
    assert (values[:-1] >= values[1:]).all()
    assert count_above_bulk(values) == count
    assert float(values[count] / values[0]) < 1e-5  # a gap, not a matter of the threshold


def test_counting():
    assert count_above_bulk(torch.tensor([1.0, 0.1, 1e-3, 1e-4])) == 2
    assert count_above_bulk(torch.tensor([1.0, 0.1, 1e-3, 1e-4]), 1e-5) == 4
    assert count_above_bulk(torch.zeros(3)) == 0
    assert count_above_bulk(torch.zeros(0)) == 0
    with pytest.raises(OptionError, match="below 1"):
        count_above_bulk(torch.ones(3), 1.0)


# files


def test_pictures_are_written(tmp_path):
    values = torch.tensor([1.0, 0.5, 1e-8, 0.0])
    panel = Spectra("2 clusters", {"1": values, "9": 2 * values}, marked=2)
    save_spectra(tmp_path / "s.png", "spectra", {"MSE": [panel, panel], "MMC": [panel]})
    images = torch.randn(2, 1, 5, 5)
    columns = {"delta": images, "nothing": torch.zeros_like(images)}
    save_feedback_images(tmp_path / "i.png", "images", ["8", "3"], images, columns)
    for name in ("s.png", "i.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="delta"):
        save_feedback_images(tmp_path / "i.png", "", ["8"], images, {"delta": images})
