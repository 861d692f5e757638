"""terminal="full" where it is defined, and one clear error where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ocnopt
from ocnopt.control import dense
from ocnopt.errors import GraphError, NonFiniteError, OptionError

CRITERION = nn.CrossEntropyLoss()


def step(model, x, y, seed=0, **options):
    """Parameters after one step on a copy, all flattened, in float64."""
    model = copy.deepcopy(model).double()
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.3, **options)
    torch.manual_seed(seed)
    CRITERION(model(x.double()), y).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Eventful(nn.Module):
    """A chain written as users write them: in-place, functional, reshaping, random, a constant."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.first, self.second = nn.Linear(27, 6), nn.Linear(6, 4)
        self.dropout = dropout
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        x = F.relu_(self.conv(x))
        x = F.max_pool2d(x, 2).permute(0, 2, 3, 1).reshape(len(x), -1)
        x = torch.tanh(self.first(x)) * self.scale
        x += 0.1
        x = F.dropout(x, self.dropout, self.training)
        return 2 * self.second(x)


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("bellman", ["share", "joint"])
def test_any_chain(bellman, rollout):
    torch.manual_seed(0)
    x, y = torch.randn(5, 1, 6, 6), torch.randint(4, (5,))
    options = {"bellman": bellman, "rollout": rollout}
    model = Eventful()
    full = step(model, x, y, terminal="full", **options)
    columns = step(model, x, y, terminal="gauss-newton", **options)
    torch.testing.assert_close(full, columns, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_dropout_keeps_its_mask_and_the_random_stream(rollout):
    """The second look at the forward pass draws what the first one drew, and leaves no trace."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 1, 6, 6), torch.randint(4, (5,))
    model = Eventful(0.5)
    full = step(model, x, y, terminal="full", rollout=rollout)
    after = torch.get_rng_state()
    columns = step(model, x, y, terminal="gauss-newton", rollout=rollout)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(full, columns, rtol=1e-10, atol=1e-12)


def test_loss_on_a_view_of_the_output():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3).double(), torch.randint(2, (4, 3))
    steps = []
    for terminal in ("full", "gauss-newton"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6)).double()
        optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.3, terminal=terminal)
        CRITERION(model(x).view(4, 2, 3), y).backward()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear", "off"])
@pytest.mark.parametrize("preconditioner", ["identity", "adam", "kfac"])
@pytest.mark.parametrize("bellman", ["share", "joint", "off"])
def test_one_output(bellman, preconditioner, rollout, size):
    """A single output is a matrix of one entry, not a coefficient."""
    steps = []
    for terminal in ("full", "gauss-newton"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        x, y = torch.randn(size, 3).double(), torch.randn(size).double()
        criterion = nn.MSELoss()
        optimizer = ocnopt.DDPNOpt(
            model,
            criterion,
            lr=0.1,
            terminal=terminal,
            bellman=bellman,
            rollout=rollout,
            preconditioner=preconditioner,
        )
        criterion(model(x).squeeze(-1), y).backward()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep_policy", [False, True])
def test_indices_in_front(keep_policy):
    steps = []
    for terminal in ("full", "gauss-newton"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
        x, y = torch.randint(7, (5, 3)), torch.randint(3, (5,))
        optimizer = ocnopt.DDPNOpt(
            model, CRITERION, lr=0.3, terminal=terminal, keep_policy=keep_policy
        )
        CRITERION(model(x), y).backward()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        if keep_policy:
            assert optimizer.policy["2"].V_x.shape == (5, 12)
            with pytest.raises(GraphError, match="not differentiable"):
                _ = optimizer.policy["0"].V_x
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-12)


def test_second_order_where_ranks_are_low():
    """In single precision an eigenvalue solver fails on such matrices."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)),
            *(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)),
        )
        optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.1, terminal="full", dynamics_order=2)
        CRITERION(model(torch.randn(4, 1, 8, 8)), torch.randint(3, (4,))).backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("terminal", ["full", "gauss-newton"])
def test_a_hessian_that_is_not_finite_is_named(terminal):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    criterion = ocnopt.Criterion(lambda o, y: (o.pow(2).sum(1) + 0 * y).pow(0.75).mean())
    before = copy.deepcopy(model.state_dict())
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, terminal=terminal)
    with pytest.raises(NonFiniteError, match="Hessian of the loss"):
        criterion(model(torch.randn(5, 3)), torch.zeros(5)).backward()
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["output", "input"])
def test_a_hook_that_changes_a_layer_is_refused(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    if kind == "output":
        model[2].register_forward_hook(lambda module, args, output: output * 2)
    else:
        model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.1, terminal="full")
    CRITERION(model(torch.randn(5, 3)), torch.randint(2, (5,))).backward()
    with pytest.raises(GraphError, match=r"hook of layer '2' changes"):
        optimizer.step()


