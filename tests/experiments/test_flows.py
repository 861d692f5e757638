"""Flows against the clock: training, tuning, what is read off runs, words, picture, whole page."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.figures.density import Course, Panel, save_densities
from ocnopt.experiments.flows import (
    GAS,
    MINIBOONE,
    RECIPES,
    FlowNetwork,
    FlowRun,
    build,
    contest,
    load,
    train_flow,
)
from ocnopt.experiments.flows.contest import Contest, Entry, Method, hold
from ocnopt.experiments.flows.page import short_table
from ocnopt.experiments.flows.training import SIDE, SIZES, mesh
from ocnopt.experiments.flows.unseen import unseen
from ocnopt.experiments.flows.words import remarks, sentence
from ocnopt.experiments.reproduce import ode_flow, runner
from ocnopt.experiments.reproduce.report import Settings
from ocnopt.experiments.tuning import TUNING_SEED
from ocnopt.experiments.watcher import Watcher
from ocnopt.ode.flow import ContinuousFlow

SMALL = FlowNetwork(8, 2, "tanh", rtol=1e-2, atol=1e-2)
RUN = FlowRun("gaussians", SMALL, lr=0.05, batch_size=64, steps=6, every=4)
SNOPT = replace(RUN, optimizer="snopt", lr=0.02, options={"momentum": 0.9, "sample_step": 0.25})


@pytest.fixture(scope="module")
def small():
    """The eight Gaussians, with fewer points to be evaluated."""
    data = load("gaussians")
    return replace(data, validation=data.validation[:100], test=data.test[:50])


# networks and recipes


def test_networks_are_those_of_the_released_code():
    """A layer has a weight, a bias, a gate with a bias, and a shift: in x out + 4 out."""

    def count(*widths):
        return sum(a * b + 4 * b for a, b in pairwise(widths))

    miniboone, gas = build(MINIBOONE, 43), build(GAS, 8)
    assert sum(p.numel() for p in miniboone.parameters()) == count(43, 860, 860, 43)
    assert sum(p.numel() for p in gas.parameters()) == 5 * count(8, 160, 160, 160, 8)
    kinds = [type(layer).__name__ for layer in miniboone.legs[0].func.layers]
    assert kinds == ["ConcatSquashLinear", "Softplus"] * 2 + ["ConcatSquashLinear"]
    assert [type(x) for x in gas.legs[4].func.layers[1::2]] == [nn.Tanh] * 3
    for flow in (miniboone, gas):
        assert flow.divergence == "hutchinson"
        assert {(leg.method.rtol, leg.method.atol) for leg in flow.legs} == {(1e-6, 1e-8)}
    assert [leg.seminorm for leg in gas.legs] == [True] * 5
    assert not miniboone.legs[0].seminorm


def test_recipes_are_those_of_the_released_scripts():
    found = {
        name: (run.batch_size, run.steps // run.every, run.lr) for name, run in RECIPES.items()
    }
    assert found == {
        "miniboone-adam": (128, 20, 0.003),
        "miniboone-sgd": (128, 25, 0.01),
        "miniboone-snopt": (128, 10, 0.005),
        "gas-adam": (1000, 30, 0.002),
        "gas-sgd": (1000, 30, 0.01),
        "gas-snopt": (1000, 20, 0.01),
    }
    assert RECIPES["gas-snopt"].every == int(852_174 * RECIPES["gas-snopt"].share) // 1000
    assert RECIPES["miniboone-snopt"].every == 29_556 // 128
    assert RECIPES["miniboone-snopt"].options["damping"] == 0.1


# training


@pytest.mark.parametrize("run", [RUN, SNOPT, replace(RUN, optimizer="sgd")])
def test_a_run_comes_nearer_and_repeats(run, small):
    found = train_flow(run, small)
    points = found["points"]
    assert [p["step"] for p in points] == [0, 4, 6]
    assert points[-1]["nll"] < points[0]["nll"] - 0.05
    assert points[0]["cpu_seconds"] == points[0]["seconds"] == points[0]["evaluations"] == 0
    for earlier, later in pairwise(points):
        assert later["cpu_seconds"] > earlier["cpu_seconds"]
        assert later["seconds"] > earlier["seconds"]
        assert later["evaluations"] > earlier["evaluations"]
    assert found["diverged_step"] is None and found["mesh"] is None and found["unseen"] is None
    assert json.loads(json.dumps(found)) == found
    again = train_flow(run, small)
    assert [p["nll"] for p in again["points"]] == [p["nll"] for p in points]
    other = train_flow(replace(run, seed=1), small)
    assert other["points"][0]["nll"] != points[0]["nll"]


def test_evaluations_are_of_the_held_points_and_exact(small):
    """By noise of its own, and at these tolerances, an estimate would be far off."""
    rough = replace(RUN, network=replace(SMALL, divergence="hutchinson"), steps=0)
    torch.manual_seed(0)
    field = build(SMALL, 2).legs[0].func
    exact = ContinuousFlow(field, 2, rtol=1e-6, atol=1e-6)
    for held, points in (("validation", small.validation), ("test", small.test)):
        (point,) = train_flow(replace(rough, held=held), small)["points"]
        with torch.no_grad():
            wanted = -exact(points).mean().item()
        assert point["nll"] == pytest.approx(wanted, abs=1e-4)


def test_a_run_that_diverges_is_an_outcome(small):
    found = train_flow(replace(RUN, optimizer="sgd", lr=1e4), small)
    assert found["diverged_step"] in (1, 2, 3, 4)
    assert [p["step"] for p in found["points"]] == [0]
    assert all(math.isfinite(p["nll"]) for p in found["points"])


def test_the_mesh_is_row_by_row_from_below(small):
    found = train_flow(replace(RUN, mesh=3, steps=1), small)
    assert mesh(3).tolist()[:4] == [[-SIDE, -SIDE], [0, -SIDE], [SIDE, -SIDE], [-SIDE, 0]]
    torch.manual_seed(0)
    assert len(found["mesh"]) == 9
    assert found["mesh"][4] == max(found["mesh"])  # nearly normal still: the middle
    assert [layer["layer"] for layer in found["unseen"]][:2] == [
        "odes.0.func.layers.0.linear",
        "odes.0.func.layers.0.gate",
    ]


def test_bad_runs_are_one_error(small):
    with pytest.raises(InputError, match="no optimizer 'newton'"):
        train_flow(replace(RUN, optimizer="newton"), small)
    with pytest.raises(InputError, match="smaller batch"):
        train_flow(replace(RUN, share=0.001), small)
    with pytest.raises(InputError, match=r"no density 'spiral'.*miniboone"):
        load("spiral")


def test_planes_are_drawn_alike_every_time():
    first, second = load("moons"), load("moons")
    assert torch.equal(first.train, second.train)
    assert tuple(map(len, (first.train, first.validation, first.test))) == SIZES
    assert not torch.equal(first.validation, first.test)


# tables


def write_tables(root):
    """A made-up MINIBOONE and GAS, of 400 rows each."""
    generator = np.random.default_rng(0)
    for name in ("miniboone", "gas"):
        (root / name).mkdir()
    np.save(root / "miniboone" / "data.npy", generator.normal(size=(400, 43)))
    rows = generator.normal(size=(1600, 19))
    rows[:, 11:] = rows[:, 3:11] + 0.01 * generator.normal(size=(1600, 8))
    np.savetxt(root / "gas" / "ethylene_CO.txt", rows, header="time", comments="")


@pytest.mark.parametrize("name", ["miniboone-snopt", "gas-adam"])
def test_tables_are_trained_on(name, tmp_path):
    write_tables(tmp_path)
    recipe = RECIPES[name]
    data = load(recipe.density, tmp_path)
    network = replace(recipe.network, hidden=8, rtol=1e-2, atol=1e-2)
    options = {**recipe.options, "sample_step": 0.25} if "snopt" in name else {}
    run = replace(
        recipe, network=network, batch_size=30, steps=4, every=2, lr=0.03, options=options
    )
    found = train_flow(run, data)
    points = found["points"]
    assert [p["step"] for p in points] == [0, 2, 4]
    dim = {"miniboone": 43, "gas": 8}[recipe.density]
    normal = 0.5 * dim * (1 + math.log(2 * math.pi))  # what normal points come to at best
    assert 0.8 * normal < points[0]["nll"] < 1.5 * normal
    assert points[-1]["nll"] < points[0]["nll"]


# what the factors do not see


class Linear(nn.Module):
    """``F = W z``."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)

    def forward(self, t, z):
        return self.linear(z)


