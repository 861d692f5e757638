"""Seeds that are trained at once come to what each comes to alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ocnopt.errors import NonFiniteError
from ocnopt.experiments import optimizers, setup, together
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.networks import ResidualFCN, residual_fcn
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.outcome import Outcome, make_outcome
from ocnopt.experiments.setup import build_network, correct, load_data, total_steps
from ocnopt.experiments.together import can_be_together, stack, train_together
from ocnopt.experiments.training import train
from ocnopt.layers import StackedLinear
from ocnopt.optim import base

SEEDS = (0, 1, 2)


def wine(optimizer="sgd", lr=0.05, **settings):
    given = {"dataset": "wine", "widths": (6, 5), "batch_size": 12, "steps": 15, "curve": True}
    return TrainConfig(**{**given, "optimizer": optimizer, "lr": lr, **settings})


def alone(config, seed, dtype=torch.float64):
    """One seed by the ordinary loop; as `train`, but in any precision."""
    config = config.resolved()
    data = load_data(config)
    data = replace(data, train_x=data.train_x.to(dtype), test_x=data.test_x.to(dtype))
    torch.manual_seed(seed)
    model = build_network(config, data).to(dtype)
    criterion = nn.CrossEntropyLoss()
    optimizer = optimizers.build(config.optimizer, model, criterion, config.lr, config.options)
    order = DataOrder(len(data.train_y), config.batch_size, seed, torch.device("cpu"))
    total = total_steps(config, order.steps_per_epoch)
    history, curve, end = [], [], None

    def accuracy():
        with torch.no_grad():
            return float(correct(model(data.test_x), data.test_y).double().mean())

    for step in range(total):
        index = order.batch(step)
        optimizer.zero_grad()
        loss = criterion(model(data.train_x[index]), data.train_y[index])
        history.append(loss.detach())
        try:
            loss.backward()
            optimizer.step()
        except NonFiniteError:
            end = step + 1
            break
        if not math.isfinite(history[-1]):
            end = step + 1
            break
        done = step + 1
        if done % order.steps_per_epoch == 0 or done == total or done % config.log_every == 0:
            curve.append((done, accuracy()))
    return make_outcome(
        seed=seed,
        history=torch.stack(history),
        per_epoch=order.steps_per_epoch,
        diverged_step=end,
        accuracy=accuracy(),
        seconds_per_step=0.0,
        accuracies=curve,
        curve=config.curve,
    )


def agree(found: Outcome, expected: Outcome, rel=1e-9):
    assert (found.seed, found.steps) == (expected.seed, expected.steps)
    assert found.diverged_step == expected.diverged_step
    assert found.train_loss == (
        None if expected.failed else pytest.approx(expected.train_loss, rel=rel)
    )
    assert found.test_accuracy == expected.test_accuracy
    assert found.accuracies == expected.accuracies
    assert [step for step, _ in found.losses] == [step for step, _ in expected.losses]
    assert [v for _, v in found.losses] == pytest.approx([v for _, v in expected.losses], rel=rel)


def timeless(outcomes):
    return [replace(outcome, seconds_per_step=0.0) for outcome in outcomes]


OPTIMIZERS = {
    "sgd": ("sgd", 0.2, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": ("rmsprop", 0.01, {"momentum": 0.5}),
    "adam": ("adam", 0.01, {"amsgrad": True}),
    "kfac": ("kfac", 0.05, {"update_every": 4}),
    "ekfac": ("ekfac", 0.05, {"update_every": 4, "momentum": 0.9}),
    "ddpnopt": ("ddpnopt", 0.2, {"momentum": 0.9, "weight_decay": 1e-3}),
    "ddpnopt rmsprop": ("ddpnopt", 0.01, {"preconditioner": "rmsprop"}),
    "ddpnopt adam": ("ddpnopt", 0.01, {"preconditioner": "adam"}),
    "ddpnopt kfac": ("ddpnopt", 0.05, {"preconditioner": "kfac"}),
    "ddpnopt ekfac": ("ddpnopt", 0.05, {"preconditioner": "ekfac"}),
    "full": ("ddpnopt", 0.2, {"terminal": "full", "value_reg": 1e-2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_seed_is_as_alone(name):
    optimizer, lr, options = OPTIMIZERS[name]
    config = wine(optimizer, lr, options=options, log_every=4)
    for found, seed in zip(train_together(config, SEEDS, torch.float64), SEEDS, strict=True):
        expected = alone(config, seed)
        agree(found, expected)
        assert expected.losses[-1][1] != pytest.approx(expected.losses[0][1], rel=1e-2)  # it moved
        assert [step for step, _ in found.accuracies] == [4, 8, 11, 12, 15]


BLOCKS = {"network": "residual-fcn", "widths": (6, 6, 4), "activation": "tanh"}


# What coupled players' Gram numbers leave out below a tolerance is chosen for all seeds at once.
EXACT_KFAC, EXACT_EKFAC = ({"name": name, "gram_tolerance": 0.0} for name in ("kfac", "ekfac"))
GAMES = {
    "dgnopt open loop": ("dgnopt", 0.05, {"information": "open-loop"}),
    "dgnopt feedback": ("dgnopt", 0.05, {"information": "feedback", "preconditioner": "kfac"}),
    "dgnopt rmsprop": ("dgnopt", 0.01, {"preconditioner": "rmsprop", "alignment": "early"}),
    "dgnopt kfac": ("dgnopt", 0.05, {"preconditioner": EXACT_KFAC, "alignment": "random"}),
    "dgnopt ekfac": ("dgnopt", 0.05, {"preconditioner": EXACT_EKFAC, "alignment": 0}),
}


@pytest.mark.parametrize("name", [*(name for name in OPTIMIZERS if name != "full"), *GAMES])
def test_every_seed_of_a_residual_network_is_as_alone(name, monkeypatch):
    monkeypatch.setattr("ocnopt.optim.rounds.ROUND", 4)
    optimizer, lr, options = {**OPTIMIZERS, **GAMES}[name]
    config = wine(optimizer, lr, options=options, log_every=4, **BLOCKS)
    for found, seed in zip(train_together(config, SEEDS, torch.float64), SEEDS, strict=True):
        expected = alone(config, seed)
        agree(found, expected)
        assert expected.losses[-1][1] != pytest.approx(expected.losses[0][1], rel=1e-2)


@pytest.mark.parametrize("name", ["sgd", "kfac", "ddpnopt", "full"])
def test_every_seed_is_as_in_an_ordinary_run(name):
    optimizer, lr, options = OPTIMIZERS[name]
    config = wine(optimizer, lr, options=options, steps=8, head="sigmoid", activation="tanh")
    for found, seed in zip(train_together(config, SEEDS), SEEDS, strict=True):
        result = train(replace(config, seed=seed))
        assert found.train_loss == pytest.approx(result.train_loss, rel=1e-4)
        assert [v for _, v in found.losses] == pytest.approx(result.history.tolist(), rel=1e-4)
        assert found.test_accuracy == result.test_accuracy
        assert found.accuracies == ((8, result.test_accuracy),)
        assert found.diverged_step is None
        assert found.seconds_per_step > 0


def test_epochs_end_where_they_do_alone():
    config = wine(steps=None, epochs=2, validation=0.25)
    for found, seed in zip(train_together(config, SEEDS, torch.float64), SEEDS, strict=True):
        agree(found, alone(config, seed))
    assert found.steps == 2 * (106 // 12)


def test_without_a_curve_there_is_none():
    for found in train_together(wine(curve=False), SEEDS):
        assert found.losses == found.accuracies == ()
        assert found.train_loss is not None


def test_batches_are_the_seeds_own(monkeypatch):
    seen = []
    monkeypatch.setattr(
        together, "DataOrder", lambda *args: seen.append(args[2]) or DataOrder(*args)
    )
    train_together(wine(steps=1), (5, 3))
    assert seen == [5, 3]


def test_evaluation_in_parts_is_the_same(monkeypatch):
    whole = train_together(wine(), SEEDS)
    monkeypatch.setattr(together, "_EVALUATION_ROWS", 30)
    assert timeless(train_together(wine(), SEEDS)) == timeless(whole)


def test_the_caller_keeps_random_state_and_threads():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train_together(wine(steps=1, threads=2), SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_stack_takes_copies_of_the_weights():
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.Tanh()) for _ in SEEDS]
    model = stack(networks)
    assert [type(m) for m in model] == [nn.Flatten, StackedLinear, nn.Tanh]
    x = torch.randn(4, 3)
    for i, out in enumerate(model(x.repeat(3, 1)).unflatten(0, (3, 4))):
        torch.testing.assert_close(out, networks[i](x))
    nn.init.zeros_(networks[0][1].weight)
    assert bool(model[1].weight[0].any())


def test_stack_finds_the_layers_of_a_tree():
    networks = [
        residual_fcn(ResidualFCN((5, 3), 2, "tanh"), (4,), 2) for _ in SEEDS
    ]  # with a projection, which has no bias
    model = stack(networks)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert model.blocks[1].shortcut.bias is None
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in networks[0].named_parameters()
    ]
    x = torch.randn(4, 4)
    for i, out in enumerate(model(x.repeat(3, 1)).unflatten(0, (3, 4))):
        torch.testing.assert_close(out, networks[i](x))
    assert isinstance(networks[0].stem, nn.Linear)  # untouched


@pytest.mark.parametrize(
    ("layer", "named"), [(nn.LayerNorm(2), "1.weight"), (nn.BatchNorm1d(2, affine=False), "1.runn")]
)
def test_stack_refuses_what_is_no_linear_layer(layer, named):
    with pytest.raises(ValueError, match=f"{named}.* belongs to no linear layer"):
        stack([nn.Sequential(nn.Linear(3, 2), layer) for _ in SEEDS])


# Divergence. At these rates some seeds go wrong, at different steps, and others do not; which do is
# decided by a factor of three or more, not by rounding.
CLIMBING = ("ddpnopt", 3.0, {"feedback_clip": None})
SOME = {
    "torch": ("sgd", 6e103, {}),  # the second loss is within double precision's range, or not
    "ddpnopt": CLIMBING,
    "full": ("ddpnopt", 100.0, {"terminal": "full", "value_reg": 1e-3}),
}
STEPS = {"torch": 2}


@pytest.fixture
def narrow(monkeypatch):
    """Updates end where those of seeds that keep going do not come: beyond, rounding rules."""

    def within(tensors):
        return all(bool((t.abs() <= 5e4).all()) for t in tensors)

    monkeypatch.setattr(base, "all_finite", within)


def diverging(kind, **settings):
    optimizer, lr, options = SOME[kind]
    steps = STEPS.get(kind, 20)
    small = {"batch_size": 8, "activation": "relu", "steps": steps, "log_every": 4}
    return wine(optimizer, lr, options=options, **{**small, **settings})


@pytest.mark.parametrize("kind", SOME)
def test_divergence_is_recorded_and_leaves_the_others_alone(kind, narrow):
    seeds = (0, 1, 2, 3)
    config = diverging(kind)
    outcomes = train_together(config, seeds, torch.float64)
    for found, seed in zip(outcomes, seeds, strict=True):
        expected = alone(config, seed)
        # The loss climbs over many orders of magnitude, and rounding with it.
        rel = 1e-4 if kind == "torch" else 1e-6
        assert found.diverged_step == expected.diverged_step
        if expected.failed:
            assert found.failed and found.steps == found.diverged_step
            assert all(step < found.diverged_step for step, _ in found.accuracies)
        else:
            agree(found, expected, rel)
    assert 0 < sum(o.failed for o in outcomes) < len(seeds)


@pytest.mark.parametrize(("kind", "bad", "good"), [("ddpnopt", 1, 3), ("full", 3, 0)])
def test_nobody_notices_a_neighbour_that_diverges(kind, bad, good, narrow):
    config = diverging(kind)
    first, second = train_together(config, (bad, good), torch.float64)
    assert first.failed
    agree(second, train_together(config, (good,), torch.float64)[0], rel=1e-10)


def test_the_loss_at_which_a_seed_ends_is_its_own(narrow):
    config = diverging("ddpnopt", log_every=100)
    found = train_together(config, (0, 3), torch.float64)[0]
    expected = alone(config, 0)
    assert len(found.losses) == len(expected.losses)
    assert found.losses[-1][1] == pytest.approx(expected.losses[-1][1], rel=1e-3)


class _Failing(torch.optim.SGD):
    """Refuses a step in which a network's first weight is above a bound, and says no more."""

    def step(self, closure=None):
        weight = self.param_groups[0]["params"][0]
        if bool((weight[:, 0, 0] > 0).any()):
            raise NonFiniteError("an update is not finite")
        return super().step(closure)


