"""Two processes with half a batch each take SNOpt's and OCNOpt's step of one with all of it."""

import sys
from functools import partial

import pytest
import torch
from ode.blocks import batch, classifier
from torch import nn
from two_processes import results_of, work

import ocnopt
from ocnopt.curvature.kronecker import EKFAC

CASES = ["ode", "all layers", "adam group", "wrapped first", "clipped", "accumulated", "unrolled"]
CASES += ["ocnopt"]
STEPS = 3


def model_of(case):
    # Steps that do not depend on who else is in the batch.
    options = {"method": "rk4", "options": {"step_size": 0.25}, "adjoint": case != "unrolled"}
    return classifier(**options)


def optimizer_of(case, net, model):
    if case == "ocnopt":
        rule = EKFAC(damping=0.05, decay=0.0, update_every=2)
        return ocnopt.OCNOpt(net, lr=0.05, sample_step=0.1, solved=rule, preconditioner=rule)
    adam = {"params": [model[0], model[2]], "preconditioner": "adam", "lr": 0.01}
    return ocnopt.SNOpt(
        net,
        lr=0.05,
        update_every=2,
        sample_step=0.1,
        precondition_all=case == "all layers",
        params=[adam] if case == "adam group" else None,
    )


def train(case, rank, world):
    """Weights after a few steps; ``world`` 0 stands for a run without processes."""
    model = net = model_of(case)
    if world and case == "wrapped first":
        net = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(case, net, model)
    if world and net is model:
        net = nn.parallel.DistributedDataParallel(model)
    for i in range(STEPS):
        x, y = batch(i, 12)
        if world:
            x, y = x.chunk(world)[rank], y.chunk(world)[rank]
        optimizer.zero_grad()
        if world and case == "accumulated":
            with net.no_sync():
                (nn.functional.cross_entropy(net(x[:2]), y[:2]) / 3).backward()
            (nn.functional.cross_entropy(net(x[2:]), y[2:]) * 2 / 3).backward()
        else:
            nn.functional.cross_entropy(net(x), y).backward()
        if case == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}


def bad_rank(rank):
    """One process alone meets a NaN; all of them must refuse the step."""
    model = model_of("ode")
    optimizer = optimizer_of("ode", model, model)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = batch(0, 12)
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * (float("nan") if rank == 1 else 1.0)).backward()
    try:
        optimizer.step()
    except ocnopt.NonFiniteError:
        return all(torch.equal(kept[n], p) for n, p in model.named_parameters())
    return False


def cases(rank, world=2):
    found = {case: partial(train, case, rank, world) for case in CASES}
    return {**found, "bad": partial(bad_rank, rank)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, tmp_path_factory)


@pytest.mark.parametrize("case", CASES)
def test_halves_equal_the_whole(results, case):
    found, codes = results
    assert all(case in entry for entry in found), f"processes ended with {codes} before this case"
    expected = train(case, 0, 0)
    start = {n: p.detach().numpy() for n, p in model_of(case).named_parameters()}
    for entry in found:
        assert not isinstance(entry[case], str), entry[case]
        for n, p in expected.items():
            size = abs(p - start[n]).max()
            assert size > 0
            assert abs(entry[case][n] - p).max() <= 1e-9 * size, n


def test_one_bad_process_stops_all(results):
    found, _ = results
    assert found[0]["bad"] is True and found[1]["bad"] is True


if __name__ == "__main__":
    own = int(sys.argv[1])
    work(cases(own), sys.argv[3], own, int(sys.argv[2]))
