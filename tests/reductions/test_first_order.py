"""Without Bellman recursion and feedback the optimizer is the one that lent its preconditioner."""

import copy

import pytest
import torch
from promises.conformance import assert_weights_close, build, mlp, run
from torch import nn

import ocnopt

STEPS = 20
#: An update is rounded once more than torch's, which twenty steps magnify, to nine units in single
#: precision's last place on one processor. The strict comparison is the one in double precision.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}

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


class Spectral(nn.Module):
    """A product with complex weights between two linear layers, and a complex layer."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.complex128))
        self.mix = nn.Linear(5, 5, dtype=torch.complex128)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.into(x)).to(torch.complex128) @ self.weight
        return self.out(self.mix(x).abs())


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("lender", LENDERS)
def test_complex_weights_move_as_the_lender_moves_them(lender, feedback):
    """They are no players; real and imaginary parts count as entries of their own."""
    rule, torch_class, torch_options, options = LENDERS[lender]
    torch.manual_seed(0)
    mine = Spectral().double()
    theirs = copy.deepcopy(mine)
    criterion = nn.CrossEntropyLoss()
    off = {} if feedback else {"bellman": "off", "rollout": "off"}
    optimizer = ocnopt.DDPNOpt(mine, criterion, preconditioner=rule, **options, **off)
    names = [n for n, p in mine.named_parameters() if p.is_complex()]
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert names == ["weight", "mix.weight", "mix.bias"]
    assert {rows[n].treatment for n in names} == {"first-order"}
    reference = torch_class(theirs.parameters(), **options, **torch_options)
    for i in range(STEPS):
        torch.manual_seed(i)
        x, y = torch.randn(7, 6).double(), torch.randint(3, (7,))
        with torch.no_grad():  # the other parts' steps differ where there is feedback
            for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
                if feedback and not p.is_complex():
                    p.copy_(q)
        for model, stepped in ((mine, optimizer), (theirs, reference)):
            stepped.zero_grad()
            criterion(model(x), y).backward()
            stepped.step()
    for name in names if feedback else dict(mine.named_parameters()):
        one, other = mine.get_parameter(name), theirs.get_parameter(name)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