def first_weights(config, seeds):
    data = load_data(config.resolved())
    for seed in seeds:
        torch.manual_seed(seed)
        yield build_network(config.resolved(), data)[1].weight[0, 0].item()


def test_who_overflows_within_the_optimizer_is_found(monkeypatch):
    """Losses and gradients are finite, so that only trying tells; at the first step, too."""
    monkeypatch.setattr(optimizers, "_class", lambda name: _Failing)
    config, seeds = wine(lr=1e-6, steps=3), range(6)
    refused = [weight > 0 for weight in first_weights(config, seeds)]
    assert 0 < sum(refused) < 6
    outcomes = train_together(config, seeds)
    assert [o.diverged_step == 1 for o in outcomes] == refused
    assert [o.steps for o in outcomes] == [1 if bad else 3 for bad in refused]


def test_everyone_who_fails_at_the_first_step_ends_the_run():
    """A rate that no update survives."""
    outcomes = train_together(wine("kfac", 1e39), SEEDS)
    assert [o.diverged_step for o in outcomes] == [1, 1, 1]
    assert all(o.failed and 0 < o.test_accuracy < 1 for o in outcomes)


@pytest.mark.parametrize(("optimizer", "asked"), [("sgd", 4), ("ddpnopt", 2)])
def test_a_run_whose_seeds_have_all_diverged_ends_early(monkeypatch, optimizer, asked):
    steps = []
    batch = DataOrder.batch
    monkeypatch.setattr(
        DataOrder, "batch", lambda self, step: steps.append(step) or batch(self, step)
    )
    options = {} if optimizer == "sgd" else {"bellman": "off", "rollout": "off"}
    config = wine(optimizer, 1e30, options=options, activation="relu", steps=500, log_every=4)
    outcomes = train_together(config, SEEDS)
    assert [o.diverged_step for o in outcomes] == [2, 2, 2]
    assert [o.steps for o in outcomes] == [2, 2, 2]
    assert max(steps) == asked - 1  # torch's own are found out when a row is due
    expected = [train(replace(config, seed=seed)) for seed in SEEDS]
    assert [o.test_accuracy for o in outcomes] == [r.test_accuracy for r in expected]
    assert [r.diverged_step for r in expected] == [2, 2, 2]


