"""Images by a Neural ODE: the network, its settings, runs that diverge, and the races."""

import importlib.util
import math
import warnings
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torchdiffeq import odeint

from ocnopt.errors import SolverError
from ocnopt.experiments import networks, optimizers
from ocnopt.experiments.config import TrainConfig, from_json
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.grid import run_grid
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.problems import Solver
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce import ode_image, runner
from ocnopt.experiments.reproduce.report import Settings
from ocnopt.experiments.setup import build_network, load_data
from ocnopt.experiments.training import train
from ocnopt.ode import NeuralODE, adjoint, neural_ode
from ocnopt.ode.solve import METHODS

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)

# The network


@pytest.mark.parametrize(("shape", "count"), [(MNIST, 207_306), (CIFAR, 208_458)])
def test_the_network_has_as_many_parameters_as_the_papers(shape, count):
    net = networks.ode_cnn(networks.OdeCNN(), shape, 10)
    assert sum(p.numel() for p in net.parameters()) == count
    config = TrainConfig(**RECIPES["cifar-10-ode-full"]).resolved()
    assert (config.channels, config.method, config.rtol, config.atol) == (64, "dopri5", 1e-3, 1e-3)


def by_hand(net, x):
    """Its outputs, from weights alone: a sum over pixels in place of a pool."""
    w = dict(net.named_parameters())
    x = F.relu(F.conv2d(x, w["conv1.weight"]))
    x = F.relu(F.conv2d(x, w["conv2.weight"], stride=2, padding=1))
    x = F.conv2d(x, w["conv3.weight"], stride=2, padding=1)

    def field(t, x):
        for layer in (0, 2):
            name = f"ode.func.layers.{layer}.conv"
            time = torch.ones_like(x[:, :1]) * t
            x = F.conv2d(torch.cat([x, time], 1), w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
            x = F.relu(x) if layer == 0 else x
        return x

    t = torch.tensor([0.0, 1.0])
    x = F.relu(odeint(field, x, t, method="rk4", options={"step_size": 0.01})[-1])
    mean = sum(x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3]))
    mean = mean / (x.shape[2] * x.shape[3])
    return mean, mean @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize(("shape", "left"), [(MNIST, 6), (CIFAR, 7), ((1, 8, 8), 1)])
def test_the_network_is_what_it_says(exact, shape, left):
    net = networks.ode_cnn(networks.OdeCNN(4, rtol=1e-9, atol=1e-9), shape, 5)
    x = torch.randn(3, *shape)
    mean, outputs = by_hand(net, x)
    # The reference's hundred steps of fourth order leave about 1e-9, and ReLU's kinks some more.
    torch.testing.assert_close(net(x), outputs, rtol=1e-6, atol=1e-6)
    inside = net[:-3](x)
    assert inside.shape == (3, 4, left, left)
    if left >= 6:  # the paper's mean over 6x6 pixels leaves some of CIFAR-10's out
        papers = F.avg_pool2d(inside, 6).flatten(1)
        assert torch.allclose(papers, mean, atol=1e-6) is (left == 6)


def test_the_time_is_seen():
    net = networks.ode_cnn(networks.OdeCNN(4), MNIST, 10)
    x = torch.randn(2, 4, 6, 6)
    early, late = (net.ode.func(torch.tensor(t), x) for t in (0.0, 1.0))
    assert (early - late).abs().max() > 1e-3


def test_options_reach_the_solver():
    config = TrainConfig(network="ode-cnn", channels=3, method="bosh3", rtol=1e-2, atol=1e-5)
    config = config.resolved()
    net = build_network(config, load_data(config))
    method = net.ode.method
    assert (method.name, method.rtol, method.atol) == ("bosh3", 1e-2, 1e-5)
    assert method.options == net.ode.adjoint_method.options == {"max_num_steps": 200}
    assert net.conv1.out_channels == 3


def test_a_solver_with_fixed_steps_takes_one(exact):
    net = networks.ode_cnn(networks.OdeCNN(3, "euler"), MNIST, 10)
    x = torch.randn(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchdiffeq's, of options that a solver has not
        end = net.ode(x)
    torch.testing.assert_close(end, x + net.ode.func(torch.tensor(0.0), x))


def test_solvers_are_the_librarys():
    assert set(get_args(Solver)) == set(METHODS)


def test_settings_have_defaults_and_limits():
    config = TrainConfig(dataset="mnist", network="ode-cnn").resolved()
    assert (config.channels, config.method, config.rtol, config.atol) == (64, "dopri5", 1e-3, 1e-3)
    assert (config.hidden, config.widths, config.activation) == (None, None, None)
    assert TrainConfig(**from_json(config.to_json())) == config
    plain = TrainConfig(network="cnn").resolved()
    assert (plain.channels, plain.method, plain.rtol, plain.atol) == (32, None, None, None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "dopri5"}, "method belongs to --network .*ode.*, not to fcn"),
        ({"network": "ode-cnn", "method": "rk"}, "method 'rk' is not known; choose from dopri5"),
        ({"network": "ode-cnn", "rtol": 0.0}, "rtol must be a positive number"),
        ({"network": "ode-cnn", "atol": math.inf}, "atol must be a positive number"),
        ({"network": "ode-cnn", "channels": 0}, "channels must be at least 1"),
        ({"network": "ode-cnn", "dataset": "wine"}, "network ode-cnn needs images"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**settings)


