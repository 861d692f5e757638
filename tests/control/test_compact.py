"""Between refreshes samples' gradients stand for inputs and signals, and nothing changes."""

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.curvature.kronecker import EKFAC, KFAC
from ocnopt.errors import RecordingError

CRITERION = nn.CrossEntropyLoss()


class Block(nn.Module):
    """Convolutions with many locations, two of them at one stage."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 5, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.conv(x) + self.shortcut(x)).mean((2, 3)))


def built(make, rule, **options):
    torch.manual_seed(0)
    model = Block().double()
    return model, make(model, CRITERION, lr=0.1, preconditioner=rule, **options)


def backward(model, step):
    make = torch.Generator().manual_seed(step)
    x = torch.randn(6, 3, 8, 8, generator=make, dtype=torch.float64)
    y = torch.randint(3, (6,), generator=make)
    model.zero_grad()
    CRITERION(model(x), y).backward()


def formed(optimizer):
    """Layers of which gradients were formed and nothing else was kept."""
    (recorded,) = optimizer.recorder.passes
    return {use.player.name for use in recorded.received if use.signal is None}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ocnopt.DDPNOpt, {}),
        (ocnopt.DDPNOpt, {"curvature": "value"}),
        (ocnopt.DDPNOpt, {"rollout": "nonlinear"}),
        (ocnopt.DDPNOpt, {"keep_grad": False}),
        (ocnopt.DGNOpt, {"information": "feedback"}),
        (ocnopt.DGNOpt, {"information": "group-rational"}),
    ],
)
@pytest.mark.parametrize(
    "rule", [KFAC(update_every=3), EKFAC(update_every=3)], ids=lambda r: r.name
)
def test_steps_are_the_same(make, options, rule):
    weights = []
    for compact in (True, False):
        model, optimizer = built(make, rule, **options)
        assert optimizer.recorder.compact
        optimizer.recorder.compact = compact
        for step in range(7):
            backward(model, step)
            wanted = {"stem", "conv", "shortcut"} if compact and step % 3 else set()
            assert formed(optimizer) == wanted
            if step == 3 and make is ocnopt.DGNOpt and compact:
                together = [row.reason for row in optimizer.coverage()]
                assert not any("alone" in reason for reason in together)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("terminal", ["gauss-newton", "full"])
def test_what_asks_for_signals_has_them(terminal):
    rule = KFAC(update_every=3)
    if terminal == "full":
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 3)
        ).double()
        optimizer = ocnopt.DDPNOpt(
            model, CRITERION, lr=0.1, preconditioner=rule, terminal="full", value_reg=1e-3
        )
    else:
        model, optimizer = built(ocnopt.DDPNOpt, rule, terminal=terminal)
    for step in range(3):
        backward(model, step)
        assert not formed(optimizer)
        optimizer.step()


def test_factors_that_come_due_after_the_backward_pass_are_an_error_and_nothing_moves():
    model, optimizer = built(ocnopt.DDPNOpt, KFAC(update_every=3))
    backward(model, 0)
    optimizer.step()
    backward(model, 1)
    group = optimizer.param_groups[0]
    group["preconditioner"] = {**group["preconditioner"], "update_every": 1}
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RecordingError, match="'shortcut' are due now"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    backward(model, 2)
    optimizer.step()


class Normed(nn.Module):
    """A convolution and a normalization, which has no factors that could be due."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("keep_grad", [True, False])
def test_inputs_go_with_signals(keep_grad):
    torch.manual_seed(0)
    model = Normed().double()
    optimizer = ocnopt.DDPNOpt(
        model, CRITERION, lr=0.1, preconditioner=KFAC(update_every=3), keep_grad=keep_grad
    )
    for step in range(2):
        backward(model, step)
        (recorded,) = optimizer.recorder.passes
        kept = {use.player.name for use in recorded.received if use.capture}
        assert kept == ({"conv", "head"} if step == 0 else {"head"})
        optimizer.step()


@pytest.mark.parametrize("rule", [KFAC(update_every=3), "identity"], ids=str)
def test_a_graph_that_is_kept_brings_gradients_twice(rule):
    """Losses of a kept graph, one by one, are their sum."""
    weights = []
    for apart in (True, False):
        model, optimizer = built(ocnopt.DDPNOpt, rule)
        for step in range(3):
            make = torch.Generator().manual_seed(step)
            x = torch.randn(6, 3, 8, 8, generator=make, dtype=torch.float64)
            output = model(x)
            losses = [CRITERION(output, torch.full((6,), k)) for k in range(2)]
            optimizer.zero_grad()
            if apart:
                losses[0].backward(retain_graph=True)
                losses[1].backward()
            else:
                sum(losses).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("zero", [{"set_to_none": True}, {"set_to_none": False}])
@pytest.mark.parametrize("who", ["model", "optimizer"])
def test_a_kept_graph_counts_again_after_its_gradients_were_thrown_away(zero, who):
    """As loops do that look at the norms of several losses' gradients."""
    weights = []
    for looks in (True, False):
        model, optimizer = built(ocnopt.DDPNOpt, "identity")
        for step in range(3):
            make = torch.Generator().manual_seed(step)
            x = torch.randn(6, 3, 8, 8, generator=make, dtype=torch.float64)
            output = model(x)
            losses = [CRITERION(output, torch.full((6,), k)) for k in range(2)]
            if looks:
                losses[0].backward(retain_graph=True)
            {"model": model, "optimizer": optimizer}[who].zero_grad(**zero)
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-11)
