"""The paper's tables: the same tuning for all, words that follow from numbers."""

import itertools
import json
import math
from dataclasses import replace
from statistics import fmean

import pytest

from ocnopt.experiments import tuning
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.reproduce import EXPERIMENTS, ablation, feedback_grid, runner, table3
from ocnopt.experiments.reproduce.everything import index_page, reproduce_all
from ocnopt.experiments.reproduce.report import Report, Settings
from ocnopt.experiments.significance import difference
from ocnopt.experiments.tuning import TUNING_SEED, Tuned, tune_and_measure
from ocnopt.experiments.watcher import Watcher


def outcome(accuracy, loss=0.5, seed=0):
    failed = loss is None
    return Outcome(seed, loss, accuracy, 3 if failed else None, 10, 1e-3)


def test_difference_needs_twice_the_standard_error():
    assert difference([2.0, 2.1, 1.9], [1.0, 1.0, 1.1]) == 1
    assert difference([1.0, 1.0, 1.1], [2.0, 2.1, 1.9]) == -1
    assert difference([1.0, 3.0, 2.0], [2.0, 1.0, 2.5]) == 0
    assert difference([9.0], [1.0]) == 0  # one seed has no spread
    # The same means, but paired: every seed gains a little.
    assert difference([10.1, 20.1, 30.1], [10.0, 20.0, 30.0]) == 1


@pytest.fixture
def fake_grid(monkeypatch):
    """A grid whose accuracies are invented from the configuration; notes what it is asked."""
    asked = []

    def run_grid(configs, **_):
        asked.append(list(configs))
        return [
            outcome(min(1.0, 0.5 + c.lr + 0.001 * (c.seed % 2)), loss=1 - c.options["momentum"])
            for c in configs
        ]

    monkeypatch.setattr(tuning, "run_grid", run_grid)
    return asked


def sgd(lr, momentum=0.0):
    return TrainConfig(optimizer="sgd", lr=lr, options={"momentum": momentum}, steps=2)


def test_the_choice_is_made_on_held_out_data_and_measured_with_fresh_seeds(fake_grid):
    tried = {"a": [sgd(0.1), sgd(0.3)], "b": [sgd(0.6, 0.1), sgd(0.7, 0.9)]}
    a, b = tune_and_measure(tried, tuning_seeds=2, seeds=3)
    held, measured = fake_grid
    assert [c.validation for c in held] == [0.1] * 8
    assert {c.seed for c in held} == {TUNING_SEED, TUNING_SEED + 1}
    assert [c.validation for c in measured] == [0.0] * 6
    assert [c.seed for c in measured] == [0, 1, 2, 0, 1, 2]
    assert a.chosen.lr == 0.3
    assert b.chosen.lr == 0.7  # both reach the most there is; its loss is lower
    assert len(a.outcomes) == 3
    assert [len(outcomes) for _, outcomes in a.trials] == [2, 2]


def test_methods_with_more_candidates_are_refused(fake_grid):
    with pytest.raises(ValueError, match="same number"):
        tune_and_measure({"a": [sgd(0.1)], "b": [sgd(0.1), sgd(0.2)]}, tuning_seeds=1, seeds=1)


def test_the_edge_of_the_sweep_is_noted(fake_grid):
    lrs = [sgd(lr) for lr in (0.1, 0.2, 0.3)]
    (found,) = tune_and_measure({"a": lrs}, tuning_seeds=1, seeds=1)
    assert found.on_edge
    assert not replace(found, chosen=lrs[1]).on_edge


def test_every_method_has_the_same_number_of_candidates_within_the_papers_ranges():
    ranges = {
        "SGD-m": (7e-2, 5e-1),
        "RMSprop": (7e-4, 1e-2),
        "Adam": (7e-4, 1e-2),
        "EKFAC": (1e-2, 3e-1),
    }
    for row in table3.ROWS:
        base = dict(table3.RECIPES[row.recipe])
        for method in row.paper:
            tried = table3.candidates(method, row, base)
            assert len(tried) == row.candidates
            assert len({json.dumps(c.to_json(), default=str) for c in tried}) == row.candidates
            if method in ranges:
                low, high = ranges[method]
                assert all(low <= c.lr <= high for c in tried)