def test_unseen_is_the_divergences_own_part():
    """Of F = W z the rest is -I for every sample, however the weights are."""
    torch.manual_seed(0)
    flow = ContinuousFlow(Linear(), 2, rtol=1e-5, atol=1e-5)
    x = torch.randn(4, 2)
    (found,) = unseen(flow, x, step=1e-2)
    (weight,) = flow.parameters()
    wholes = torch.stack([torch.autograd.grad(flow(p[None]).sum(), weight)[0] for p in x])
    seen = wholes + torch.eye(2)
    assert found["layer"] == "odes.0.func.linear"
    assert found["share"] == pytest.approx(2 * math.sqrt(2) / wholes.norm().item(), rel=2e-2)
    cosine = (wholes * seen).sum() / (wholes.norm() * seen.norm())
    assert found["cosine"] == pytest.approx(cosine.item(), abs=2e-2)
    assert weight.grad is None and not flow.legs[0]._listeners


def test_gates_are_seen_whole():
    torch.manual_seed(0)
    flow = build(replace(SMALL, rtol=1e-4, atol=1e-4), 2)
    found = {r["layer"].rpartition(".")[2]: [] for r in unseen(flow, torch.randn(4, 2))}
    for row in unseen(flow, torch.randn(4, 2)):
        found[row["layer"].rpartition(".")[2]].append(row["share"])
    assert max(found["gate"] + found["shift"]) < 0.02  # the grid's error
    assert min(found["linear"]) > 0.04


