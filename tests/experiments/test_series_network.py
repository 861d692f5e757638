"""The GRU-ODE for time series, and a Neural ODE trained by one rule, the rest by Adam's."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ocnopt
from ocnopt import cli
from ocnopt.experiments import optimizers
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.networks import GruODE, gru_ode
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.setup import build_network
from ocnopt.experiments.split import Split
from ocnopt.experiments.training import Watcher, train
from ocnopt.ode import NeuralODE, TimedSequential

LENGTHS = (5, 1, 9, 9, 3, 7)
CHANNELS, CLASSES = 3, 4


def padded(lengths, steps=9, seed=0):
    """Random series, (N, steps, CHANNELS), NaN past their ends."""
    x = torch.randn(
        len(lengths), steps, CHANNELS, generator=torch.Generator().manual_seed(seed)
    ).double()
    for row, length in zip(x, lengths, strict=True):
        row[length:] = float("nan")
    return x


def network(method="midpoint", stride=1, tol=1e-3, seed=0, steep=1.0):
    torch.manual_seed(seed)
    recipe = GruODE(6, stride, method, tol, tol)
    model = gru_ode(recipe, (max(LENGTHS), CHANNELS), CLASSES).double()
    for p in model.ode.parameters():
        p.data *= steep
    return model


def by_hand(model, series, move):
    """The logits of one series (length, CHANNELS), one observation after another."""
    cell = model.gru
    h = torch.zeros(6, dtype=torch.float64)
    for i, x in enumerate(series):
        h = move(h) if i else h
        r_x, z_x, n_x = (cell.weight_ih @ x + cell.bias_ih).chunk(3)
        r_h, z_h, n_h = (cell.weight_hh @ h + cell.bias_hh).chunk(3)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        h = (1 - z) * torch.tanh(n_x + r * n_h) + z * h
    return model.head.weight @ h + model.head.bias


def vector_field(model):
    """The field, a layer at a time."""
    layers = [m for m in model.ode.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 4

    def field(h):
        for number, layer in enumerate(layers):
            h = layer.weight @ (torch.tanh(h) if number else h) + layer.bias
        return h

    return field


def midpoint_step(field):
    """From time 0 to 1 in one step of the midpoint rule."""
    return lambda h: h + field(h + field(h) / 2)


def small_steps(field, count=10):
    """From time 0 to 1 by the classical method of order 4; its error is of order count^-4."""
    dt = 1 / count

    def move(h):
        for _ in range(count):
            k1 = field(h)
            k2 = field(h + dt / 2 * k1)
            k3 = field(h + dt / 2 * k2)
            k4 = field(h + dt * k3)
            h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return h

    return move


# Row 46: what it computes


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_row_46_the_state_at_the_final_index_is_that_of_a_loop_over_single_series(stride):
    model, x = network(stride=stride), padded(LENGTHS)
    move = midpoint_step(vector_field(model))
    expected = [by_hand(model, row[:n:stride], move) for row, n in zip(x, LENGTHS, strict=True)]
    found = model(x)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-13, atol=1e-13)
    assert (found[0] - found[1]).abs().max() > 1e-3  # there is something to tell apart


def test_row_46_likewise_with_a_solver_of_steps_of_its_own():
    model, x = network("dopri5", tol=1e-9), padded(LENGTHS)
    move = small_steps(vector_field(model))
    expected = [by_hand(model, row[:n], move) for row, n in zip(x, LENGTHS, strict=True)]
    torch.testing.assert_close(model(x), torch.stack(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_what_series_are_padded_with_has_no_part_in_anything(method):
    """Neither in outputs nor in gradients, which have no NaN; nor in the solver's steps."""
    model = network(method)
    x, longer = padded(LENGTHS).requires_grad_(), padded(LENGTHS, 9)
    longer = torch.cat([longer, torch.full((6, 20, CHANNELS), float("nan")).double()], 1)
    counts = []
    for inputs in (x, longer):
        model.zero_grad()
        model.ode.reset_evaluations()
        outputs = model(inputs)
        outputs.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients)
        counts.append((outputs, gradients, model.ode.evaluations))
    torch.testing.assert_close(counts[0], counts[1], rtol=0, atol=0)
    seen = torch.isfinite(x)
    assert not bool(x.grad[~seen].any()) and bool(x.grad[seen].all())


def test_a_series_that_is_missing_altogether_spoils_its_own_output_alone():
    model, x = network(), padded(LENGTHS)
    whole = model(x)
    x[1] = float("nan")
    outputs = model(x)
    assert bool(torch.isnan(outputs[1]).all())
    rest = [0, 2, 3, 4, 5]
    torch.testing.assert_close(outputs[rest], whole[rest])