def test_the_papers_figures_are_complete():
    assert len(table3.ROWS) == 7
    for row in table3.ROWS:
        assert set(table3.METHODS) - set(row.paper) <= {"vanilla DDP"}
    for pair in ablation.PAIRS[:3]:
        for printed in (pair.loss, pair.accuracy):
            assert [len(line) for line in printed] == [5] * 4
    # The example that the paper spells out: 0.1974 - 0.1662.
    assert ablation.PAIRS[0].loss[0][:2] == (0.1974, 0.1662)


def tuned(method, accuracies):
    config = sgd(0.1)
    outcomes = tuple(outcome(a / 100, seed=i) for i, a in enumerate(accuracies))
    return Tuned(method, ((config, outcomes[:1]),), config, outcomes)


def results(own, adam, emsa, ddp):
    both = {"Adam": adam, "E-MSA": emsa, "vanilla DDP": ddp, "DDPNOpt": own}
    return [tuned(method, values) for method, values in both.items()]


ROW = table3.Row(
    "X", "wine-fcn", {"Adam": 90.0, "E-MSA": 80.0, "vanilla DDP": 85.0, "DDPNOpt": 91.0}, 1, 1, 3
)


def test_words_follow_from_numbers():
    better = table3.verdict(
        ROW, results([95, 95.1, 95], [90, 90, 90.1], [80, 81, 80], [70, 70, 71])
    )
    assert "+5.00 points, above the best other, Adam" in better
    assert "(paper: +1.00 against Adam)" in better
    assert "It beats E-MSA and vanilla DDP" in better
    worse = table3.verdict(ROW, results([85, 85.1, 85], [90, 90, 90.1], [80, 81, 80], [92, 92, 93]))
    assert "below the best other, vanilla DDP" in worse
    assert "It does not beat vanilla DDP beyond the spread" in worse
    same = table3.verdict(ROW, results([89, 91, 90], [90, 90, 90.1], [80, 81, 80], [70, 70, 71]))
    assert "within the spread of the best other, Adam" in same


def test_table3_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(table3, "ROWS", (table3.ROWS[0], table3.ROWS[5]))
    monkeypatch.setattr(table3, "_QUICK_STEPS", 3)
    monkeypatch.setattr(table3, "_QUICK", ("wine-fcn", "svhn-cnn"))
    settings = Settings(
        "table3", tmp_path, quick=True, data_root=tmp_path, cache=tmp_path / "cache", processes=1
    )
    report = runner.reproduce(settings)
    page = (tmp_path / "table3.md").read_text()
    assert "Left out, as the data are not there: SVHN (CNN)." in page
    assert [row[0] for row in report.table] == ["WINE (FCN)"]
    kept = json.loads((tmp_path / "table3.json").read_text())
    assert [row["method"] for row in kept["rows"]] == [*table3.METHODS, *table3.MORE]
    assert "## With every preconditioner" in page
    assert kept["recipes"]["wine-fcn"]["head"] == "sigmoid"
    for row, cell in zip(kept["rows"], report.table[0][1:], strict=False):
        assert f"{100 * fmean(row['accuracy']):.2f} ±" in cell
        assert f"({row['paper']:.2f}" in cell
    assert (tmp_path / "table3.png").stat().st_size > 1000


def test_table3_without_any_data_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(table3, "ROWS", table3.ROWS[4:])
    with pytest.raises(InputError, match="ocnopt data list"):
        runner.reproduce(Settings("table3", tmp_path, data_root=tmp_path))


@pytest.fixture
def invented_grid(monkeypatch):
    """Feedback halves the loss and adds three points, but for the last learning rate of SGD."""

    def run_grid(configs, **_):
        found = []
        for c in configs:
            feedback = c.optimizer == "ddpnopt"
            loss, accuracy = 1.0 + 0.01 * c.seed, 0.80
            if feedback and c.lr == 0.8 and c.options["preconditioner"] == "identity":
                loss, accuracy = None, 0.1
            elif feedback:
                loss, accuracy = loss / 2, 0.83
            curve = {}
            if c.curve:
                curve = {"losses": ((5, 2.0), (10, 1.0)), "accuracies": ((5, 0.1), (10, 0.2))}
            found.append(replace(outcome(accuracy, loss, c.seed), **curve))
        return found

    monkeypatch.setattr(ablation, "run_grid", run_grid)


