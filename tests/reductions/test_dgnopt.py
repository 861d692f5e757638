"""DGNOpt on a chain is DDPNOpt; with open-loop information it is the optimizer that lends M."""

import copy

import pytest
import torch
from promises.conformance import assert_weights_close, build, run
from torch import nn

import ocnopt

RULES = ("identity", "rmsprop", "adam", "kfac", "ekfac")


def pair(kind):
    mine, make = build(kind)
    return mine, copy.deepcopy(mine), make, nn.CrossEntropyLoss()


def lr(rule):
    return 0.01 if rule in ("rmsprop", "adam") else 0.05


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("information", ["feedback", "group-rational"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_row_28_on_a_chain_it_is_ddpnopt(kind, information, rule):
    for bellman in ("share", "joint"):
        mine, theirs, make, criterion = pair(kind)
        options = {"lr": lr(rule), "preconditioner": rule, "bellman": bellman, "momentum": 0.5}
        dgnopt = ocnopt.DGNOpt(mine, criterion, information=information, **options)
        run(mine, dgnopt, 6, criterion, make=make)
        run(theirs, ocnopt.DDPNOpt(theirs, criterion, **options), 6, criterion, make=make)
        assert_weights_close(mine, theirs, 1e-9)


@pytest.mark.parametrize("terminal", ["outer-product", "matched", "gauss-newton", "full"])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_row_28_with_every_terminal_and_rollout(rollout, terminal):
    mine, theirs, make, criterion = pair("mlp")
    options = {"lr": 0.05, "preconditioner": "kfac", "terminal": terminal, "rollout": rollout}
    run(mine, ocnopt.DGNOpt(mine, criterion, **options), 4, criterion, make=make)
    run(theirs, ocnopt.DDPNOpt(theirs, criterion, **options), 4, criterion, make=make)
    assert_weights_close(mine, theirs, 1e-9)


BASELINES = {
    "identity": lambda m, c: torch.optim.SGD(m.parameters(), lr=0.05),
    "rmsprop": lambda m, c: torch.optim.RMSprop(m.parameters(), lr=0.01),
    "adam": lambda m, c: torch.optim.Adam(m.parameters(), lr=0.01),
    "kfac": lambda m, c: ocnopt.KFAC(m, c, lr=0.05),
    "ekfac": lambda m, c: ocnopt.EKFAC(m, c, lr=0.05),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["resnet", "mlp"])
def test_row_27_open_loop_is_the_baseline(kind, rule):
    mine, theirs, make, criterion = pair(kind)
    dgnopt = ocnopt.DGNOpt(
        mine, criterion, lr=lr(rule), preconditioner=rule, information="open-loop"
    )
    run(mine, dgnopt, 20, criterion, make=make)
    run(theirs, BASELINES[rule](theirs, criterion), 20, criterion, make=make)
    assert_weights_close(mine, theirs, 1e-11)
