"""The same loss, however it is written."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_updates_close,
    assert_weights_equal,
    batch,
    ddpnopt,
    mlp,
    weights,
)
from torch import nn

import ocnopt

STEPS = 3
TERMINALS = ["bounded", "matched", "outer-product", "gauss-newton"]


def trained(make, criterion, loss_of, data=None, model=None, steps=STEPS):
    model = mlp() if model is None else model
    optimizer = make(model, criterion)
    for i in range(steps):
        x, y = batch(seed=i) if data is None else data(i)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    if isinstance(optimizer, ocnopt.DDPNOpt):
        assert_feedback_active(optimizer)
    return model


def with_terminal(name, terminal, **options):
    def make(model, criterion):
        return ddpnopt(model, criterion, name, terminal=terminal, **options)

    return make


def reference(make, **options):
    criterion = nn.CrossEntropyLoss()
    return trained(make, criterion, lambda out, y: criterion(out, y), **options)


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("name", ["identity", "adam", "kfac"])
def test_functional_criterion(name, terminal):
    make = with_terminal(name, terminal)
    criterion = ocnopt.Criterion(F.cross_entropy)
    model = trained(make, criterion, lambda out, y: criterion(out, y))
    assert_updates_close(weights(mlp()), model, reference(make), 1e-9)


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("form", ["sum", "none", "functional-none", "weighted-none"])
@pytest.mark.parametrize("name", ["identity", "adam", "kfac", "ekfac"])
def test_reductions(name, form, terminal):
    make = with_terminal(name, terminal)
    if form == "functional-none":
        criterion = ocnopt.Criterion(lambda out, y: F.cross_entropy(out, y, reduction="none"))
    else:
        criterion = nn.CrossEntropyLoss(reduction="sum" if form == "sum" else "none")
    half = torch.full((12,), 1 / 12, dtype=torch.float64)

    def loss_of(out, y):
        values = criterion(out, y)
        if form == "sum":
            return values / len(y)
        return (values * half).sum() if form == "weighted-none" else values.mean()

    model = trained(make, criterion, loss_of)
    assert_updates_close(weights(mlp()), model, reference(make), 1e-9)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_keyword_arguments(terminal):
    make = with_terminal("identity", terminal)
    criterion = nn.CrossEntropyLoss()
    model = trained(make, criterion, lambda out, y: criterion(input=out, target=y))
    assert_updates_close(weights(mlp()), model, reference(make), 1e-12)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_probability_targets_and_softmax_outside(terminal):
    make = with_terminal("identity", terminal)
    criterion = nn.CrossEntropyLoss()
    model = trained(make, criterion, lambda out, y: criterion(out, F.one_hot(y, 3).to(out)))
    assert_updates_close(weights(mlp()), model, reference(make), 1e-9)


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("kind", ["identity", "adam", "ekfac"])
def test_nothing_is_asked_of_loss_code_but_that_it_calls_the_module(kind, terminal):
    """Other terms in the loss (here a penalty on the weights) reach the weights as gradients."""
    criterion = nn.CrossEntropyLoss()
    model = mlp()
    optimizer = ddpnopt(model, criterion, kind, terminal=terminal, feedback_clip=1e-12)
    x, y = batch()
    penalty = 0.5 * sum((p**2).sum() for p in model.parameters())
    (criterion(model(x), y) + 0.1 * penalty).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_penalty_moves_as_a_gradient():
    """A bound so tight that no feedback is left: the penalty's gradient is all there."""
    criterion = nn.CrossEntropyLoss()
    moved = []
    for penalty in (0.0, 0.1):
        model = nn.Sequential(nn.Linear(5, 3)).double()
        nn.init.constant_(model[0].weight, 0.3)
        nn.init.constant_(model[0].bias, 0.1)
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
        x, y = batch()
        loss = criterion(model(x), y) + 0.5 * penalty * (model[0].weight ** 2).sum()
        loss.backward()
        optimizer.step()
        moved.append(model[0].weight.detach())
    torch.testing.assert_close(moved[0] - moved[1], torch.full_like(moved[0], 0.1 * 0.1 * 0.3))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 6), nn.Linear(6, 7)
        self.norm, self.out = nn.LayerNorm(7), nn.Linear(7, 9)

    def forward(self, tokens):
        return self.out(self.norm(torch.tanh(self.mix(self.table(tokens)))))


