"""Figure 3: what is measured, where it stops, and that the words follow from the numbers."""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from ocnopt import cli
from ocnopt.experiments.peak_memory import PeakMemory, TookTooLong
from ocnopt.experiments.reproduce import figure3
from ocnopt.experiments.reproduce.figure3 import Preset, claims, measure, slope

TINY = Preset((4, 8), rounds=3, seconds=30.0, budget=0.05, widths=(4,))


def table(**seconds):
    """Three batch sizes with these seconds per method, and bytes as many as milliseconds."""
    names = {"adam": "Adam", "ekfac": "EKFAC", "ddp": "vanilla DDP", "emsa": "E-MSA"}
    found = {}
    for i, batch in enumerate((8, 32, 128)):
        found[batch] = {
            names.get(name, "DDPNOpt"): {"seconds": line[i], "bytes": 1e3 * line[i]}
            for name, line in seconds.items()
            if i < len(line)
        }
    return found


def verdicts(found, stops=None):
    return [claim["verdict"] for claim in claims(found, stops or {})]


def test_verdicts_follow_from_the_numbers():
    ours = (1.0, 1.0, 1.0)
    good = table(
        adam=(0.9, 1.0, 1.2), ekfac=(0.7,) * 3, emsa=(9.0,) * 3, ddp=(4.0, 16.0, 64.0), own=ours
    )
    assert verdicts(good) == ["holds"] * 5
    bad = table(adam=(0.1,) * 3, ekfac=(0.5,) * 3, emsa=(2.0,) * 3, ddp=(2.0,) * 3, own=ours)
    assert verdicts(bad) == ["does not hold"] * 5
    part = table(adam=(0.1, 0.9, 0.9), ekfac=(1.0,) * 3, emsa=(9.0, 1.0, 1.0), own=ours)
    assert verdicts(part) == [
        "holds at batch 32, 128 only",
        "holds",
        "holds at batch 8 only",
        "not measured",
        "not measured",
    ]
    assert claims(part, {})[0]["seen"] == "1.1 to 10 times its time"


def test_a_stop_counts_as_scaling_poorly_only_behind_a_size_that_worked():
    stops = {"vanilla DDP": {"batch": 32, "why": "a step takes longer than 1 s"}}
    found = table(own=(1.0, 1.0, 1.0), ddp=(5.0,))
    assert verdicts(found, stops)[3] == "holds"
    assert "stopped at batch 32" in claims(found, stops)[3]["seen"]
    assert verdicts(table(own=(1.0, 1.0, 1.0)), stops)[3] == "not measured"
    assert verdicts(found, {**stops, "DDPNOpt": stops["vanilla DDP"]})[3] == "not measured"


def test_slope_is_of_the_largest_three_sizes():
    assert slope([1, 8, 16, 32], [1e6, 64, 256, 1024]) == pytest.approx(2)
    assert slope([8], [1.0]) is None


def test_peak_memory_counts_what_is_made_and_alive():
    weight, x = torch.zeros(100, 100), torch.zeros(50, 100)
    with PeakMemory() as memory:
        weight.t().mul_(2)  # a view and a change in place make nothing
        assert memory.peak == 0
        y = x @ weight
        assert memory.peak == 4 * 5000
        del y
        torch.zeros(10)
        assert memory.peak == 4 * 5000
        kept = torch.zeros(25)
        memory.start_over(60)
        torch.zeros(5)
    assert memory.peak == 4 * 30 and len(kept) == 25


def test_a_step_is_broken_off_after_its_time():
    with pytest.raises(TookTooLong), PeakMemory(0.01):
        while True:
            torch.zeros(1)


def test_memory_beyond_weights_is_exact_for_adam():
    rows, stopped = measure(TINY, 8, ["Adam"])
    assert not stopped
    model = nn.Sequential(nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10))
    weights = sum(p.nbytes for p in model.parameters())
    # Two moments and a gradient stay; what a step makes besides is temporary.
    assert 3 * weights < rows[0]["bytes"] < 6 * weights
    assert rows[0]["steps"] == 3
    assert measure(TINY, 8, ["Adam"])[0][0]["bytes"] == rows[0]["bytes"]


def test_slow_and_large_methods_are_stopped_and_named(monkeypatch, tmp_path, capsys):
    def slow(model):
        def step(x, y):
            if len(x) > 4:
                time.sleep(0.3)
            torch.zeros(1)

        return step

    def large(model):
        def step(x, y):
            raise figure3.GraphError("it would take about 99 GiB")

        return step

    monkeypatch.setitem(figure3.METHODS, "vanilla DDP", slow)
    monkeypatch.setitem(figure3.METHODS, "E-MSA", large)
    monkeypatch.setattr(figure3, "QUICK", replace(TINY, seconds=0.2))
    assert cli.main(["reproduce", "figure3", "--quick", "--output", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "vanilla DDP was stopped at batch 8: a step takes longer than 0.2 s." in out
    page = (tmp_path / "figure3.md").read_text()
    assert "E-MSA was stopped at batch 4: it does not fit: it would take about 99 GiB." in page
    results = json.loads((tmp_path / "figure3.json").read_text())
    assert results["stopped"]["vanilla DDP"]["batch"] == 8
    measured = {(row["method"], row["batch"]) for row in results["rows"]}
    assert measured == {
        *((name, batch) for name in ("Adam", "EKFAC", "DDPNOpt") for batch in (4, 8)),
        ("vanilla DDP", 4),
    }
    assert (tmp_path / "figure3.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_takes_a_step():
    rows, stopped = measure(TINY, 4, list(figure3.METHODS))
    assert stopped == {}
    assert [row["method"] for row in rows] == list(figure3.METHODS)
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows)