# contests


def result(nlls, diverged=None, pace=1.0):
    points = [
        {
            "step": 10 * i,
            "cpu_seconds": 10 * i * pace,
            "seconds": 20 * i * pace,
            "nll": nll,
            "evaluations": 300 * i,
        }
        for i, nll in enumerate(nlls)
    ]
    return {"points": points, "diverged_step": diverged, "mesh": None, "unseen": None}


def entry(label, lr, *results, lrs=(0.1, 0.2, 0.3)):
    trials = tuple((replace(RUN, lr=lr), result([3.0, 2.0 + lr])) for lr in lrs)
    return Entry(Method(label, label.lower(), lrs), trials, lr, results)


def of(*entries, margins=(0.5, 0.0)):
    return Contest("gaussians", entries, margins)


def test_what_is_read_off_runs():
    adam = entry("Adam", 0.2, result([5, 4, 3, 2]), result([5, 3, 3, 3]))
    fast = entry("SNOpt", 0.1, result([5, 2.9, 2.2, 2.4], pace=2), result([5, 2.5, 2.6], 22))
    slow = entry("SGD", 0.3, result([5, 4, 3.5, 3.2]), result([5, 4, 4, 2.9]))
    all_three = of(adam, fast, slow)
    assert all_three.targets == {0.5: 3.0, 0.0: 2.5}
    assert adam.to(3.0, "step") == [20, 10]
    assert adam.to(2.5, "step") == [30, math.inf]
    assert fast.to(3.0, "cpu_seconds") == [20, 10]
    assert slow.to(2.5, "cpu_seconds") == [math.inf, math.inf]
    assert all_three.ratio(fast, 3.0, "step") == pytest.approx(10 / 15)
    assert all_three.ratio(fast, 3.0, "cpu_seconds") == pytest.approx(1.0)
    assert all_three.ratio(slow, 2.5, "step") is None
    assert fast.finals == [2.4] and len(fast.sound) == 1
    assert fast.at(10, "step") == [2.9, 2.5]
    assert fast.at(30, "step") == [2.4]  # the other had diverged
    assert adam.at(19.9, "cpu_seconds") == [4, 3]
    assert all_three.steps == [0, 10, 30]
    assert all_three.seconds == [7.5, 15, 30]
    assert [e.on_edge for e in all_three.entries] == [False, True, True]
    assert adam.per_step == [1, 1] and fast.per_step == [2, 1]
    assert adam.evaluations == [30, 30]


