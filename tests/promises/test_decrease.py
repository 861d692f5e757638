"""Predicted and actual decrease are of the loss that the loop called ``backward`` on."""

import pytest
import torch
from torch import nn

import ocnopt

TERMINALS = ["bounded", "matched", "outer-product", "gauss-newton"]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10)).to(dtype)


def data(dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(12, 6, generator=make, dtype=torch.float64)
    return x.to(dtype), torch.randint(5, (12,), generator=make)


def halves(one, other, factor=1.0):
    """Two calls of the criterion on one output, weighted."""

    def losses(model, criterion):
        x, y = data()
        out = model(x)
        first, second = criterion(out[:, :5], y), criterion(out[:, 5:], y)
        yield (one * first + other * second) * factor

    return losses


def logged(model, criterion):
    x, y = data()
    out = model(x)
    criterion(out[:, 5:], y)
    yield criterion(out[:, :5], y)


def accumulated(sizes, weight):
    def losses(model, criterion):
        x, y = data()
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
            yield criterion(model(a), b) * weight(len(a))

    return losses


def whole(reduce):
    def losses(model, criterion):
        x, y = data()
        yield reduce(criterion(model(x), y))

    return losses


MASK = torch.arange(12) < 4
LOOPS = {
    "one call": ("mean", whole(lambda loss: loss)),
    "a factor": ("mean", whole(lambda loss: 0.3 * loss)),
    "a sum": ("sum", whole(lambda loss: loss)),
    "a sum, divided": ("sum", whole(lambda loss: loss / 12)),
    "two calls": ("mean", halves(1, 1)),
    "two weights": ("mean", halves(1, 0.3)),
    "mean of two": ("mean", halves(1, 1, 0.5)),
    "no reduction": ("none", whole(lambda loss: loss.mean())),
    "no reduction, a sum": ("none", whole(lambda loss: loss.sum())),
    "masked mean": ("none", whole(lambda loss: (loss * MASK).sum() / 4)),
    "second call is logged": ("mean", logged),
    "accumulated": ("mean", accumulated([10, 2], lambda n: n / 12)),
    "accumulated, undivided": ("mean", accumulated([6, 6], lambda n: 1.0)),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("kind", [ocnopt.DDPNOpt, ocnopt.DGNOpt])
def test_decrease_of_the_loops_own_loss(kind, terminal, loop):
    reduction, losses = LOOPS[loop]
    model, criterion = net(), nn.CrossEntropyLoss(reduction=reduction)
    optimizer = kind(
        model, criterion, lr=1e-5, preconditioner="identity", terminal=terminal, measure_every=1
    )
    optimizer.zero_grad()
    before = 0.0
    for loss in losses(model, criterion):
        loss.backward()
        before += float(loss.detach())
    optimizer.step()
    with torch.no_grad():
        fell = before - sum(float(loss) for loss in losses(model, criterion))
    found = optimizer.diagnostics
    assert fell > 0
    assert found.total.actual_decrease == pytest.approx(fell, rel=1e-8)
    assert found.total.predicted_decrease == pytest.approx(fell, rel=1e-3)
    players = sum(row.predicted_decrease for row in found.players.values())
    assert players == pytest.approx(found.total.predicted_decrease, rel=1e-12)


# A weight and a clip at once cannot be told from another scaler, nor a clip without a criterion.
@pytest.mark.parametrize(
    ("clip", "known", "weight"),
    [(None, True, 1.0), (None, True, 0.3), (None, False, 1.0), (None, False, 0.3), (0.05, True, 1)],
)
def test_a_loss_scaler_is_taken_back(clip, known, weight):
    """The loss is the loop's, not the scaler's; clipped or not."""
    model, criterion = net(torch.float32), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(
        model, criterion if known else None, lr=1e-3, feedback_clip=None, measure_every=int(known)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x, y = data(torch.float32)
    loss = criterion(model(x), y) * weight
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    with torch.no_grad():
        fell = float(loss - criterion(model(x), y) * weight)
    found = optimizer.diagnostics.total
    assert found.predicted_decrease == pytest.approx(fell, rel=0.05)
    if known:
        assert found.actual_decrease == pytest.approx(fell, rel=0.05)
