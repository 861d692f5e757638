import json
import math
from dataclasses import replace

import pytest

from ocnopt.experiments import grid
from ocnopt.experiments.cache import Cache
from ocnopt.experiments.choices import with_recipe
from ocnopt.experiments.compare import (
    Comparison,
    Contender,
    Entry,
    compare,
    parse_contender,
    parse_rates,
    save,
    stepper,
)
from ocnopt.experiments.compare.rates import Workable, best_rate, workable_range
from ocnopt.experiments.compare.stepper import ROUNDS, StepTime
from ocnopt.experiments.compare.words import range_texts, remarks, verdict
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.watcher import Watcher

OWN = """
import numpy as np
from torch import nn

def model(shape, classes):
    return nn.Sequential(nn.Linear(shape[0], 8), nn.Tanh(), nn.Linear(8, classes))

def narrow(shape, classes):
    return nn.Linear(shape[0] + 1, classes)

def unfinished(shape, classes):
    raise KeyError("boom")

def data():
    draws = np.random.default_rng(0)
    x = draws.normal(size=(120, 4))  # float64, as numpy makes it
    y = (x[:, 0] > 0).astype(int)
    return x[:80], y[:80], x[80:], y[80:]
"""


def outcome(accuracy, loss=0.1, seed=0):
    """A run that ended; with loss None, one that diverged."""
    step = 3 if loss is None else None
    return Outcome(seed, loss, accuracy, step, 10, 0.0, ((5, 1.0), (10, 0.5)), ((10, accuracy),))


def swept(*means):
    """Two seeds per learning rate at these accuracies; None for a diverged run among them."""
    return [
        [outcome(0.1, None), outcome(0.9)] if mean is None else [outcome(mean), outcome(mean)]
        for mean in means
    ]


# learning rates and optimizers as text


def test_rates_are_evenly_spaced_in_their_logarithm_or_listed():
    assert parse_rates("0.01:1:3") == (0.01, 0.1, 1.0)
    assert parse_rates("0.4,0.1,0.1") == (0.1, 0.4)
    assert parse_rates("0.5") == (0.5,)


@pytest.mark.parametrize(
    "text", ["", "fast", "1:0.1:3", "0.1:1:1", "0.1:1", "0:1:3", "-1,1", "nan"]
)
def test_rates_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError, match=r"FROM:TO:COUNT"):
        parse_rates(text)


def test_an_optimizer_is_a_name_options_and_a_sweep():
    found = parse_contender("ddpnopt preconditioner=rmsprop lr=0.1,0.2 momentum=0.9")
    assert found.optimizer == "ddpnopt"
    assert found.label == "ddpnopt preconditioner=rmsprop momentum=0.9"
    assert found.options == {"preconditioner": "rmsprop", "momentum": 0.9}
    assert found.lrs == (0.1, 0.2)
    assert parse_contender("sgd", (0.3,)).lrs == (0.3,)
    assert parse_contender("sgd lr=0.1", (0.3,)).lrs == (0.1,)


def test_the_usual_sweep_is_that_of_the_optimizer_that_lends_m():
    assert parse_contender("ddpnopt preconditioner=adam").lrs == parse_contender("adam").lrs
    assert parse_contender("dgnopt preconditioner=identity").lrs == parse_contender("sgd").lrs
    assert parse_contender("dgnopt").lrs == parse_contender("kfac").lrs  # its default
    sgd = parse_contender("sgd").lrs
    assert (sgd[0], sgd[-1], len(sgd)) == (0.01, 3.0, 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "start with a name"),
        ("lr=0.1", "start with a name"),
        ("sgd momentum", "key=value"),
        ("sgd lr=0.1 lr=0.2", "two sweeps"),
        ("sdg", "sgd"),
        ("torch.optim:NAdam", "--lr"),
    ],
)
def test_an_optimizer_that_cannot_be_read_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        parse_contender(text)


def test_a_recipe_gives_way_to_what_is_given():
    assert with_recipe(None, {"steps": 3, "lr": None}) == {"steps": 3}
    assert with_recipe("digits-fcn", {"epochs": 2})["epochs"] == 2
    assert "steps" not in with_recipe("digits-fcn", {"epochs": 2})
    other = with_recipe("digits-fcn", {"network": "my:model"})
    assert "widths" not in other and other["dataset"] == "digits"
    with pytest.raises(InputError, match="digits-fcn"):
        with_recipe("digits", {})