def language():
    torch.manual_seed(0)
    return Language().double()


def tokens(i):
    g = torch.Generator().manual_seed(i)
    data = torch.randint(9, (6, 5), generator=g)
    return data[:, :-1], data[:, 1:]


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("name", ["identity", "adam", "kfac", "ekfac"])
def test_language_model_logits(name, terminal):
    """(B T, V) rows and (B, V, T) volumes are the same samples."""
    make = with_terminal(name, terminal)
    one, two = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    flat = trained(
        make, one, lambda out, y: one(out.reshape(-1, 9), y.reshape(-1)), tokens, language(), 2
    )
    volume = trained(make, two, lambda out, y: two(out.transpose(1, 2), y), tokens, language(), 2)
    assert_updates_close(weights(language()), flat, volume, 1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_language_model_covers_every_layer(name):
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    model = language()
    optimizer = OPTIMIZERS[name](model, criterion)
    losses = []
    x, y = tokens(0)
    for _ in range(8):
        optimizer.zero_grad()
        loss = criterion(model(x).reshape(-1, 9), y.reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    allowed = ("", "no Kronecker factors: M = I")  # the embedding, under a factored M
    assert all(r.treatment == "player" and r.reason in allowed for r in optimizer.coverage())


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.left(x), self.right(x)


def heads():
    torch.manual_seed(0)
    return Heads().double()


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("name", ["identity", "rmsprop", "adam", "kfac", "ekfac"])
def test_two_heads_with_two_calls_are_one_criterion_of_both(name, terminal):
    make = with_terminal(name, terminal)
    criterion = nn.CrossEntropyLoss()

    def both(pair, y):
        return criterion(pair[0], y) + 0.5 * criterion(pair[1], (y + 1) % 3)

    two = trained(make, criterion, both, model=heads())

    def joint(out, y, reduction="mean"):
        a = F.cross_entropy(out[:, :3], y, reduction=reduction)
        b = F.cross_entropy(out[:, 3:], (y + 1) % 3, reduction=reduction)
        return (a + 0.5 * b) / 1.5

    # A sample's own cost is the weighted mean of its calls, the weights' sum a factor outside it.
    whole = ocnopt.Criterion(joint)
    one = trained(make, whole, lambda pair, y: 1.5 * whole(torch.cat(pair, 1), y), model=heads())
    assert_updates_close(weights(heads()), two, one, 1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_regression(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    criterion = nn.MSELoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, _ = batch()
    y = x[:, :1].sin()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("terminal", ["bounded", "matched", "gauss-newton"])
def test_criterion_never_called(terminal):
    """Another module, or a function, in the loop: the terminal cost would silently be another."""
    model = mlp()
    optimizer = ocnopt.DDPNOpt(model, nn.CrossEntropyLoss(), lr=0.1, terminal=terminal)
    x, y = batch()
    before = weights(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ocnopt.RecordingError, match=r"[Cc]riterion"):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())


def test_plain_function_is_refused_by_name():
    with pytest.raises(ocnopt.OptionError, match="Criterion"):
        ocnopt.DDPNOpt(mlp(), F.cross_entropy, lr=0.1)


def ctc_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def ctc_loss(model, criterion, frames):
    """Sequences of `frames` frames, four in a batch; the criterion has time on dimension 0."""
    torch.manual_seed(1)
    x, targets = torch.randn(4, frames, 3).double(), torch.randint(1, 5, (4, 2))
    logp = model(x).log_softmax(-1).transpose(0, 1)
    return criterion(logp, targets, torch.full((4,), frames), torch.full((4,), 2))


@pytest.mark.parametrize("frames", [7, 8])
def test_ctc(frames):
    """Samples are on dimension 1, whatever the number of frames; curvature is the gradient's."""
    moved = []
    for rollout in ("linear", "off"):
        model, criterion = ctc_model(), nn.CTCLoss()
        optimizer = ocnopt.DDPNOpt(
            model, criterion, lr=0.5, terminal="outer-product", rollout=rollout
        )
        for _ in range(3):
            optimizer.zero_grad()
            ctc_loss(model, criterion, frames).backward()
            optimizer.step()
        if rollout == "linear":
            assert_feedback_active(optimizer)
        moved.append(weights(model))
    assert any(not torch.equal(moved[0][n], moved[1][n]) for n in moved[0])


@pytest.mark.parametrize(
    ("what", "terminal"),
    [
        *itertools.product(["ctc", "multi-margin", "wrapped"], TERMINALS),
        ("multi-margin", "full"),
        ("wrapped", "full"),
    ],
)
def test_criteria_that_can_be_differentiated_once(what, terminal):
    """The error names the criterion and what to try; nothing has moved."""
    model = ctc_model()
    criterion = {
        "ctc": nn.CTCLoss(),
        "multi-margin": nn.MultiMarginLoss(),
        "wrapped": ocnopt.Criterion(F.multi_margin_loss),
    }[what]
    before = weights(model)

    def step():
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, terminal=terminal)
        if what == "ctc":
            loss = ctc_loss(model, criterion, 8)
        else:
            loss = criterion(model(torch.randn(4, 3).double()), torch.randint(5, (4,)))
        loss.backward()
        optimizer.step()

    if terminal == "outer-product":
        step()
        return
    name = {"ctc": "CTCLoss", "multi-margin": "MultiMarginLoss", "wrapped": "multi_margin_loss"}
    with pytest.raises(ocnopt.OptionError, match=f"{name[what]} twice.*'outer-product'"):
        step()
    assert_weights_equal(before, model)


def test_a_wrapped_function_takes_torchs_keywords():
    def by_keyword(model, criterion):
        return ddpnopt(model, criterion, "identity")

    criterion = ocnopt.Criterion(F.cross_entropy)
    seen = []

    def loss_of(optimizer_model):
        def one(out, y):
            return criterion(input=out, target=y) if optimizer_model else criterion(out, y)

        return one

    for named in (True, False):
        seen.append(trained(by_keyword, criterion, loss_of(named)))
    for a, b in zip(*(m.parameters() for m in seen), strict=True):
        assert torch.equal(a, b)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.one, self.other = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x):
        z = self.body(x)
        return self.one(z), self.other(z)


def difference(name, w, **options):
    """The update, and the optimizer, after a step on one loss less a multiple of another."""
    torch.manual_seed(0)
    model, criterion = TwoHeads().double(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, **options)
    x, y = batch()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    one, other = model(x)
    (criterion(one, y) - w * criterion(other, y)).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return after - before, optimizer


@pytest.mark.parametrize("terminal", ["bounded", "matched", "gauss-newton"])
@pytest.mark.parametrize("name", ["DDPNOpt-identity", "DDPNOpt-kfac", "DDPNOpt-ekfac"])
def test_a_loss_less_another_is_no_small_loss(name, terminal):
    """The sum of their weights cancels; neither M nor the feedback may follow it."""
    half, _ = difference(name, 0.5, terminal=terminal)
    near, _ = difference(name, 0.999, terminal=terminal)
    same, optimizer = difference(name, 1.0, terminal=terminal)
    over, _ = difference(name, 1.001, terminal=terminal)
    assert near.norm() > 0.5 * half.norm()
    assert (near - same).norm() < 0.01 * same.norm()
    assert (over - same).norm() < 0.01 * same.norm()
    assert optimizer.diagnostics.total.feedback_share > 0


@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_factors_of_a_loss_less_another_are_those_of_its_size(name):
    near, _ = difference(name, 0.999)
    same, _ = difference(name, 1.0)
    assert (near - same).norm() < 0.01 * same.norm()
