"""Figures 6 and 10 to 12: runs are kept, taken up again, and read off rightly."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from ocnopt.experiments.reproduce import vanishing
from ocnopt.experiments.reproduce.report import Settings, Watcher
from ocnopt.experiments.reproduce.vanishing import FIGURES, Method, Panel, Task, run, run_task


@pytest.mark.parametrize(
    "name",
    [
        *("SGD", "SGD-VGR", "Adam", "RMSprop", "EKFAC", "DDPNOpt", "DDPNOpt*", "DDPNOpt2nd"),
        *vanishing.PARTS,
    ],
)
@pytest.mark.parametrize("loss", ["MMC", "CE"])
def test_every_method_runs(name, loss):
    row = run_task(Task(Method(name, 0.003), loss, "sigmoid", 0, 45))
    assert [len(row["losses"]), len(row["norms"]), row["failed"]] == [3, 9, ""]
    assert all(norm > 0 for norm in row["norms"])
    plateau = Panel("", loss, "sigmoid", ()).plateau
    assert 0.9 * plateau < row["losses"][0] < 1.3 * plateau


def test_every_figure_knows_its_methods():
    names = {m.name for f in FIGURES.values() for p in f.panels for m in p.methods}
    assert names == {
        *("SGD", "SGD-VGR", "Adam", "RMSprop", "EKFAC", "DDPNOpt", "DDPNOpt*", "DDPNOpt2nd"),
        *vanishing.PARTS,
    }


def test_when_a_run_is_below():
    losses = [10.0, 8.0, 9.5, 8.0, 7.0]
    assert vanishing._first(losses, 9.0) == vanishing.EVERY
    assert vanishing._for_good(losses, 9.0) == 3 * vanishing.EVERY
    assert vanishing._for_good(losses[:3], 9.0) is None
    assert vanishing._first(losses[:1], 9.0) is None


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    panel = Panel("small", "MMC", "relu", (Method("SGD", 0.1), Method("EKFAC", 0.03)))
    monkeypatch.setitem(FIGURES, "figure6", vanishing.Figure("Title", "claim", (panel,)))
    monkeypatch.setattr(vanishing, "QUICK_STEPS", 40)
    started = []
    pool = vanishing.ProcessPoolExecutor
    monkeypatch.setattr(
        vanishing,
        "ProcessPoolExecutor",
        lambda count, **options: started.append(count) or pool(count, **options),
    )
    settings = Settings("figure6", tmp_path, quick=True, seeds=1, processes=1)
    report = run(settings, Watcher())
    assert (tmp_path / "figure6.png").stat().st_size > 10_000
    assert [line[1] for line in report.table] == ["SGD, lr 0.1", "EKFAC, lr 0.03"]
    assert "claim" in report.page and "0 of 1" in report.page
    kept = tmp_path / "vanishing.jsonl"
    lines = kept.read_text().splitlines()
    assert len(lines) == 2
    changed = json.loads(lines[1]) | {"losses": [1.0, 1.0]}
    kept.write_text(lines[0] + "\n" + json.dumps(changed) + "\n" + '{"key": "half a li')
    again = run(settings, Watcher())
    assert again.table[0] == report.table[0]
    assert again.table[1][3] == "1 of 1, 0", "what is on file counts"
    assert started == [1]
    kept.write_text(lines[0] + "\n" + '{"key": "half a li')
    run(settings, Watcher())
    lost, last = kept.read_text().splitlines()[1:]
    assert lost == '{"key": "half a li', "a line that was cut short spoils no other"
    assert json.loads(last)["key"] == json.loads(lines[1])["key"]