# which rates are good


def test_the_best_rate_counts_failures_as_nothing_and_ties_by_loss():
    assert best_rate(swept(0.5, 0.8, None)) == 1
    assert best_rate([[outcome(0.8, 0.2)], [outcome(0.8, 0.1)]]) == 1
    assert best_rate([[outcome(0.9, None)], [outcome(0.9, None)]]) is None


RATES = (0.1, 0.2, 0.4, 0.8)


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((0.5, 0.9, 0.895, 0.5), Workable(0.2, 0.4, False, False)),
        ((0.5, 0.89, 0.9, 0.5), Workable(0.2, 0.4, False, False)),  # the margin itself is within
        ((0.5, 0.889, 0.9, 0.5), Workable(0.4, 0.4, False, False)),
        ((0.9, 0.9, 0.9, 0.9), Workable(0.1, 0.8, True, True)),
        ((0.9, 0.5, 0.895, 0.895), Workable(0.1, 0.1, True, False)),  # no jump over a gap
        ((0.895, None, 0.9, 0.895), Workable(0.4, 0.8, False, True)),  # nor over a failure
        ((None, 0.1, 0.1, 0.1), None),  # the best has a run that failed
    ],
)
def test_the_workable_range_is_what_is_within_the_margin_around_the_best(means, expected):
    assert workable_range(RATES, swept(*means), 1.0) == expected


def test_no_range_where_all_failed():
    assert workable_range((0.1,), [[outcome(0.1, None)]], 1.0) is None


def test_a_range_says_where_it_may_go_on():
    assert range_texts(Workable(0.01, 0.1, False, False)) == ("0.01 to 0.1", "10x")
    assert range_texts(Workable(0.01, 0.1, True, True)) == ("≤0.01 to ≥0.1", "≥10x")
    assert range_texts(None) == ("none", "-")


# the words


def entry(label, accuracies, workable=(0.2, 0.4), losses=None, best=0.2):
    losses = losses or [0.1] * len(accuracies)
    final = tuple(outcome(a, loss) for a, loss in zip(accuracies, losses, strict=True))
    reach = (
        None if workable is None else Workable(*workable, workable[0] == 0.1, workable[1] == 0.8)
    )
    return Entry(
        Contender(label, "sgd", RATES),
        tuple(map(tuple, swept(0.5, 0.9, 0.9, 0.5))),
        best,
        reach,
        final,
        StepTime(1.5, 1.0, (1.5,)),
    )


def comparison(*entries, margin=1.0):
    base = TrainConfig(dataset="wine", validation=0.1).resolved()
    return Comparison(entries, base, len(entries[0].final), margin, 4.6, 140, 1400, 300, 10)


def test_a_loss_that_exploded_does_not_widen_the_table(tmp_path):
    exploded = comparison(entry("a", (0.1, 0.1), losses=[2e30, 4e30]))
    assert "| 3e+30 ± 1.41e+30 |" in _page(exploded, tmp_path)


def test_overlapping_intervals_are_no_difference():
    said = verdict(comparison(entry("a", (0.90, 0.94)), entry("b", (0.92, 0.96))))
    assert "no contender is better" in said
    assert "92.0 ± 2.8 % (a) to 94.0 ± 2.8 % (b)" in said


def test_equal_results_are_no_difference():
    said = verdict(comparison(entry("a", (0.9, 0.9)), entry("b", (0.9, 0.9))))
    assert "no contender is better" in said


def test_intervals_apart_are_a_difference():
    said = verdict(
        comparison(entry("a", (0.80, 0.81)), entry("b", (0.95, 0.96)), entry("c", (0.94, 0.96)))
    )
    assert said.startswith("b has the highest test accuracy, 95.5 ± 0.7 %: better than a (80.5")
    assert "but not than c" in said


def test_one_seed_tells_nothing():
    said = verdict(comparison(entry("a", (0.8,)), entry("b", (0.95,))))
    assert "no telling" in said