def test_words_follow_from_the_numbers():
    adam = entry("Adam", 0.2, *[result([5, 3, 2 + d]) for d in (0, 0.01, 0.02)])
    better = entry("SNOpt", 0.2, *[result([5, 2, 1.5 + d]) for d in (0, 0.01, 0.02)])
    worse = entry("SGD", 0.2, *[result([5, 4, 3 + d]) for d in (0, 0.01, 0.02)])
    text = sentence([of(adam, better, worse, margins=(0.03,))])
    assert "SNOpt took 0.50 times Adam's CPU seconds, 0.50 times its steps" in text
    assert "SGD never got there" in text
    assert "SNOpt 1.510 ± 0.010, below Adam beyond the spread" in text
    assert "SGD 3.010 ± 0.010, above Adam beyond the spread" in text
    lost = entry("Adam", 0.2, result([5.0], 3))
    assert "Adam diverged, so that there are no targets" in sentence([of(lost, better)])
    columns, rows = short_table([of(adam, better, worse, margins=(0.03,))], {"gaussians": 1.0})
    assert len(columns) == len(rows[0]) == 5
    assert rows[1][3] == "0.510 ± 0.010"
    assert [row[4] for row in rows] == ["20 (1.00x)", "10 (0.50x)", "never on 3 of 3"]


def test_remarks_name_edges_divergence_and_other_work():
    adam = entry("Adam", 0.2, result([5, 3, 2]))
    edge = entry("SNOpt", 0.3, result([5, 3, 2]), result([5, 3], 17))
    none = entry("SGD", None)
    lines = remarks([of(adam, edge, none)])
    assert len(lines) == 5 and lines[-1] == ""
    assert "SNOpt: its learning rate, 0.3, is at the end of those that were tried" in lines[0]
    assert "SNOpt: 1 of 2 final runs diverged, at step 17" in lines[1]
    assert "SGD: every candidate diverged" in lines[2]
    assert "went on for 2.00 times the CPU seconds" in lines[3]
    assert "SGD did not start" in sentence([of(adam, edge, none, margins=(0.03,))])


@pytest.fixture
def fake(monkeypatch):
    """Runs that cost nothing: a learning rate's loss is its distance from .2, SGD's .3 diverges."""
    ran = []

    def train(run, data):
        ran.append(run)
        diverged = 7 if (run.optimizer, run.lr) == ("sgd", 0.3) else None
        return result([5.0] if diverged else [5.0, 2 + abs(run.lr - 0.2)], diverged)

    monkeypatch.setattr(contest, "train_flow", train)
    return ran


def test_tuning_chooses_by_the_validation_points_and_finals_have_seeds_of_their_own(fake, tmp_path):
    methods = (
        Method("Adam", "adam", (0.1, 0.21)),
        Method("plain", "sgd", (0.1, 0.3)),
        Method("SGD", "sgd", (0.1, 0.3), {"momentum": 0.9}),
    )
    settings = Settings("ode-flow", tmp_path, processes=1)
    base = replace(RUN, mesh=5)
    found = hold(settings, methods, base, (0.0,), 2, Watcher())
    assert [e.lr for e in found.entries] == [0.21, 0.1, 0.1]
    assert [len(e.results) for e in found.entries] == [2, 2, 2]
    tuning = [run for run in fake if run.held == "validation"]
    assert {run.seed for run in tuning} == {TUNING_SEED} and len(tuning) == 6
    assert all(run.mesh == 0 for run in tuning)
    finals = [(run.seed, run.lr, dict(run.options), run.mesh) for run in fake[6:]]
    momentum = {"momentum": 0.9}
    assert finals == [
        (0, 0.21, {}, 5),
        (0, 0.1, {}, 5),
        (0, 0.1, momentum, 5),
        (1, 0.21, {}, 0),
        (1, 0.1, {}, 0),
        (1, 0.1, momentum, 0),
    ]


