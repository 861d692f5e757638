"""Two processes with half a batch each take the step of one with the whole batch."""

import copy
import sys
from functools import partial

import games
import pytest
import torch
from torch import nn
from two_processes import results_of, work

import ocnopt

NAMES = ("identity", "rmsprop", "adam", "kfac", "ekfac")
CASES = [
    *((name, bellman, "linear", "ddp") for name in NAMES for bellman in ("share", "joint")),
    ("identity", "sample", "linear", "raw"),
    ("identity", "share", "linear", "raw"),
    ("kfac", "share", "linear", "raw"),
    ("identity", "off", "linear", "ddp"),
    ("adam", "share", "nonlinear", "ddp"),
    ("exact identity", "share", "linear", "ddp"),
    ("exact ekfac", "sample", "nonlinear", "ddp"),
    ("full identity", "share", "linear", "ddp"),
    ("full kfac", "joint", "nonlinear", "ddp"),
    ("second-order rmsprop", "share", "linear", "ddp"),
    ("game kfac", "share", "linear", "ddp"),
    ("game ekfac", "joint", "linear", "ddp"),
    ("KFAC", None, None, "ddp"),
    ("EKFAC", None, None, "raw"),
]
STEPS = 3


def model_of(case=CASES[0]):
    torch.manual_seed(0)
    if case[0].startswith("game"):
        return nn.Sequential(nn.Linear(5, 4), games.Residual()).double()
    norm = nn.Identity() if case[0].startswith("second-order") else nn.LayerNorm(7)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), norm, nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def batch_of(i):
    g = torch.Generator().manual_seed(i)
    return (
        torch.randn(12, 5, generator=g, dtype=torch.float64),
        torch.randint(3, (12,), generator=g),
    )


def optimizer_of(case, model, criterion):
    name, bellman, rollout, _ = case
    if name in ("KFAC", "EKFAC"):
        return getattr(ocnopt, name)(model, criterion, lr=0.02, damping=0.1, update_every=2)
    form, _, name = name.rpartition(" ")
    options = {}
    if form == "exact":
        options = {"terminal": "gauss-newton"}
    elif form and form != "game":
        options = {"terminal": "full", "value_reg": 0.05}
        options["dynamics_order"] = 2 if form == "second-order" else 1
    rule = {
        "identity": ocnopt.curvature.Identity,
        "rmsprop": lambda: ocnopt.curvature.RMSprop(eps=1e-3),
        "adam": lambda: ocnopt.curvature.Adam(eps=1e-3),
        "kfac": lambda: ocnopt.curvature.KFAC(damping=0.1, update_every=2),
        "ekfac": lambda: ocnopt.curvature.EKFAC(damping=0.1, update_every=2),
    }[name]()
    lr = 0.1 if name == "identity" else 0.01
    kind = ocnopt.DDPNOpt
    if form == "game":  # processes have to choose the same alignment
        kind = ocnopt.DGNOpt
        options = {"alignment": ocnopt.control.alignment.EpsilonGreedy(0.5, every=2)}
    return kind(
        model, criterion, lr=lr, preconditioner=rule, bellman=bellman, rollout=rollout, **options
    )


def train(case, rank, world, clip=None):
    """Weights after a few steps; ``world`` 0 stands for a run without processes."""
    model = model_of(case)
    criterion = nn.CrossEntropyLoss()
    net = model
    if world and case[3] == "ddp":
        net = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(case, net, criterion)
    if world and case[3] == "raw":
        net = nn.parallel.DistributedDataParallel(model)
    for i in range(STEPS):
        x, y = batch_of(i)
        if world:
            x, y = x.chunk(world)[rank], y.chunk(world)[rank]
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    share = optimizer.diagnostics.total.feedback_share
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, share


def bad_rank(rank):
    """One process alone meets a NaN; all of them must refuse the step."""
    model = model_of()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    x, y = batch_of(0)
    if rank == 1:
        x[0, 0] = float("nan")
    criterion(model(x), y).backward()
    try:
        optimizer.step()
    except ocnopt.NonFiniteError:
        return all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    return False


def accumulated(rank, world):
    """Two micro-batches per process, the first without an exchange of gradients."""
    model = model_of()
    criterion = nn.CrossEntropyLoss()
    net = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(CASES[0], net, criterion)
    for i in range(STEPS):
        x, y = (t.chunk(world)[rank] for t in batch_of(i))
        optimizer.zero_grad()
        with net.no_sync():
            (criterion(net(x[:2]), y[:2]) / 3).backward()
        (criterion(net(x[2:]), y[2:]) * 2 / 3).backward()
        optimizer.step()
    share = optimizer.diagnostics.total.feedback_share
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, share


def cases(rank, world=2):
    found = {case: partial(train, case, rank, world) for case in CASES}
    found["clipped"] = partial(train, CASES[0], rank, world, clip=0.1)
    found["accumulated"] = partial(accumulated, rank, world)
    return {**found, "bad": partial(bad_rank, rank)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, tmp_path_factory)


def compare(results, key, case, clip=None):
    found, codes = results
    assert all(key in entry for entry in found), f"processes ended with {codes} before this case"
    expected, share = train(case, 0, 0, clip)
    start = {n: p.detach().numpy() for n, p in model_of(case).named_parameters()}
    for entry in (found[0][key], found[1][key]):
        assert not isinstance(entry, str), entry
        mine, own_share = entry
        for n, p in expected.items():
            size = abs(p - start[n]).max()
            assert abs(mine[n] - p).max() <= 1e-9 * size, n
        if case[0] not in ("KFAC", "EKFAC"):
            assert share > 1e-4 and own_share > 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_halves_equal_the_whole(results, case):
    compare(results, case, case)


def test_with_clipping(results):
    compare(results, "clipped", CASES[0], clip=0.1)


def test_with_accumulation(results):
    compare(results, "accumulated", CASES[0])


def test_one_bad_process_stops_all(results):
    found, _ = results
    assert found[0]["bad"] is True and found[1]["bad"] is True


if __name__ == "__main__":
    own = int(sys.argv[1])
    work(cases(own), sys.argv[3], own, int(sys.argv[2]))
