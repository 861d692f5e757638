"""E-MSA: its co-states, its augmented Hamiltonian, its reduction to SGD, and its manners.

Source: DDPNOpt paper, appendix A.1 (Eq. 19 to 24, Lemma 5); Li, Chen, Tai & E (2017).
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import ocnopt
from ocnopt.control.chain import watch_chain
from ocnopt.control.hamiltonian import AugmentedHamiltonian, costates, gradient
from ocnopt.control.players import find_players


def fc():
    """Each entry of the list is a stage."""
    stages = [
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 3, bias=False), nn.Sigmoid()),
        nn.Sequential(nn.Linear(3, 6), nn.Softplus()),
        nn.Sequential(nn.Linear(6, 3)),
    ]
    return nn.Sequential(*stages), torch.randn(7, 4)


def conv():
    stages = [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(4, 3)),
    ]
    return nn.Sequential(*stages), torch.randn(5, 2, 6, 6)


NETWORKS = {"fc": fc, "conv": conv}


def labels(x, classes=3):
    return torch.randint(classes, (len(x),))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left, right, tolerance=0.0):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def watched(model, x, y, criterion):
    """The chain, and p_T of the samples' own costs under a mean."""
    watch = watch_chain(find_players(model)[0])
    with torch.no_grad(), watch:
        output = model(x)
    chain = watch.chain(output)
    end = chain.output.clone().requires_grad_()
    (slope,) = torch.autograd.grad(criterion(end, y), end)
    return chain, slope * len(x)


def hamiltonians(model, x, y, criterion, rho, decay=0.0):
    chain, end = watched(model, x, y, criterion)
    p = costates(chain, end)
    states = [*(link.x for link in chain.links), chain.output]
    return [
        AugmentedHamiltonian(
            link, states[t + 1], p[t], p[t + 1], 1 / len(x), rho, (decay,) * len(link.player.params)
        )
        for t, link in enumerate(chain.links)
    ]


# --- the reduction to SGD (Lemma 5) --------------------------------------------------------------


def against_sgd(model, x, rho=0.0, lr=0.3, decay=0.0, reduction="mean", steps=5):
    twin = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    mine = ocnopt.EMSA(
        model, criterion, lr=lr, rho=rho, inner="gradient", inner_steps=1, weight_decay=decay
    )
    theirs = torch.optim.SGD(twin.parameters(), lr=lr, weight_decay=decay)
    for _ in range(steps):
        batch = x + torch.randn_like(x)
        y = labels(x)
        loss = mine.step(batch, y)
        theirs.zero_grad()
        expected = criterion(twin(batch), y)
        expected.backward()
        theirs.step()
        assert loss.shape == () and not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    assert_same(weights(model), weights(twin), 1e-12)
    assert_same(model.buffers(), twin.buffers(), 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("network", NETWORKS)
def test_one_gradient_step_is_sgd(network, decay):
    model, x = NETWORKS[network]()
    against_sgd(model, x, decay=decay)


def test_one_gradient_step_is_sgd_for_a_sum():
    model, x = fc()
    against_sgd(model, x, lr=0.05, decay=0.1, reduction="sum")


def test_one_gradient_step_is_sgd_whatever_rho():
    """Both norms vanish with their gradients where the minimization starts."""
    model, x = fc()
    against_sgd(model, x, rho=7.0)


def test_two_gradient_steps_feel_rho():
    model, x = fc()
    twin, y = copy.deepcopy(model), labels(x)
    for net, rho in ((model, 0.0), (twin, 7.0)):
        ocnopt.EMSA(
            net, nn.CrossEntropyLoss(), lr=0.1, rho=rho, inner="gradient", inner_steps=2
        ).step(x, y)
    assert not torch.equal(model[0][0].weight, twin[0][0].weight)


@pytest.mark.parametrize("rho", [0.0, 2.0])
def test_batch_statistics_are_part_of_the_state(rho):
    """The state is the whole batch, and running statistics move once per step."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    against_sgd(model, torch.randn(6, 4), rho=rho)


def test_embedding_first():
    """Integers have no co-state: the first layer's last norm is dropped."""

    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    twin, x = copy.deepcopy(model), torch.randint(9, (6, 3))
    y, criterion = labels(x), nn.CrossEntropyLoss()
    ocnopt.EMSA(model, criterion, lr=0.2, rho=2.0, inner="gradient", inner_steps=1).step(x, y)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.2)
    criterion(twin(x), y).backward()
    theirs.step()
    assert_same(weights(model), weights(twin), 1e-12)
    ocnopt.EMSA(model, criterion, rho=2.0).step(x, y)


