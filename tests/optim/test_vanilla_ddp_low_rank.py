"""With first-order dynamics VanillaDDP never forms Q_uu, and makes the same step."""

from __future__ import annotations

import copy
import itertools

import oracles
import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.control import ddp as dense
from ocnopt.control import low_rank
from ocnopt.control.chain import watch_chain
from ocnopt.control.passes import TerminalCall
from ocnopt.control.players import find_players
from ocnopt.control.terminal import TerminalCost
from ocnopt.optim import vanilla_ddp


class MeanOver(nn.Module):
    def forward(self, x):
        return x.mean(1)


def plain(bias=True):
    return nn.Sequential(
        nn.Linear(9, 5, bias), nn.Tanh(), nn.Linear(5, 7, bias), nn.Sigmoid(), nn.Linear(7, 3, bias)
    )


def bottleneck():
    """Fewer states than outputs on the way; a layer without trained weights, one frozen."""
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 5), nn.Linear(5, 4)
    )
    model[2].weight.requires_grad_(False)
    model[4].requires_grad_(False)
    return model


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 2, 2, stride=2, bias=False),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def tokens():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), MeanOver(), nn.Linear(3, 3))


def frozen_ends():
    model = plain()
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    return model


CHAINS = {
    "plain": (plain, (9,)),
    "no bias": (lambda: plain(False), (9,)),
    "bottleneck": (bottleneck, (6,)),
    "conv": (conv, (2, 4, 4)),
    "tokens": (tokens, (2, 5)),
    "frozen ends": (frozen_ends, (9,)),
}
DECAYS = {"none": (0.0, 0.0), "uniform": (0.1, 0.1), "weights": (0.1, 0.0), "each": (0.1, 0.03)}


def both(make, shape, batch, mode, decay, damping=0.05, dtype=torch.float64):
    """Both kinds of passes on the same case, and their policies."""
    model, x, y = make().to(dtype), torch.randn(batch, *shape).to(dtype), torch.arange(batch) % 3
    criterion = nn.CrossEntropyLoss()
    samples = 1 if mode == "joint" else batch
    share = 1 / samples if mode == "share" else 1.0
    players = [p for p in find_players(model)[0] if any(q.requires_grad for q in p.params)]
    decays = {p: tuple(torch.full_like(q, decay[q.dim() == 1]) for q in p.params) for p in players}
    with torch.no_grad():
        watch = watch_chain(players)
        with watch:
            output = model(x)
        chain = watch.chain(output)
        call = TerminalCall(output, (y,), {}, criterion(output, y))
        v, k = TerminalCost(criterion, "full").expansion(call, samples, positive=True)
        found = []
        for passes in (
            low_rank.LowRankDDP(chain, decays, samples, dtype, share),
            dense.DDP(chain, decays, samples, dtype, share, order=1),
        ):
            policies = passes.backward(v * samples, k * samples, damping)
            assert policies is not None
            found.append((passes, policies))
    return found


@pytest.mark.parametrize("mode", ["mean", "share", "joint"])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("batch", [2, 30])
def test_it_equals_the_dense_passes(name, mode, decay, batch, monkeypatch):
    values: dict[object, list[tuple[torch.Tensor, torch.Tensor]]] = {low_rank: [], dense: []}
    for module, seen in values.items():
        true = module._value

        def watched(*args, true=true, seen=seen):
            seen.append(true(*args))
            return seen[-1]

        monkeypatch.setattr(module, "_value", watched)
    (low, ours), (full, theirs) = both(*CHAINS[name], batch, mode, DECAYS[decay])
    worst = []
    for one, two in zip(ours, theirs, strict=True):
        assert (one is None) == (two is None)
        if two is None:
            continue
        dx = torch.randn(full.samples, 0 if two.gain is None else two.gain.shape[2])
        if two.gain is not None:
            worst.append(oracles.relative_error(one.change(0.0, dx), two.change(0.0, dx)))
        worst.append(oracles.relative_error(one.step, two.k.mean(0)))
        worst.append(abs(one.slope / two.slope - 1))
        worst.append(abs(one.bow / two.bow - 1))
    assert len(values[low_rank]) == len(values[dense]) == len(theirs) - 1
    for (v, z), (w, k) in zip(values[low_rank], values[dense], strict=True):
        assert z.shape[1] <= z.shape[2]
        worst.append(oracles.relative_error(v, w))
        worst.append(oracles.relative_error(z.mT @ z, k))
    rates = {p.control.player: 0.7 for p in theirs if p is not None}
    with torch.no_grad():
        (a, new_a), (b, new_b) = low.forward(ours, rates), full.forward(theirs, rates)
    worst.append(oracles.relative_error(a, b))
    for player, params in new_b.items():
        worst += map(oracles.relative_error, new_a[player], params)
    assert max(worst) < 1e-9, worst