def test_diverged_final_runs_are_left_out():
    best_but_failed = entry("a", (0.99, 0.99), losses=[0.1, None])
    said = verdict(comparison(best_but_failed, entry("b", (0.9, 0.91)), entry("c", (0.9, 0.91))))
    assert "(a left out: runs diverged.)" in said
    assert "highest" not in said
    assert "At no contender's best" in verdict(comparison(best_but_failed))


def test_ranges_are_ranked_only_where_they_are_known():
    flat = (0.9, 0.91)
    wide, narrow = entry("wide", flat, (0.1, 0.8)), entry("narrow", flat, (0.4, 0.4))
    assert "widest" not in verdict(comparison(narrow))
    assert "of wide: a factor of at least 8, against 1 (narrow)" in verdict(
        comparison(narrow, wide)
    )
    assert "cannot be told: those of wide and low reach" in verdict(
        comparison(wide, entry("low", flat, (0.1, 0.2)))
    )
    # 0.2 to 0.4 is one step of the sweep more than 0.4 alone.
    assert "more than one step" in verdict(comparison(narrow, entry("pair", flat, (0.2, 0.4))))
    long = Contender("a", "sgd", (0.1, 0.2, 0.4, 0.8, 1.6, 3.2))
    reaches = {"far": (0.2, 1.6), "near": (0.4, 1.6), "narrow": (0.4, 0.4)}
    two = verdict(
        comparison(
            *(
                replace(entry(n, flat, r), contender=replace(long, label=n))
                for n, r in reaches.items()
            )
        )
    )
    assert "those of far (8) and near (4), which are no more than one step" in two
    assert "against 1 (narrow)." in two
    assert "none has none" in verdict(comparison(wide, narrow, entry("none", flat, None)))


def test_a_best_rate_at_the_end_of_its_sweep_is_remarked_on():
    end = entry("end", (0.9, 0.9), (0.1, 0.1), best=0.1)
    found = " ".join(remarks(comparison(end, entry("inner", (0.9, 0.9)))))
    assert "end: its best learning rate, 0.1, is the least" in found
    assert "inner" not in found
    assert "validation samples" not in found
    assert "cannot show" in " ".join(remarks(comparison(end, margin=0.1)))


def test_a_contender_that_always_fails_is_remarked_on(tmp_path):
    lost = replace(entry("lost", (0.9, 0.9)), best=None, workable=None, final=(), time=None)
    both = comparison(entry("a", (0.9, 0.9)), lost)
    assert "lost: every run diverged" in " ".join(remarks(both))
    assert "| lost | - | - | - | 0/8, 0/0 | none | - | - |" in _page(both, tmp_path)


def _page(result, folder):
    save(result, folder)
    return (folder / "compare.md").read_text()


# the whole