def test_dropout_is_the_same_in_every_evaluation():
    """The inner objective is that of the masks of the forward pass; random state moves once."""
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 3))
    twin, x = copy.deepcopy(model), torch.randn(6, 4)
    y, criterion = labels(x), nn.CrossEntropyLoss()
    torch.manual_seed(3)
    ocnopt.EMSA(model, criterion, lr=0.2, rho=2.0, inner="gradient", inner_steps=1).step(x, y)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.2)
    criterion(twin(x), y).backward()
    theirs.step()
    assert_same(weights(model), weights(twin), 1e-12)
    assert torch.equal(after, torch.get_rng_state())


# --- co-states and the augmented Hamiltonian -----------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_costates_are_the_gradients_of_the_samples_costs(network):
    model, x = NETWORKS[network]()
    y, criterion = labels(x), nn.CrossEntropyLoss()
    states = [x.clone().requires_grad_()]
    for stage in model:
        states.append(stage(states[-1]))
    expected = torch.autograd.grad(criterion(states[-1], y), states)
    found = costates(*watched(model, x, y, criterion))
    assert_same(found, [len(x) * g for g in expected], 1e-13)


def dense(stage, x, after, p, p_after, u, rho, decay):
    """Eq. 23 with squared norms, the mean over samples, from one dense Jacobian per sample."""

    def f(state):
        return functional_call(stage, u, (state.unsqueeze(0),)).flatten()

    total = torch.zeros(())
    for i in range(len(x)):
        costate = p_after[i].flatten()
        jacobian = jacrev(f)(x[i]).reshape(costate.numel(), -1)
        total = total + costate @ f(x[i])
        total = total + rho / 2 * (after[i].flatten() - f(x[i])).square().sum()
        total = total + rho / 2 * (p[i].flatten() - jacobian.T @ costate).square().sum()
    return total / len(x) + sum(decay / 2 * part.square().sum() for part in u.values())


@pytest.mark.parametrize("away", [0.0, 0.3])
@pytest.mark.parametrize("network", NETWORKS)
def test_value_and_gradient_against_dense_jacobians(network, away):
    model, x = NETWORKS[network]()
    y, rho, decay = labels(x), 1.7, 0.2
    for t, problem in enumerate(hamiltonians(model, x, y, nn.CrossEntropyLoss(), rho, decay)):
        u = {
            name: (q + away * torch.randn_like(q)).detach().requires_grad_()
            for name, q in model[t].named_parameters()
        }
        expected = dense(
            model[t], problem.link.x, problem.after, problem.p, problem.p_after, u, rho, decay
        )
        found = problem(tuple(u.values()))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        slopes = torch.autograd.grad(expected, list(u.values()))
        assert_same(gradient(found, tuple(u.values())), slopes, 1e-12)


# --- the minimization ----------------------------------------------------------------------------


