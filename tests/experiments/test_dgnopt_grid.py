"""The pages on residual and branching networks: what is run, and words that follow from numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ocnopt.experiments import optimizers
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.reproduce import dgnopt_cells, dgnopt_damping, dgnopt_grid, runner
from ocnopt.experiments.reproduce.dgnopt_cells import FAMILIES, Method, run_rows
from ocnopt.experiments.reproduce.report import Settings
from ocnopt.experiments.setup import build_network, load_data
from ocnopt.experiments.watcher import Watcher

EKFAC = FAMILIES[-1]


def outcome(loss, accuracy, seed=0):
    return Outcome(seed, loss, accuracy, 3 if loss is None else None, 10, 1e-3)


@pytest.fixture
def asked(monkeypatch):
    """Losses by what is run; notes what it is asked.

    DDPNOpt halves the open loop's loss and feedback quarters it, group rationality adds nothing to
    that; at the largest rate of EKFAC DDPNOpt diverges. The early alignment is worse than the late.
    """
    found = []

    def run_grid(configs, **_):
        found.extend(configs)
        return [invented(c) for c in configs]

    def invented(c):
        loss, accuracy = 1.0 + 0.01 * c.seed, 0.80
        if c.optimizer == "ddpnopt":
            loss, accuracy = loss / 2, 0.83
            if c.lr == EKFAC.lrs[-1] and c.options["preconditioner"] == "ekfac":
                loss, accuracy = None, 0.1
        if c.optimizer == "dgnopt":
            loss, accuracy = loss / 4, 0.84
            if c.options.get("alignment") == "early":
                loss += 0.1
        return outcome(loss, accuracy, c.seed)

    monkeypatch.setattr(dgnopt_cells, "run_grid", run_grid)
    return found


def rows_of(family, methods, seeds=3, recipe="digits-residual"):
    base = TrainConfig(**RECIPES[recipe])
    (rows,) = run_rows(Settings("x", None, seeds=seeds), base, [(family, methods)], Watcher())
    return rows


def everything(family):
    return rows_of(family, [family.lender, *family.extensions])


def test_methods_share_all_but_what_is_compared(asked):
    everything(EKFAC)
    own = {"optimizer", "options", "lr", "seed"}
    shared = [{k: v for k, v in c.to_json().items() if k not in own} for c in asked]
    assert all(s == shared[0] for s in shared)
    assert [c.seed for c in asked] == [0, 1, 2] * (4 * len(EKFAC.lrs))
    first = [(c.optimizer, c.options) for c in asked if c.lr == EKFAC.lrs[0] and not c.seed]
    m, late = {"preconditioner": "ekfac"}, {"alignment": "late"}
    assert first == [
        ("ekfac", {}),
        ("ddpnopt", m),
        ("dgnopt", {**m, "information": "feedback", **late}),
        ("dgnopt", {**m, "information": "group-rational", **late}),
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("recipe", ["digits-residual", "digits-inception"])
def test_every_method_can_be_built(family, recipe):
    config = TrainConfig(**RECIPES[recipe]).resolved()
    model = build_network(config, load_data(config))
    methods = [family.lender, *family.extensions]
    methods += [family.aligned(a) for a in dgnopt_cells.ALIGNMENTS] if family.couples else []
    for method in methods:
        built = optimizers.build(
            method.optimizer, model, dgnopt_grid.torch.nn.CrossEntropyLoss(), 0.1, method.options
        )
        assert built.param_groups[0]["lr"] == 0.1


def test_only_a_kronecker_preconditioner_couples():
    assert [f.name for f in FAMILIES if f.couples] == ["EKFAC"]
    names = [[m.name for m in f.extensions] for f in FAMILIES]
    assert names == [["DDPNOpt", "feedback"]] * 3 + [["DDPNOpt", "feedback", "group rational"]]


def test_cells_hold_the_runs_of_their_method(asked):
    rows = everything(EKFAC)
    assert [row[0].method.name for row in rows] == ["EKFAC", *(m.name for m in EKFAC.extensions)]
    assert [cell.lr for cell in rows[1]] == list(EKFAC.lrs)
    assert rows[0][0].losses == [1.0, 1.01, 1.02]
    assert rows[2][0].losses == pytest.approx([0.25, 0.2525, 0.255])
    assert (rows[1][-1].loss, rows[1][-1].failed) == (5.0, 3)  # divergence counts as the cap
    assert rows[1][-1].text() == "5.0000 ± 0.000 / 10.00 (3 diverged)"
    assert rows[1][0].text() == "0.5050 ± 0.005 / 83.00"


def test_differences_are_minus_the_open_loop(asked):
    panel = dgnopt_grid._differences(everything(EKFAC))
    assert panel.columns == ["DDPNOpt", "feedback", "group rational"]
    assert panel.title == "minus EKFAC"
    for line, accuracies in zip(panel.loss[:-1], panel.accuracy[:-1], strict=True):
        assert line == pytest.approx([-0.505, -0.7575, -0.7575])
        assert accuracies == pytest.approx([3.0, 4.0, 4.0])
    assert panel.loss[-1] == pytest.approx([5 - 1.01, -0.7575, -0.7575])
    assert panel.notes[-1] == ["diverged 0, 3", "", ""]
    assert panel.notes[0] == ["", "", ""]


def test_counts_follow_from_numbers(asked):
    lines = dgnopt_grid._counts(everything(EKFAC))
    assert len(lines) == 5
    assert "DDPNOpt against the open loop: the training loss is lower at 4 of 5" in lines[0]
    assert "higher at 1, no different beyond the spread at 0" in lines[0]
    assert "feedback against DDPNOpt: the training loss is lower at 5 of 5" in lines[2]
    assert "group rational against feedback: the training loss is lower at 0 of 5" in lines[4]
    assert "no different beyond the spread at 5" in lines[4]


def test_the_sentence_counts_over_all_families(asked):
    grid = {f.name: everything(f) for f in (FAMILIES[0], EKFAC)}
    choices = {"EKFAC": rows_of(EKFAC, [EKFAC.aligned(a) for a in ("late", "early", "EXP3++")])}
    sentence = dgnopt_grid._seen(grid, choices)
    for words in (
        "with feedback below that with the open loop in 10 of 10 cells and above it in 0",
        "with feedback below that with DDPNOpt in 10 of 10 cells and above it in 0",
        "with group rational below that with feedback in 0 of 5 cells and above it in 0",
        "with early alignment below that with late alignment in 0 of 5 cells and above it in 5",
        "with EXP3++ alignment below that with late alignment in 0 of 5 cells and above it in 0",
    ):
        assert words in sentence


def test_the_best_rate_is_that_of_the_lowest_loss():
    (row,) = [
        [
            dgnopt_cells.Cell("SGD", Method("DDPNOpt", "ddpnopt"), lr, outcomes)
            for lr, outcomes in (
                (0.1, (outcome(0.5, 0.90), outcome(0.7, 0.92))),
                (0.2, (outcome(0.2, 0.89), outcome(0.3, 0.91, 1))),
                (0.4, (outcome(0.1, 0.9), outcome(None, 0.9, 1))),
            )
        ]
    ]
    assert dgnopt_grid._best_line(row) == [
        "",
        "DDPNOpt",
        "0.2",
        "0.2500 ± 0.071",
        "90.00 ± 1.41",
        "0.1 to 0.2",
    ]
    assert dgnopt_grid._best_line([row[2]])[-1] == "nowhere"


@pytest.mark.parametrize("name", ["residual", "inception"])
def test_pages(name, asked, tmp_path):
    report = runner.reproduce(Settings(name, tmp_path, quick=True, seeds=2))
    page = (tmp_path / f"{name}.md").read_text()
    assert f"`ocnopt reproduce {name} --quick --seeds 2`" in page
    assert report.sentence in page
    assert "No figure of the paper" in page and "ours alone" in page
    assert all(len(row) == len(report.columns) for row in report.table)
    assert {c.network for c in asked} == {"residual-fcn" if name == "residual" else "inception"}
    assert {c.steps for c in asked} == {dgnopt_grid.QUICK[name].steps}
    for part in ("", "b", "c"):
        assert (tmp_path / f"{name}{part}.png").exists()
        assert f"({name}{part}.png)" in page
    # E-MSA is tried, and what it says is what the page says.
    assert "the network is no chain" in page
    raw = json.loads((tmp_path / f"{name}.json").read_text())
    damped = 1 * 4 * (1 if name == "inception" else 4)
    assert len(raw["rows"]) == 2 * (3 * 3 + 4 + 5) + damped
    assert page.count("training loss with group rationality") == damped // 4
    assert raw["settings"]["network"] == next(iter({c.network for c in asked}))


@pytest.mark.parametrize("kind", ["residual", "inception"])
def test_pages_on_images(kind, asked, tmp_path, mnist_root, write_idx):
    """The grid alone, at the network's own recipe."""
    for part, size in (("train", 60), ("t10k", 20)):  # large enough for inception blocks
        images = np.arange(size * 144).reshape(size, 12, 12) % 251
        write_idx(mnist_root / "mnist" / f"{part}-images-idx3-ubyte.gz", images)
    name = f"{kind}-mnist"
    report = runner.reproduce(Settings(name, tmp_path, data_root=mnist_root))
    page = (tmp_path / f"{name}.md").read_text()
    assert f"`ocnopt reproduce {name}`. MNIST, {kind} blocks" in page
    assert "300 steps, seeds 0 to 2" in page and report.sentence in page
    assert {(c.dataset, c.steps) for c in asked} == {("mnist", 300)}
    assert len(asked) == 3 * sum(len(f.lrs) * (1 + len(f.extensions)) for f in FAMILIES)
    assert "## Alignment" not in page and "## Damping" not in page and "alignment" not in page[:60]
    assert "the network is no chain" in page
    assert str(tmp_path) not in (tmp_path / f"{name}.json").read_text()


@pytest.mark.parametrize("kind", ["residual", "inception"])
def test_small_versions_on_images_need_no_files(kind, asked, tmp_path):
    runner.reproduce(Settings(f"{kind}-cifar-10", tmp_path, quick=True))
    assert {c.dataset for c in asked} == {"digits"}


def test_what_damping_changes_is_counted(asked):
    family, methods = dgnopt_damping.dampings(quick=False, costly=False)["kfac", 0.01]
    assert [m.options["preconditioner"] for m in methods] == [{"name": "kfac", "damping": 0.01}] * 4
    found = dgnopt_damping.Damped("kfac", 0.01, rows_of(family, methods))
    (line,) = [line for line in dgnopt_damping.lines([found]) if line.startswith("- ")]
    # As invented: late play is feedback's equal, early play is worse everywhere.
    assert "**KFAC, damping 0.01**" in line
    assert "Late: lower at 0 of 3 learning rates, higher at 0" in line
    assert "early: lower at 0 of 3 learning rates, higher at 3" in line


def test_where_emsa_runs_the_page_says_so():
    chain = replace(TrainConfig(**RECIPES["digits-fcn"]), widths=(4,))
    assert dgnopt_grid._emsa(chain) == "E-MSA runs on this network, but is not part of the grid."