# Row 46: its gradient


def gradients(model, x, y):
    model.zero_grad()
    model.ode.reset_evaluations()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, model.ode.evaluations


def test_row_46_the_adjoint_with_a_seminorm_is_the_gradient():
    x, y = padded(LENGTHS), torch.arange(6) % CLASSES
    model = network("dopri5", tol=1e-8, steep=1.5)
    assert model.ode.adjoint and model.ode.seminorm
    adjoint, _ = gradients(model, x, y)
    model.ode.adjoint = False
    unrolled, _ = gradients(model, x, y)
    for name, gradient in unrolled.items():
        assert float(gradient.norm()) > 1e-4
        error = float((adjoint[name] - gradient).norm() / gradient.norm())
        assert error < 1e-5, name
    # At tolerances of 1e-3, which are the paper's, it is the same up to these.
    loose = network("dopri5", tol=1e-3, steep=1.5)
    for name, gradient in gradients(loose, x, y)[0].items():
        assert float((gradient - unrolled[name]).norm() / unrolled[name].norm()) < 1e-2, name


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_row_46_a_seminorm_takes_fewer_evaluations_than_a_norm(tol):
    """Over a long time: in an interval of length 1 either is a step or two, and none is better."""
    x, y = padded(LENGTHS), torch.arange(6) % CLASSES
    model = network("dopri5", tol=tol, steep=2.0)
    model.ode.t1.fill_(20.0)
    _, semi = gradients(model, x, y)
    model.ode.seminorm = False
    _, full = gradients(model, x, y)
    assert semi.forward == full.forward
    assert semi.backward < full.backward


# Row 42: statistics


def test_row_42_statistics_add_up_over_all_intervals():
    model, x = network(stride=2).float(), padded((9,) * 6).float()
    for step, each in ((1.0, 1), (0.25, 4)):
        optimizer = ocnopt.SNOpt(model, lr=0.1, sample_step=step)
        model(x).square().mean().backward()
        moments = optimizer._solved.statistics.moments
        assert len(moments) == 4  # layers
        # 5 observations, 4 intervals
        assert {seen.points for seen in moments.values()} == {4 * each}
        optimizer.detach()


def test_statistics_of_padded_series_are_those_of_every_series_alone():
    lengths = (5, 2, 9, 9, 3, 7)
    model, x = network(), padded(lengths)
    optimizer = ocnopt.SNOpt(model, lr=0.1, sample_step=1.0, reduction="sum")
    found = []
    for parts in ([x], [row[None, :n] for row, n in zip(x, lengths, strict=True)]):
        optimizer.zero_grad()
        for part in parts:
            model(part).square().sum().backward()
        statistics = optimizer._solved.statistics
        assert statistics.samples == 6
        found.append([statistics.sums(player) for player in statistics.players])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert float(found[0][0][2]) == sum(n - 1 for n in lengths)


# As a network of the experiments


@pytest.mark.parametrize("shape", [(8,), (1, 8, 8)])
def test_what_is_no_time_series_is_refused(shape):
    with pytest.raises(InputError, match="gru-ode needs time series of"):
        gru_ode(GruODE(), shape, 3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dataset": "wine"}, "gru-ode needs time series and wine has none"),
        ({"stride": 0}, "stride must be at least 1, not 0"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"network": "fcn", "stride": 2}, "stride belongs to --network gru-ode, not to fcn"),
        ({"method": "euler!"}, "method 'euler!' is not known"),
        ({"channels": 3}, "channels belongs to"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**{"network": "gru-ode", "dataset": "spoken-arabic-digits", **settings})


def test_settings_reach_the_network():
    x, y = torch.zeros(2, 9, 5), torch.zeros(2, dtype=torch.int64)
    data = Data(x, y, x, y, 3)
    plain = TrainConfig(network="gru-ode").resolved()
    assert (plain.hidden, plain.stride, plain.method, plain.threads) == (32, 1, "dopri5", 1)
    given = TrainConfig(network="gru-ode", hidden=7, stride=3, method="rk4", rtol=1e-4, atol=1e-5)
    model = build_network(given.resolved(), data)
    assert (model.gru.hidden_size, model.stride, model.gru.input_size) == (7, 3, 5)
    method = model.ode.method
    assert (method.name, method.rtol, method.atol) == ("rk4", 1e-4, 1e-5)