def test_a_method_that_always_diverges_has_no_final_runs(fake, tmp_path):
    methods = (Method("Adam", "adam", (0.1,)), Method("SGD", "sgd", (0.3,)))
    settings = Settings("ode-flow", tmp_path, processes=1)
    found = hold(settings, methods, RUN, (0.0,), 2, Watcher())
    assert found.entries[1].lr is None and found.entries[1].results == ()
    assert found.entries[1].finals == [] and found.seconds == [2.5, 5.0, 10.0]
    with pytest.raises(ValueError, match="same number"):
        hold(settings, (*methods, Method("x", "sgd", (1.0, 2.0))), RUN, (0.0,), 2, Watcher())


# picture and page


def course(name, longest=3, grid=9):
    runs = [[2.0, 1.0, 0.5], [2.0, 1.2, 0.4][:longest]]
    steps = [[0.0, 10.0, 20.0][: len(run)] for run in runs]
    return Course(name, steps, steps, runs, [-3.0] * grid if grid else None)


def test_picture(tmp_path):
    points = np.zeros((5, 2), dtype=np.float32)
    courses = [course("Adam"), course("SNOpt", longest=2, grid=0)]
    targets = {"Adam + 0.1": 0.55, "Adam, final": 0.45, "close": 0.46}
    path = tmp_path / "flows.png"
    panels = [Panel("gaussians", points, courses, targets), Panel("moons", points, courses, {})]
    save_densities(path, "Flows", panels, 4.0, "CPU seconds")
    assert imread(path).shape[1] == 1200
    with pytest.raises(InputError, match="8 points are no square"):
        save_densities(
            path, "Flows", [Panel("moons", points, [course("Adam", grid=8)], {})], 4.0, "s"
        )


@pytest.fixture
def tiny(monkeypatch, small):
    """The quick version in two seconds."""
    methods = tuple(
        replace(m, lrs=m.lrs[:1], options={**m.options, "sample_step": 0.25})
        if m.optimizer == "snopt"
        else replace(m, lrs=m.lrs[:1])
        for m in ode_flow.METHODS
    )
    monkeypatch.setattr(ode_flow, "PLANE", SMALL)
    monkeypatch.setattr(ode_flow, "MESH", 5)
    monkeypatch.setattr(ode_flow, "QUICK", ode_flow.Preset(("gaussians",), methods, 2, 1, 1))
    monkeypatch.setattr(contest, "load", lambda name, root: small)


def test_the_whole(tiny, tmp_path):
    settings = Settings("ode-flow", tmp_path, quick=True, processes=1, cache=tmp_path / "cache")
    report = runner.reproduce(settings)
    files = {path.suffix for path in tmp_path.glob("ode-flow.*")}
    assert files == {".md", ".json", ".png", ".html"}
    page = (tmp_path / "ode-flow.md").read_text()
    for words in (
        "`ocnopt reproduce ode-flow --quick`",
        report.sentence,
        "## What the factors do not see",
        "SGD with momentum 0.9; SNOpt with momentum 0.9, damping 0.05",
        "(ode-flow.png)",
    ):
        assert words in page
    kept = json.loads((tmp_path / "ode-flow.json").read_text())
    assert [(r["kind"], r["method"]) for r in kept["rows"]] == [
        (kind, name) for name in ("Adam", "SGD", "SNOpt") for kind in ("tuning", "final")
    ]
    assert all(r["curve"]["step"] == [0, 1, 2] for r in kept["rows"])
    assert kept["true_loss"]["gaussians"] == pytest.approx(2.8, abs=0.1)
    before = [r["curve"]["cpu_seconds"] for r in kept["rows"]]
    again = runner.reproduce(settings)  # nothing is run anew: not even times differ
    assert [r["curve"]["cpu_seconds"] for r in again.rows] == before
