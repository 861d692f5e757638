"""Without Bellman recursion and feedback the optimizer is the one that lent its preconditioner."""

import copy

import pytest
import torch
from promises.conformance import assert_weights_close, build, mlp, run
from torch import nn

import ocnopt

STEPS = 20
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

LENDERS = {
    "sgd": ("identity", torch.optim.SGD, {}, {"lr": 0.05}),
    "sgd-momentum": ("identity", torch.optim.SGD, {}, {"lr": 0.05, "momentum": 0.9}),
    "sgd-decay": ("identity", torch.optim.SGD, {}, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd-both": (
        "identity",
        torch.optim.SGD,
        {},
        {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1},
    ),
    "rmsprop": (
        ocnopt.curvature.RMSprop(decay=0.95, eps=1e-3),
        torch.optim.RMSprop,
        {"alpha": 0.95, "eps": 1e-3},
        {"lr": 0.01},
    ),
    "rmsprop-both": (
        ocnopt.curvature.RMSprop(decay=0.95, eps=1e-3),
        torch.optim.RMSprop,
        {"alpha": 0.95, "eps": 1e-3},
        {"lr": 0.005, "momentum": 0.5, "weight_decay": 0.1},
    ),
    "adam": (
        ocnopt.curvature.Adam(betas=(0.8, 0.98), eps=1e-3),
        torch.optim.Adam,
        {"betas": (0.8, 0.98), "eps": 1e-3},
        {"lr": 0.01},
    ),
    "adam-decay": (
        ocnopt.curvature.Adam(eps=1e-3),
        torch.optim.Adam,
        {"eps": 1e-3},
        {"lr": 0.01, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet"])
@pytest.mark.parametrize("lender", LENDERS)
def test_equals_the_lender(lender, kind, dtype):
    rule, torch_class, torch_options, options = LENDERS[lender]
    mine, make = build(kind, dtype)
    theirs = copy.deepcopy(mine)
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(
        mine, criterion, preconditioner=rule, bellman="off", rollout="off", **options
    )
    reference = torch_class(theirs.parameters(), **options, **torch_options)
    start = [p.detach().clone() for p in mine.parameters()]
    run(mine, optimizer, STEPS, criterion, dtype, make)
    run(theirs, reference, STEPS, criterion, dtype, make)
    assert all(not torch.equal(a, b) for a, b in zip(start, mine.parameters(), strict=True))
    assert_weights_close(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["identity", "rmsprop", "adam"])
def test_default_options_are_those_of_torch(name):
    lender = {
        "identity": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adam": torch.optim.Adam,
    }[name]
    mine = mlp()
    theirs = copy.deepcopy(mine)
    optimizer = ocnopt.DDPNOpt(
        mine, None, lr=0.01, preconditioner=name, bellman="off", rollout="off"
    )
    run(mine, optimizer, 5)
    run(theirs, lender(theirs.parameters(), lr=0.01), 5)
    assert_weights_close(mine, theirs, 1e-10)


@pytest.mark.parametrize("bellman", ["share", "sample", "joint", "literal", "off"])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear", "off"])
def test_one_player_has_nobody_to_answer(bellman, rollout):
    """The last player's value is the terminal gradient, the first player's state never moves."""
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(5, 3)).double()
    theirs = copy.deepcopy(mine)
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(mine, criterion, lr=0.1, bellman=bellman, rollout=rollout)
    run(mine, optimizer, STEPS, criterion)
    run(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), STEPS)
    assert_weights_close(mine, theirs, 1e-12)


def test_feedback_on_is_not_sgd():
    """The comparisons above can fail: the default options move the weights elsewhere."""
    mine = mlp()
    theirs = copy.deepcopy(mine)
    criterion = nn.CrossEntropyLoss()
    run(mine, ocnopt.DDPNOpt(mine, criterion, lr=0.1), STEPS, criterion)
    run(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), STEPS)
    with pytest.raises(AssertionError):
        assert_weights_close(mine, theirs, 1e-4)