@pytest.mark.parametrize("shape", [(5,), (1, 5, 28), (1, 28, 5)])
def test_small_inputs_are_refused(shape):
    with pytest.raises(InputError, match="ode-cnn needs images of at least 6x6"):
        networks.ode_cnn(networks.OdeCNN(), shape, 10)
    assert networks.ode_cnn(networks.OdeCNN(2), (1, 6, 6), 3)(torch.ones(2, 1, 6, 6)).shape == (
        2,
        3,
    )


def test_without_a_solver_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    gone = lambda name, *rest: None if name == "torchdiffeq" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    with pytest.raises(InputError, match=r"ode-cnn needs torchdiffeq; pip install 'ocnopt\[ode\]'"):
        networks.ode_cnn(networks.OdeCNN(), MNIST, 10)


# Runs that diverge

SMALL = {"network": "ode-cnn", "channels": 3, "batch_size": 32, "evaluate_every": 0.06}
OPTIMIZERS = ["adam", "snopt"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_equation_that_explodes_is_an_outcome(monkeypatch, optimizer):
    """From the fourth solve of training on, as after a step that was much too long."""
    solve, solves, errors = NeuralODE.forward, [], []

    def forward(self, *args):
        solves.append(self.training)
        if solves.count(True) == 4 and self.training:
            with torch.no_grad():
                for p in self.parameters():
                    p.copy_(p.abs() * 1e3)
        try:
            return solve(self, *args)
        except SolverError as error:
            errors.append((self.training, str(error)))
            raise

    monkeypatch.setattr(NeuralODE, "forward", forward)
    config = TrainConfig(optimizer=optimizer, lr=0.01, steps=9, **SMALL)
    (outcome,) = run_grid([config], processes=1)
    assert outcome.failed and outcome.diverged_step == outcome.steps == 4
    assert outcome.test_accuracy == 0
    assert [step for step, *_ in outcome.clock] == [0, 3]  # nothing after the last sound step
    # The equation could be solved neither in training nor on the test set.
    assert [training for training, _ in errors] == [True, False]
    assert all("NeuralODE of TimedSequential: dopri5" in text for _, text in errors)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_solve_that_fails_ends_a_run(monkeypatch, optimizer, direction):
    whole = train(TrainConfig(optimizer=optimizer, lr=0.01, steps=3, **SMALL))
    solve, calls = adjoint.solve, []

    def failing(*args, where, **kwargs):
        calls.append("backward" if where.startswith("the adjoint") else "forward")
        if calls.count(direction) == 4:
            raise SolverError("it needs steps smaller than the numbers can tell apart")
        return solve(*args, where=where, **kwargs)

    monkeypatch.setattr(adjoint, "solve", lambda *a, where="", **k: failing(*a, where=where, **k))
    result = train(TrainConfig(optimizer=optimizer, lr=0.01, steps=9, **SMALL))
    assert result.diverged_step == 4 and result.history.shape == (4,)
    assert math.isnan(result.train_loss)
    assert result.rows[-1]["diverged"] is True
    # What was learned until then is kept.
    assert torch.equal(result.history[:3], whole.history)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name


def test_what_cannot_be_solved_is_classified_wrong(monkeypatch):
    solve, evaluations = neural_ode.solve, []

    def failing(*args, **kwargs):
        evaluations.append(args)
        if len(evaluations) == 2:
            raise SolverError("it ran out of steps")
        return solve(*args, **kwargs)

    monkeypatch.setattr(neural_ode, "solve", failing)
    settings = {**SMALL, "evaluate_every": 1e-3}
    result = train(TrainConfig(optimizer="adam", lr=0.01, steps=3, **settings))
    assert result.diverged_step is None
    first, second, *rest = [row["test_accuracy"] for row in result.rows]
    assert second == 0 < min(first, *rest)


def test_a_field_that_is_too_steep_is_given_up():
    """Without an end the solver would go on, step by tiny step."""
    net = networks.ode_cnn(networks.OdeCNN(3, max_steps=20), MNIST, 10)
    with torch.no_grad():
        for p in net.ode.parameters():
            p.mul_(30)
    with pytest.raises(SolverError, match="ran out of steps"):
        net(torch.randn(2, *MNIST))


# The races


@pytest.mark.parametrize(
    ("race", "dataset", "sgd"),
    [(ode_image.CIFAR, "cifar-10", 0.01), (ode_image.MNIST, "mnist", 0.02)],
    ids=["cifar-10", "mnist"],
)
def test_races_are_tuned_alike_about_the_released_rates(race, dataset, sgd):
    contenders = {c.label: c for c in race.contenders}
    assert list(contenders) == ["Adam", "SGD", "SNOpt"] and race.seeds >= 3
    assert {c.candidates for c in race.contenders} == {6}
    for label, rate in (("Adam", 1e-3), ("SGD", sgd)):
        lrs = contenders[label].lrs
        assert rate in lrs and lrs[0] < rate < lrs[-1]
    assert contenders["SGD"].options == {"momentum": 0.9}
    own, also = contenders["SNOpt"].options, contenders["SNOpt"].also
    assert own["update_every"] == 100 and own["precondition_all"]
    assert also == {"damping": (0.05, 0.2)} and not own.keys() & also.keys()
    released = 0.01 if dataset == "cifar-10" else 0.02
    assert released in contenders["SNOpt"].lrs
    tuning, final = race.tuning, race.final
    assert (tuning.dataset, tuning.network, tuning.channels) == (dataset, "ode-cnn", 15)
    assert (tuning.epochs, tuning.steps) == (None, race.tuning_steps)
    assert final.epochs is None and tuning.steps == final.steps
    assert (tuning.validation, final.validation) == (0.05, 0.0)


def test_the_released_settings_are_not_tuned(monkeypatch, tmp_path, mnist_root, asked):
    monkeypatch.setattr("ocnopt.experiments.race.tune.run_grid", None)
    small = replace(ode_image.RELEASED.base, batch_size=16)  # there are 60 images
    monkeypatch.setitem(ode_image.RACES, "ode-released", replace(ode_image.RELEASED, base=small))
    report = runner.reproduce(Settings("ode-released", tmp_path, data_root=mnist_root))
    assert {(c.optimizer, c.lr) for c in asked} == {("adam", 1e-3), ("sgd", 0.02), ("snopt", 0.02)}
    assert [c.seed for c in asked] == [0] * 3 + [1] * 3 + [2] * 3
    assert {c.validation for c in asked} == {0.0}
    page = (tmp_path / "ode-released.md").read_text()
    assert "nothing was tuned" in page and "greatest that was tried" not in page
    assert [row[1] for row in report.table] == ["lr 0.001", "lr 0.02", "lr 0.02"]


def test_ocnopt_differs_from_snopt_in_its_feedback_alone():
    """Without feedback they take the same steps."""
    race = ode_image.WHOLE
    torch.manual_seed(0)
    models = [networks.ode_cnn(networks.OdeCNN(3, "rk4"), (1, 8, 8), 10) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    off = ({}, {"information": "open-loop"})
    for model, contender, extra in zip(models, race.contenders, off, strict=True):
        criterion = torch.nn.CrossEntropyLoss()
        options = {**contender.options, **extra}
        optimizer = optimizers.build(contender.optimizer, model, criterion, 0.01, options)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_the_paper_is_quoted():
    paper = ode_image.CIFAR.paper
    assert paper.accuracy == {"Adam": 77.3, "SGD": 76.4, "SNOpt": 79.1}
    assert paper.seconds[75]["SNOpt"] / paper.seconds[75]["Adam"] == pytest.approx(0.37, abs=0.01)
    assert ode_image.MNIST.paper is None


def invented(config):
    """A run of a few evaluations, better the greater its rate."""
    accuracies = [0.1, 0.5, 0.6 + config.lr]
    return Outcome(
        seed=config.seed,
        train_loss=0.5,
        test_accuracy=accuracies[-1],
        diverged_step=None,
        steps=config.steps,
        seconds_per_step=0.1,
        accuracies=tuple(enumerate(accuracies)),
        clock=((0, 0.0, 0.0), (1, 0.1, 0.1), (2, 0.2, 0.2)),
    )


@pytest.fixture
def asked(monkeypatch):
    """The runs that a race asks for; their results are invented."""
    found = []

    def run_grid(configs, **_):
        found.extend(configs)
        return [invented(config) for config in configs]

    for module in ("run", "tune"):
        monkeypatch.setattr(f"ocnopt.experiments.race.{module}.run_grid", run_grid)
    return found


@pytest.mark.parametrize("name", ["ode-image", "ode-mnist", "ode-whole"])
def test_the_small_version_needs_no_files(tmp_path, name, asked):
    report = runner.reproduce(Settings(name, tmp_path, data_root=tmp_path, quick=True))
    assert {(c.steps, c.validation) for c in asked} == {(22, 0.1), (44, 0.0)}
    labels = ["SNOpt", "OCNOpt"] if name == "ode-whole" else ["Adam", "SGD", "SNOpt"]
    assert len(asked) == len(labels) * (2 + 2)
    assert [row[0] for row in report.table] == labels
    page = (tmp_path / f"{name}.md").read_text()
    assert f"`ocnopt reproduce {name} --quick`" in page and "(22 steps, seed 1000)" in page
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["ode-image", "ode-mnist", "ode-released", "ode-whole"])
def test_without_files_it_says_which(tmp_path, name):
    what = "cifar-10" if name == "ode-image" else "mnist"
    with pytest.raises(InputError, match=f"{what}.*ocnopt data"):
        runner.reproduce(Settings(name, tmp_path, data_root=tmp_path))