def test_minimizer_of_a_convex_case():
    """Linear layers, rho > 0: H~ is a strongly convex quadratic in each layer's weights."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    criterion = nn.MSELoss()
    problems = hamiltonians(model, x, y, criterion, rho=2.0)
    optimizer = ocnopt.EMSA(model, criterion, rho=2.0, inner_steps=60)
    optimizer.step(x, y)
    for problem, layer in zip(problems, model, strict=True):
        u = (layer.weight, layer.bias)
        assert max(g.abs().max() for g in gradient(problem(u), u)) < 1e-7


@pytest.mark.parametrize("inner", ["lbfgs", "gradient"])
def test_every_layer_lowers_its_own_objective(inner):
    model, x = fc()
    y, criterion = labels(x), nn.CrossEntropyLoss()
    problems = hamiltonians(model, x, y, criterion, rho=1.0)
    before = [float(p(p.link.player.params).detach()) for p in problems]
    lr = 1.0 if inner == "lbfgs" else 0.1
    ocnopt.EMSA(model, criterion, lr=lr, rho=1.0, inner=inner).step(x, y)
    after = [float(p(p.link.player.params).detach()) for p in problems]
    assert all(b > a for b, a in zip(before, after, strict=True))


def test_a_large_rho_pins_the_weights():
    sizes = []
    for rho in (1e1, 1e3, 1e5):
        torch.manual_seed(1)
        model, x = fc()
        before = weights(model)
        ocnopt.EMSA(model, nn.CrossEntropyLoss(), rho=rho, inner_steps=200).step(x, labels(x))
        change = [a - b for a, b in zip(weights(model), before, strict=True)]
        sizes.append(torch.cat([c.flatten() for c in change]).norm())
    assert sizes[1] < 0.05 * sizes[0] and sizes[2] < 0.05 * sizes[1]
    assert sizes[2] < 1e-3


def test_defaults_train_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(bunch.target)
    torch.set_default_dtype(torch.float32)
    layers = [nn.Linear(64, 16), nn.Tanh()]
    for _ in range(3):
        layers += [nn.Linear(16, 16), nn.Tanh()]
    model, criterion = nn.Sequential(*layers, nn.Linear(16, 10)), nn.CrossEntropyLoss()
    optimizer = ocnopt.EMSA(model, criterion)
    for _ in range(40):
        batch = torch.randint(len(x), (32,))
        optimizer.step(x[batch], y[batch])
    with torch.no_grad():
        assert criterion(model(x), y) < 1.0  # from 2.3 at the start


def test_channels_last_and_frozen_layers():
    model, x = conv()
    model = model.to(memory_format=torch.channels_last)
    for p in model[0].parameters():
        p.requires_grad_(False)
    model[2][0].bias.requires_grad_(False)
    before = weights(model)
    ocnopt.EMSA(model, nn.CrossEntropyLoss()).step(x, labels(x))
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [p.requires_grad for p in model.parameters()]


def test_under_autocast():
    """Also with several steps in one block, whose cache of cast weights must not go stale."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    x, plain, fallen = torch.randn(16, 4).float(), copy.deepcopy(model), []
    y = x[:, :3].argmax(1)
    for net, enabled in ((model, True), (plain, False)):
        optimizer = ocnopt.EMSA(net, nn.CrossEntropyLoss(), rho=1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = [float(optimizer.step(x, y)) for _ in range(8)]
        fallen.append(losses[0] - losses[-1])
    assert fallen[0] > 0.8 * fallen[1] > 0.1


def test_several_inputs_and_targets():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, scale):
            return self.layer(x * scale)

    def weighted(output, y, weight):
        return (nn.functional.cross_entropy(output, y, reduction="none") * weight).mean()

    x, y, scale, weight = torch.randn(6, 4), torch.randint(3, (6,)), torch.rand(6, 1), torch.rand(6)
    model = Scaled()
    expected = weighted(model(x, scale), y, weight)
    loss = ocnopt.EMSA(model, weighted).step((x, scale), y, weight)
    torch.testing.assert_close(loss, expected.detach())


# --- what is not finite --------------------------------------------------------------------------


def normed():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def refused(model, optimizer, x, y, name):
    before, buffers = weights(model), [b.clone() for b in model.buffers()]
    with pytest.raises(ocnopt.NonFiniteError, match=f"'{name}'"):
        optimizer.step(x, y)
    assert_same(before, weights(model))
    assert_same(buffers, model.buffers())


def test_a_batch_that_is_not_finite():
    model, x = normed(), torch.randn(6, 4)
    x[2, 1] = float("nan")
    refused(model, ocnopt.EMSA(model, nn.CrossEntropyLoss()), x, labels(x), "0")


def test_a_costate_that_is_not_finite():
    class Root(nn.Module):
        def forward(self, h):
            return (h * 0).sqrt()  # zero times a slope of infinity

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), Root(), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    refused(model, ocnopt.EMSA(model, nn.CrossEntropyLoss()), x, labels(x), "1")

    def root(output, y):
        return (output * 0).sqrt().sum()

    model = normed()
    refused(model, ocnopt.EMSA(model, root), x, labels(x), "3")