def test_the_full_recipe_is_the_papers():
    """19 channels to 64 features and 25 classes, every observation, dopri5 at 1e-3."""
    config = TrainConfig(**RECIPES["articulary-word-recognition-ode-full"]).resolved()
    x, y = torch.zeros(2, 144, 19), torch.zeros(2, dtype=torch.int64)
    model = build_network(config, Data(x, y, x, y, 25))
    assert config.batch_size == 256
    sizes = [m.weight.shape for m in model.ode.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(64, 64)] * 4
    assert [type(m) for m in model.ode.func.layers] == [*[nn.Linear, nn.Tanh] * 3, nn.Linear]
    assert (model.stride, model.ode.method.name, model.ode.method.rtol) == (1, "dopri5", 1e-3)
    gru = 3 * 64 * (19 + 64 + 2)
    assert sum(p.numel() for p in model.parameters()) == 4 * 64 * 65 + gru + 65 * 25


# Training a Neural ODE by one rule and the rest by Adam's


def outside(model):
    return [*model.gru.parameters(), *model.head.parameters()]


def small():
    torch.manual_seed(0)
    model = gru_ode(GruODE(5, 1, "rk4"), (6, CHANNELS), CLASSES)
    x = padded((6, 4, 6, 2, 5), 6).float()
    return model, x, torch.arange(5) % CLASSES


CRITERION = nn.CrossEntropyLoss()


def build(name, model, lr=0.05, **options):
    return optimizers.build(name, model, CRITERION, lr, options)


SGD = {"momentum": 0.9, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snopt", {"sample_step": 1.0, "update_every": 2, **SGD}),
        ("sgd", SGD),
        ("ekfac", {"update_every": 2}),
    ],
)
def test_adam_trains_what_lies_outside(name, options):
    """It moves as torch's Adam moves it, given the same gradients; with no decay or momentum."""
    model, x, y = small()
    optimizer = build(name, model, rest_lr=3e-3, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    theirs = [nn.Parameter(p.detach().clone()) for p in outside(model)]
    adam = torch.optim.Adam(theirs, lr=3e-3)
    theirs_scheduler = torch.optim.lr_scheduler.StepLR(adam, 2, 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        for mine, their in zip(outside(model), theirs, strict=True):
            their.grad = mine.grad.clone()
        before = [p.detach().clone() for p in model.ode.parameters()]
        optimizer.step()
        adam.step()
        scheduler.step()
        theirs_scheduler.step()
        torch.testing.assert_close(list(outside(model)), theirs, rtol=1e-5, atol=1e-7)
        after = [p.detach() for p in model.ode.parameters()]
        assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_torchs_own_train_the_neural_odes(name, kind):
    model, x, y = small()
    twin = copy.deepcopy(model)
    optimizer = build(name, model, rest_lr=3e-3, weight_decay=0.01)
    assert isinstance(optimizer, Split)
    parts = [
        kind(twin.ode.parameters(), lr=0.05, weight_decay=0.01),
        torch.optim.Adam(outside(twin), lr=3e-3),
    ]
    for _ in range(4):
        optimizer.zero_grad()
        for part in parts:
            part.zero_grad()
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        for part in parts:
            part.step()
    for mine, their in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, their)


def test_snopt_moves_the_neural_ode_as_without_it():
    """What trains the rest has no part in the first step of the Neural ODE's layers."""
    model, x, y = small()
    twin = copy.deepcopy(model)
    pairs = [
        (model, build("snopt", model, sample_step=1.0, rest_lr=3e-3)),
        (twin, ocnopt.SNOpt(twin, lr=0.05, sample_step=1.0)),
    ]
    for net, optimizer in pairs:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    for mine, their in zip(model.ode.parameters(), twin.ode.parameters(), strict=True):
        assert torch.equal(mine, their)
    treatments = {row.parameter: row.treatment for row in pairs[0][1].coverage()}
    assert set(treatments.values()) == {"adjoint", "first-order"}
    for name, treatment in treatments.items():
        assert (treatment == "adjoint") == name.startswith("ode.")


def test_a_split_optimizer_goes_on_from_its_state_with_its_schedule():
    model, x, y = small()
    optimizer = build("sgd", model, rest_lr=3e-3, momentum=0.9)

    def step(net, opt):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()

    step(model, optimizer)
    twin = copy.deepcopy(model)
    other = build("sgd", twin, lr=1.0, rest_lr=1.0, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.05, 3e-3]
    for opt in (optimizer, other):
        torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5)
    assert [part.param_groups[0]["lr"] for part in other.parts] == [0.025, 1.5e-3]
    for _ in range(2):
        step(model, optimizer)
        step(twin, other)
    for mine, their in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, their)
    with pytest.raises(ValueError, match="not one of 2"):
        other.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


def test_a_split_optimizer_takes_a_closure():
    model, x, y = small()
    optimizer = build("sgd", model, rest_lr=3e-3)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    assert optimizer.step(closure).item() == losses[0]
    assert optimizer.step(closure).item() < losses[0]