@pytest.mark.parametrize("mode", ["mean", "share", "joint"])
def test_both_systems_are_used(mode):
    kinds = set()
    for batch in (2, 30):
        (_, policies), _ = both(*CHAINS["plain"], batch, mode, (0.1, 0.0))
        kinds |= {type(p.system) for p in policies}
    assert kinds == {low_rank._ColumnSystem, low_rank._ParameterSystem}


def passes_of(monkeypatch, **options):
    """Which kind of passes a step with these options makes."""
    made = []
    for name in ("DDP", "LowRankDDP"):
        kind = getattr(vanilla_ddp, name)

        def make(*args, kind=kind, name=name):
            made.append(name)
            return kind(*args)

        monkeypatch.setattr(vanilla_ddp, name, make)
    optimizer = ocnopt.VanillaDDP(plain(), nn.CrossEntropyLoss(), **options)
    optimizer.step(torch.randn(4, 9), torch.arange(4) % 3)
    return made


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "LowRankDDP"),
        ({"damping": 0.0, "weight_decay": 0.1}, "LowRankDDP"),
        ({"damping": 0.0}, "DDP"),
        ({"state_reg": 0.1}, "DDP"),
        ({"dynamics_order": 2}, "DDP"),
    ],
)
def test_where_it_applies(options, kind, monkeypatch):
    assert passes_of(monkeypatch, **options) == [kind]


@pytest.mark.parametrize("batch", ["mean", "share", "joint"])
def test_training_is_the_same(batch, monkeypatch):
    """Ten steps, their backtracking and damping included."""
    model = plain()
    twin = copy.deepcopy(model)
    options = {"batch": batch, "weight_decay": 1e-3, "damping": 0.1}
    one = ocnopt.VanillaDDP(model, nn.CrossEntropyLoss(), **options)
    two = ocnopt.VanillaDDP(twin, nn.CrossEntropyLoss(), **options)
    monkeypatch.setattr(two, "_low_rank", lambda decays: False)
    batches = [(torch.randn(6, 9), torch.arange(6) % 3) for _ in range(10)]
    for x, y in batches:
        losses = float(one.step(x, y)), float(two.step(x, y))
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
        assert one.alpha == two.alpha and one.damping == two.damping
        rows = one.diagnostics.total, two.diagnostics.total
        assert rows[0].predicted_decrease == pytest.approx(rows[1].predicted_decrease, rel=1e-6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-9)


def test_a_large_first_layer_is_no_obstacle():
    """Its Q_uu alone would take 1.3 TiB."""
    model = nn.Sequential(nn.Linear(4200, 100), nn.ReLU(), nn.Linear(100, 3)).float()
    optimizer = ocnopt.VanillaDDP(model, nn.CrossEntropyLoss())
    x, y = torch.randn(8, 4200, dtype=torch.float32), torch.arange(8) % 3
    losses = [float(optimizer.step(x, y)) for _ in range(5)]
    assert all(b < a for a, b in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("mode", ["mean", "share", "joint"])
@pytest.mark.parametrize("damping", [1e-5, 1e-3])
def test_single_precision_loses_no_more_than_it_did(mode, damping):
    steps = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(4)
        (_, ours), (_, theirs) = both(*CHAINS["plain"], 8, mode, (0.0, 0.0), damping, dtype)
        steps[dtype] = [p.step for p in ours], [p.k.mean(0) for p in theirs]
    exact = steps[torch.float64][1]
    error, before = (
        max(oracles.relative_error(a.double(), b) for a, b in zip(found, exact, strict=True))
        for found in steps[torch.float32]
    )
    assert error < max(before, 1e-4), (error, before)


def test_a_criterion_without_curvature():
    model = plain()
    optimizer = ocnopt.VanillaDDP(model, ocnopt.Criterion(lambda o: o[:, 0].mean()), damping=1.0)
    before = model[4].bias.detach().clone()
    optimizer.step(torch.randn(4, 9))
    assert optimizer.diagnostics.total.failures == 0
    assert torch.allclose(model[4].bias - before, torch.tensor([-1.0, 0.0, 0.0]))