def test_a_minimum_that_does_not_exist():
    """rho = 0: the Hamiltonian of the last layer is linear in its weights."""
    model, x = normed(), torch.randn(6, 4)
    optimizer = ocnopt.EMSA(model, nn.CrossEntropyLoss(), rho=0.0, inner_steps=100)
    refused(model, optimizer, x, labels(x), "3")
    optimizer.param_groups[0].update(rho=3.0)
    optimizer.step(x, labels(x))  # it can go on


# --- groups, schedulers, checkpoints -------------------------------------------------------------


def test_groups_are_apart():
    model, x = fc()
    groups = [{"params": "0", "lr": 0.0}, {"params": "1", "rho": 1e6}, {"params": "2"}]
    optimizer = ocnopt.EMSA(model, nn.CrossEntropyLoss(), rho=1.0, params=groups)
    before = weights(model)
    optimizer.step(x, labels(x))
    change = [(a - b).abs().max() for a, b in zip(weights(model), before, strict=True)]
    assert change[0] == change[1] == 0
    assert 0 < change[2] < 1e-3 and change[3] > 1e-2


def test_weight_and_bias_are_minimized_over_together():
    model, x = fc()
    groups = [{"params": "0.0.bias", "lr": 0.5}]
    optimizer = ocnopt.EMSA(model, nn.CrossEntropyLoss(), params=groups)
    with pytest.raises(ocnopt.OptionError, match=r"layer '0.0'.*different lr"):
        optimizer.step(x, labels(x))
    # A gradient step takes them apart.
    twin, y = copy.deepcopy(model), labels(x)
    ocnopt.EMSA(
        model, nn.CrossEntropyLoss(), lr=0.1, inner="gradient", inner_steps=1, params=groups
    ).step(x, y)
    bias = twin[0][0].bias
    rest = [p for p in twin.parameters() if p is not bias]
    theirs = torch.optim.SGD([{"params": [bias], "lr": 0.5}, {"params": rest}], lr=0.1)
    nn.CrossEntropyLoss()(twin(x), y).backward()
    theirs.step()
    assert_same(weights(model), weights(twin), 1e-12)


def test_a_layer_added_later_must_be_in_a_group():
    model, x = fc()
    optimizer = ocnopt.EMSA(model, nn.CrossEntropyLoss())
    model.append(nn.Linear(3, 3))
    with pytest.raises(ocnopt.OptionError, match="layer '4' is in no parameter group"):
        optimizer.step(x, labels(x))
    optimizer.add_param_group({"params": "4"})
    optimizer.step(x, labels(x))


@pytest.mark.parametrize("inner", ["lbfgs", "gradient"])
def test_schedulers(inner):
    """A schedule is the same as setting lr by hand."""
    model, x = fc()
    twin, y, criterion = copy.deepcopy(model), labels(x), nn.CrossEntropyLoss()
    one = ocnopt.EMSA(model, criterion, lr=0.2, inner=inner, line_search=None)
    two = ocnopt.EMSA(twin, criterion, lr=0.2, inner=inner, line_search=None)
    schedule = torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
    for i in range(3):
        two.param_groups[0]["lr"] = 0.2 * 0.5**i
        one.step(x, y)
        schedule.step()
        two.step(x, y)
    assert_same(weights(model), weights(twin))
    start = weights(model)
    one.param_groups[0]["lr"] = 0.0
    one.step(x, y)
    assert_same(start, weights(model))