def all_inside():
    return NeuralODE(TimedSequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    ("name", "model", "rest_lr", "says"),
    [
        ("adam", lambda: nn.Linear(3, 2), 0.1, "all of this one lies outside"),
        ("snopt", all_inside, 0.1, "all of this one lies inside"),
        ("sgd", lambda: small()[0], -0.1, "rest_lr must be a positive number, not -0.1"),
        ("snopt", lambda: small()[0], "much", "rest_lr must be a positive number, not 'much'"),
        ("vanilla-ddp", lambda: small()[0], 0.1, "it trains all parameters by one rule"),
    ],
)
def test_a_rate_for_the_rest_that_cannot_be_is_refused(name, model, rest_lr, says):
    with pytest.raises(InputError, match=f"{name} refused its options.*{says}"):
        build(name, model(), rest_lr=rest_lr)


# In whole runs


def waves():
    """Waves of two frequencies and unequal lengths, to be told apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 2
    length = torch.randint(4, 9, (48,), generator=generator)
    time = torch.arange(8.0)
    phase = torch.rand(48, 1, generator=generator)
    x = torch.stack([time.expand(48, 8) / 8, torch.sin((1 + y[:, None]) * time + phase)], -1)
    x[time[None, :] >= length[:, None]] = float("nan")
    return x[:32], y[:32], x[32:], y[32:]


@pytest.fixture
def own(monkeypatch):
    """Lets runs find `waves` in this module."""
    monkeypatch.setattr(
        "ocnopt.experiments.setup.find", lambda name, what: getattr(sys.modules[__name__], name[4:])
    )


class StopAt(Watcher):
    """Ends a run as a crash would, after a given step."""

    def __init__(self, step):
        self.step = step

    def stepped(self, step, loss):
        if step == self.step:
            raise KeyboardInterrupt


SNOPT = {"sample_step": 1.0, "damping": 0.1, "update_every": 3, "rest_lr": 0.1}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("snopt", SNOPT), ("sgd", {"momentum": 0.9, "rest_lr": 0.1})],
)
def test_a_run_learns_and_goes_on_bit_exactly(own, tmp_path, optimizer, options):
    settings = {
        "dataset": "own:waves",
        "network": "gru-ode",
        "hidden": 8,
        "method": "midpoint",
        "optimizer": optimizer,
        "lr": 0.02,
        "options": options,
        "batch_size": 16,
        "steps": 26,
        "checkpoint_every": 7,
    }
    whole = train(TrainConfig(**settings, output=tmp_path / "whole"))
    assert whole.diverged_step is None
    assert float(whole.history[-4:].mean()) < 0.5 * float(whole.history[0])
    assert whole.test_accuracy >= 0.9
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings, output=tmp_path / "cut"), StopAt(16))
    resumed = train(TrainConfig(**settings, output=tmp_path / "cut", resume=True))
    assert torch.equal(resumed.history, whole.history)
    for mine, their in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, their)


def test_from_the_command_line(own, capsys):
    words = ["train", "--dataset", "own:waves", "--network", "gru-ode", "--optimizer", "snopt"]
    words += ["--option", "sample_step=1.0", "--option", "rest_lr=0.003", "--option", "damping=0.1"]
    assert cli.main([*words, "--steps", "2", "--batch-size", "16", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["network"] == "gru-ode"
    assert summary["options"] == {"sample_step": 1.0, "rest_lr": 0.003, "damping": 0.1}
    assert summary["lr"] == 0.01
    assert cli.main(["train", "--dataset", "wine", "--optimizer", "snopt", "--steps", "1"]) == 2
    assert "holds no ocnopt.ode.NeuralODE" in capsys.readouterr().err


def test_other_networks_refuse_series_of_different_lengths(own, capsys):
    words = ["train", "--dataset", "own:waves", "--network", "fcn", "--steps", "2"]
    assert cli.main(words) == 2
    assert "has missing values" in (said := capsys.readouterr().err) and "gru-ode" in said


def test_ocnopt_trains_it(own):
    """The GRU by first-order steps, the Neural ODE by the adjoint, the head with feedback."""
    config = TrainConfig(
        **{"dataset": "own:waves", "network": "gru-ode", "hidden": 8, "method": "midpoint"},
        **{"optimizer": "ocnopt", "lr": 0.02, "options": {"sample_step": 1.0}},
        **{"batch_size": 16, "steps": 26},
    )
    with pytest.warns(UserWarning, match="every layer has a stage of its own"):
        result = train(config)
    assert result.diverged_step is None
    assert float(result.history[-4:].mean()) < float(result.history[0])