def test_a_preconditioner_that_overflowed_does_not_stay(monkeypatch):
    """KFAC's factors of a seed that diverged may be infinite; those of the others go on."""
    seen = []
    end = together._Together._end

    def spy(self, steps):
        end(self, steps)
        if steps:
            seen.append([v for s in self.optimizer.state.values() for v in s.values()])

    monkeypatch.setattr(together._Together, "_end", spy)
    config = wine("kfac", 0.05, options={"update_every": 1}, steps=6)
    run = together._Together(config.resolved(), SEEDS, torch.float32)
    take = run._attempt

    def poisoned(step):
        if step == 2 and 1 in run.live:
            state = run.optimizer.state[next(run.model.parameters())]
            state["A"][1] = math.inf
            with torch.no_grad():
                for p in run.model.parameters():
                    p[1] = math.nan
        return take(step)

    monkeypatch.setattr(run, "_attempt", poisoned)
    outcomes = run.run()
    assert [o.diverged_step for o in outcomes] == [None, 3, None]
    (kept,) = seen
    assert all(bool(torch.isfinite(v).all()) for v in kept if isinstance(v, torch.Tensor))
    for found, seed in ((outcomes[0], 0), (outcomes[2], 2)):
        expected = train(replace(config, seed=seed))
        assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({}, True),
        ({"optimizer": "ddpnopt", "options": {"dynamics_order": 1, "measure_every": 0}}, True),
        ({"optimizer": "ddpnopt", "options": {"terminal": "full", "dynamics_order": 2}}, False),
        ({"optimizer": "ddpnopt", "options": {"measure_every": 5}}, False),
        ({"optimizer": "vanilla-ddp"}, False),
        ({"optimizer": "emsa"}, False),
        ({"optimizer": "torch.optim:Adagrad"}, False),
        ({"network": "mine:make", "widths": None}, False),
        ({"dataset": "mnist", "network": "cnn", "widths": None}, False),
        (BLOCKS, True),
        ({"optimizer": "dgnopt", **BLOCKS}, True),
        ({"optimizer": "dgnopt", "options": {"alignment": 1}, **BLOCKS}, True),
        ({"optimizer": "dgnopt", "options": {"alignment": "random"}, **BLOCKS}, True),
        # A bandit's rewards are of all seeds.
        ({"optimizer": "dgnopt", "options": {"alignment": "exp3++"}, **BLOCKS}, False),
        ({"optimizer": "dgnopt", "options": {"alignment": "epsilon-greedy"}, **BLOCKS}, False),
        ({"dataset": "digits", "network": "residual-cnn"}, False),
        ({"dataset": "mine:data"}, True),
        ({"device": "cuda"}, False),
    ],
)
def test_what_can_be_together(settings, fits):
    assert can_be_together(wine(**settings)) is fits


def test_data_are_loaded_once(monkeypatch):
    calls, load = [], setup.datasets.load
    monkeypatch.setattr(setup.datasets, "load", lambda *args: calls.append(args) or load(*args))
    train_together(wine(steps=1), SEEDS)
    assert len(calls) == 1