def cells(pair):
    wanted = [(pair, lr, (None, *pair.regs)) for lr in pair.lrs]
    return ablation.run_cells(Settings("x", None, seeds=3), wanted, Watcher())


def test_differences_are_ddpnopt_minus_the_baseline(invented_grid):
    pair = ablation.PAIRS[0]
    panel = feedback_grid._differences(pair, cells(pair))
    for line, accuracies in itertools.islice(zip(panel.loss, panel.accuracy, strict=True), 3):
        assert line == pytest.approx([-0.505] * 4)
        assert accuracies == pytest.approx([3.0] * 4)
    assert panel.loss[3] == pytest.approx([5.0 - 1.01] * 4)  # divergence counts as the cap
    assert panel.notes[3] == ["diverged 0, 3"] * 4
    assert panel.notes[0] == [""] * 4


def test_counts_and_ratios_follow_from_numbers(invented_grid):
    sgd_pair, rmsprop = ablation.PAIRS[:2]
    (line, _) = feedback_grid._counts([sgd_pair], cells(sgd_pair))
    assert "lower with feedback in 12 of 16 cells, higher in 4, no different beyond" in line
    assert "(paper's means: lower in 16, higher in 0)" in line
    seen = feedback_grid._seen([rmsprop], cells(rmsprop))
    assert "RMSprop's 0.50 (rank one 0.50) at 0.01 and 0.50 (rank one 0.50) at 0.045" in seen


def test_configurations_share_all_but_the_feedback(monkeypatch):
    asked = []

    def run_grid(configs, **_):
        asked.extend(configs)
        return [outcome(0.5) for _ in configs]

    monkeypatch.setattr(ablation, "run_grid", run_grid)
    cells(ablation.PAIRS[2])
    own = {"optimizer", "options", "lr", "seed"}
    shared = [{k: v for k, v in c.to_json().items() if k not in own} for c in asked]
    assert all(s == shared[0] for s in shared)
    options = [c.options for c in asked if c.optimizer == "ddpnopt" and c.lr == 0.1 and not c.seed]
    assert options == [
        {"preconditioner": "ekfac"},
        *(
            {"preconditioner": "ekfac", "terminal": "full", "value_reg": reg}
            for reg in ablation.PAIRS[2].regs
        ),
    ]


@pytest.mark.parametrize("name", ["figure4", "figure9", "table9", "table10", "tables6-8"])
def test_pages_of_the_grid(name, invented_grid, tmp_path):
    report = runner.reproduce(Settings(name, tmp_path, quick=True, seeds=2))
    page = (tmp_path / f"{name}.md").read_text()
    assert f"`ocnopt reproduce {name} --quick --seeds 2`" in page
    assert report.sentence in page
    assert all(len(row) == len(report.columns) for row in report.table)
    assert (tmp_path / f"{name}.png").exists()
    if name == "table9":
        assert "1.0050 (0.1974)" in page
        assert "0.5025 (0.1662)" in page
    if name == "table10":
        assert "80.00 (91.46)" in page


def report_of(sentence):
    return Report([], [], sentence, "", [])


def test_all_goes_on_after_what_cannot_be_run(tmp_path):
    done, told = [], []

    def run(settings):
        if settings.name == "figure5":
            raise InputError("no MNIST")
        done.append(settings.name)
        return report_of(f"seen {settings.name}")

    with pytest.raises(InputError, match="figure5 could not be run"):
        reproduce_all(Settings("all", tmp_path), run, lambda *what: told.append(what))
    assert done == [name for name in EXPERIMENTS if name != "figure5"]
    assert told == [("figure5", "no MNIST")]
    index = (tmp_path / "index.md").read_text()
    assert "[table3](table3.md)" in index
    assert "Seen table3" in index
    assert "Not run: no MNIST" in index
    assert 'href="table3.html"' in (tmp_path / "index.html").read_text()


def test_index_names_what_there_is():
    assert "Not run" not in index_page({"figure4": "a"}, {})


def test_logspace_is_readable():
    values = table3._logspace(7e-4, 1e-2, 6)
    assert values[0] == 7e-4
    assert values[-1] == 1e-2
    ratios = [math.log(b / a) for a, b in itertools.pairwise(values)]
    assert max(ratios) / min(ratios) < 1.1