class Counter(Watcher):
    def __init__(self):
        self.total = self.done = 0

    def start(self, total):
        self.total = total

    def advance(self, text=""):
        self.done += 1


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compared_own.py").write_text(OWN)
    return TrainConfig(
        dataset="compared_own:data", network="compared_own:model", batch_size=8, steps=12
    )


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Times are not judged here."""
    monkeypatch.setattr(stepper, "_MOST_TENS", 1)
    monkeypatch.setattr(stepper, "_LONG", 0.0)


@pytest.fixture
def runs(monkeypatch):
    """The runs that are really done."""
    done = []
    real = grid._run

    def counted(job):
        done.extend(job.seeds)
        return real(job)

    monkeypatch.setattr(grid, "_run", counted)
    return done


def test_own_model_data_and_optimizer_compared_once_and_for_all(own, runs, tmp_path):
    contenders = [
        parse_contender(text)
        for text in ("torch.optim:NAdam lr=0.01,0.1", "ddpnopt lr=0.1,0.2", "emsa lr=0.5,1")
    ]
    watcher, cache = Counter(), Cache(tmp_path / "cache")
    settings = {"seeds": 2, "cache": cache, "processes": 1}
    result = compare(contenders, own, watcher=watcher, **settings)
    assert len(runs) == 3 * (2 + 1) * 2
    assert watcher.done == watcher.total == len(runs) + ROUNDS
    assert (result.training_samples, result.validation_samples, result.test_samples) == (80, 8, 40)
    for each in result.entries:
        assert [run.seed for run in each.final] == [1000, 1001]
        assert [[run.seed for run in rate] for rate in each.sweep] == [[0, 1], [0, 1]]
        assert each.time is not None and each.time.milliseconds > 0
    assert result.entries[0].time.ratio == 1.0

    runs.clear()
    again = compare(contenders, own, **settings)
    assert runs == []
    assert [e.final for e in again.entries] == [e.final for e in result.entries]

    more = [*contenders, parse_contender("sgd lr=0.1,0.2")]
    compare(more, own, **settings)
    assert len(runs) == (2 + 1) * 2

    names = save(result, tmp_path / "out")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert set(names) == {
        "compare.html",
        "compare.json",
        "compare.md",
        "curves.png",
        "sensitivity.png",
    }
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/png") == 2 and "torch.optim:NAdam" in page
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert kept["verdict"] == verdict(result)
    assert len(kept["contenders"][2]["final"][0]["losses"]) == 12
    assert "validation_accuracy" in kept["contenders"][0]["sweep"][0]["runs"][0]


def test_divergence_everywhere_is_a_result(own, tmp_path):
    # The one comes to no number, the other to numbers as wild.
    wild = [Contender("wild", "sgd", (3e38,)), Contender("saturated", "sgd", (1e6,))]
    result = compare([*wild, Contender("tame", "sgd", (0.1,))], own, seeds=1, processes=1)
    *lost, tame = result.entries
    for each in lost:
        assert (each.best, each.final, each.time, each.workable) == (None, (), None, None)
        assert each.swept_failures == 1
    assert tame.time.ratio == 1.0
    assert "wild" in _page(result, tmp_path / "out")


def test_a_rate_is_chosen_on_validation_samples_and_judged_on_others(own, monkeypatch):
    seen = []
    real = grid._run

    def watched(job):
        seen.append((job.config.validation, job.config.curve))
        return real(job)

    monkeypatch.setattr(grid, "_run", watched)
    compare([Contender("sgd", "sgd", (0.1, 0.2))], own, seeds=1, processes=1)
    assert seen == [(0.1, False)] * 2 + [(0.0, True)]


@pytest.mark.parametrize(
    ("contenders", "change", "says"),
    [
        ([], {}, "1 to 8"),
        (["sgd lr=1"] * 2, {}, "given twice"),
        (["sgd lr=1", "adam lr=1,2"], {}, "as many learning rates"),
        (["sgd lr=1 momentun=1"], {}, "momentum"),
        (["ddpnopt lr=1 bellman=nobody"], {}, "bellman"),
        (["sgd lr=1"], {"seeds": 0}, "seeds"),
        (["sgd lr=1"], {"margin": -1}, "margin"),
        (
            ["sgd lr=1"],
            {"network": "compared_own:narrow"},
            "sgd: the first step failed with Runtime",
        ),
        (["sgd lr=1"], {"network": "compared_own:nothing"}, "nothing"),
        (
            ["sgd lr=1"],
            {"network": "compared_own:unfinished"},
            r"sgd: network compared_own:unfinished raised KeyError: 'boom' \(compared_own\.py",
        ),
        (["compared_own:model lr=1"], {}, "no torch.optim.Optimizer"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(own, runs, contenders, change, says):
    network = {"network": change.pop("network")} if "network" in change else {}
    with pytest.raises(InputError, match=says):
        compare(
            [parse_contender(text) for text in contenders],
            replace(own, **network),
            **{"seeds": 1, "processes": 1, **change},
        )
    assert runs == []


def test_pictures_stand_a_run_that_failed_midway(tmp_path):
    broken = Outcome(1, None, 0.1, 8, 8, 0.0, ((2, 1.0), (4, 3.0)), ((4, 0.1),))
    whole = entry("a", (0.9, 0.9))
    mixed = replace(whole, final=(whole.final[0], broken))
    never = replace(entry("b", (0.9, 0.9)), final=(replace(broken, losses=(), accuracies=()),) * 2)
    save(comparison(mixed, never), tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert not math.isnan(mixed.final[0].train_loss)