@pytest.mark.parametrize("inner", ["lbfgs", "gradient"])
def test_resume_is_bit_exact(inner, tmp_path):
    model, x = fc()
    options = {"lr": 0.1, "rho": 2.0, "inner": inner, "weight_decay": 0.01}
    batches = [(x + torch.randn_like(x), labels(x)) for _ in range(6)]
    optimizer = ocnopt.EMSA(model, nn.CrossEntropyLoss(), **options)
    for batch in batches[:3]:
        optimizer.step(*batch)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "kept.pt")
    for batch in batches[3:]:
        optimizer.step(*batch)
    again, _ = fc()
    second = ocnopt.EMSA(again, nn.CrossEntropyLoss(), inner=inner)
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    again.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    for batch in batches[3:]:
        second.step(*batch)
    assert_same(weights(model), weights(again))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"rho": -1.0},
        {"rho": float("inf")},
        {"rho": "3"},
        {"inner_steps": 0},
        {"inner_steps": 2.0},
        {"inner_steps": True},
        {"inner": "adam"},
        {"line_search": "armijo"},
        {"history_size": 0},
        {"weight_decay": -0.1},
        {"reduction": "none"},
    ],
)
def test_bad_options(options):
    model, _ = fc()
    with pytest.raises(ocnopt.OptionError, match=next(iter(options))):
        ocnopt.EMSA(model, nn.CrossEntropyLoss(), **options)


def test_bad_arguments():
    model, x = fc()
    with pytest.raises(ocnopt.OptionError, match=r"model\.parameters\(\)"):
        ocnopt.EMSA(model.parameters(), nn.CrossEntropyLoss())
    with pytest.raises(ocnopt.OptionError, match="criterion"):
        ocnopt.EMSA(model, None)
    with pytest.raises(ocnopt.OptionError, match="no option 'momentum'"):
        ocnopt.EMSA(model, nn.CrossEntropyLoss(), params=[{"params": "0", "momentum": 0.9}])
    optimizer = ocnopt.EMSA(model, nn.CrossEntropyLoss())
    for wrong in ((), (lambda: 0.0,)):
        with pytest.raises(ocnopt.OptionError, match=r"optimizer\.step\(x, y\)"):
            optimizer.step(*wrong)
    with pytest.raises(ocnopt.OptionError, match="one number"):
        ocnopt.EMSA(model, nn.CrossEntropyLoss(reduction="none")).step(x, labels(x))
    with pytest.raises(ocnopt.OcnoptError, match="copied"):
        pickle.dumps(optimizer)


def test_several_processes(monkeypatch):
    model, x = fc()
    monkeypatch.setattr("ocnopt.optim.batchwise.processes", lambda: 2)
    with pytest.raises(ocnopt.OcnoptError, match="2 processes"):
        ocnopt.EMSA(model, nn.CrossEntropyLoss()).step(x, labels(x))


def test_no_chain():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.one(x)
            return h + self.two(h)

    model, x = Residual(), torch.randn(5, 4)
    before = weights(model)
    with pytest.raises(ocnopt.GraphError, match="no chain"):
        ocnopt.EMSA(model, nn.CrossEntropyLoss()).step(x, labels(x))
    assert_same(before, weights(model))


def test_parameters_without_a_hamiltonian():
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    optimizer = ocnopt.EMSA(model, nn.CrossEntropyLoss())
    x = torch.randn(5, 4)
    optimizer.step(x, labels(x))
    model[1].requires_grad_(True)
    before = weights(model)
    for refused_call in (
        lambda: optimizer.step(x, labels(x)),
        lambda: ocnopt.EMSA(model, nn.CrossEntropyLoss()),
    ):
        with pytest.raises(ocnopt.GraphError, match=r"'1\.weight'.*requires_grad_\(False\)"):
            refused_call()
    assert_same(before, weights(model))


def test_a_weight_used_without_its_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.idle = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.one(x) @ self.two.weight

    model, x = Model(), torch.randn(5, 4)
    with pytest.raises(ocnopt.GraphError, match=r"layer 'two'"):
        ocnopt.EMSA(model, nn.CrossEntropyLoss()).step(x, labels(x))
    model.two.requires_grad_(False)
    idle = model.idle.weight.clone()
    ocnopt.EMSA(model, nn.CrossEntropyLoss()).step(x, labels(x))
    assert torch.equal(idle, model.idle.weight)  # as SGD leaves what has no gradient


def test_coverage():
    model, _ = fc()
    rows = ocnopt.EMSA(model, nn.CrossEntropyLoss()).coverage()
    assert [row.parameter for row in rows] == [name for name, _ in model.named_parameters()]
    assert {row.treatment for row in rows} == {"player"}