def test_a_hook_that_only_looks_and_a_penalty_are_no_obstacle():
    class Penalized(nn.Sequential):
        def forward(self, x):
            self.penalty = self[0].weight.square().sum()
            return super().forward(x.type_as(self[0].weight))

    model = Penalized(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.1, terminal="full")
    loss = CRITERION(model(torch.randn(5, 3)), torch.randint(2, (5,)))
    (loss + 0.1 * model.penalty).backward()
    optimizer.step()
    assert seen


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.c(x + torch.tanh(self.b(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) @ self.a.weight)


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Skip(), r"after layer 'b' it reads a tensor made before it \(after layer 'a'\)"),
        (Twice(), r"layer 'a' is called twice"),
        (Tied(), r"weights of layer 'a' are used outside its own call"),
        (Parallel(), r"layer 'b' does not read what layer 'a' made"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
            r"layer '1' normalizes by the statistics of its batch",
        ),
    ],
    ids=["skip", "twice", "tied", "parallel", "batch statistics"],
)
def test_what_is_no_chain_is_refused_by_name(model, message):
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.1, terminal="full")
    before = copy.deepcopy(model.state_dict())
    CRITERION(model(x), y).backward()
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    with pytest.raises(GraphError, match=message) as error:
        optimizer.step()
    assert "matched" in str(error.value)
    for name, value in model.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, before[name]), f"{name} was changed"
    for name, value in statistics.items():
        assert torch.equal(model.state_dict()[name], value), f"{name} was updated twice"


def test_samples_that_depend_on_one_another_are_refused():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3))
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.1, terminal="full")
    CRITERION(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
    with pytest.raises(GraphError, match=r"layer '0'.* depend on one another"):
        optimizer.step()


def test_what_does_not_fit_is_refused_with_its_size(monkeypatch):
    """The message says how much it would take and what to use instead."""
    monkeypatch.setattr(dense, "room", lambda device: 2.0**20)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 3))
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.1, terminal="full")
    CRITERION(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
    with pytest.raises(GraphError, match=r"about 0\.0 GiB.* layer '0' \(300 outputs") as error:
        optimizer.step()
    assert "terminal='matched'" in str(error.value)


def test_second_order_is_for_affine_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.1, terminal="full", dynamics_order=2)
    CRITERION(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
    with pytest.raises(GraphError, match=r"'1' is LayerNorm"):
        optimizer.step()
    full = step(model, torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1]), terminal="full")
    columns = step(model, torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1]), terminal="gauss-newton")
    torch.testing.assert_close(full, columns, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_reg": 0.1}, r"value_reg needs .*terminal='full', not 'bounded'"),
        ({"dynamics_order": 2, "terminal": "gauss-newton"}, r"dynamics_order=2 needs"),
        ({"dynamics_order": 3, "terminal": "full"}, r"must be 1 or 2"),
        ({"value_reg": -1.0, "terminal": "full"}, r"at least 0"),
        ({"terminal": "full", "keep_grad": False}, r"keep_grad=False is not possible"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        ocnopt.DDPNOpt(nn.Linear(3, 2), CRITERION, lr=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [1, 2])
def test_low_precision(dtype, order):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(8, 4).to(dtype), torch.randint(3, (8,))
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.3, terminal="full", dynamics_order=order)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = CRITERION(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("terminal", ["full", "gauss-newton"])
def test_a_layer_that_was_frozen_refreshes_its_factors_with_the_others_again(terminal, kind):
    """Refreshes are due in steps 0, 4, 8 and 12; who is away in step 8 has its own when back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    rules = {"kfac": ocnopt.curvature.KFAC, "ekfac": ocnopt.curvature.EKFAC}
    rule = rules[kind](update_every=4)
    optimizer = ocnopt.DDPNOpt(model, CRITERION, lr=0.01, preconditioner=rule, terminal=terminal)
    away, others = model[2], (model[0], model[4])
    refreshed = {layer: [] for layer in (away, *others)}
    for i in range(14):
        away.requires_grad_(not 5 <= i < 10)
        optimizer.zero_grad()
        CRITERION(model(torch.randn(6, 3)), torch.randint(2, (6,))).backward()
        optimizer.step()
        for layer, steps in refreshed.items():
            last = optimizer.state[layer.weight]["refreshed"]
            if last not in steps:
                assert last == i
                steps.append(last)
    assert refreshed[away] == [0, 4, 10, 12]
    assert all(refreshed[layer] == [0, 4, 8, 12] for layer in others)
