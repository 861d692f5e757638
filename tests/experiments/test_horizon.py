"""Runs that train the integration time, and their page."""

from dataclasses import replace

import pytest
import torch

from ocnopt.experiments.datasets import Data
from ocnopt.experiments.horizon import Horizon, train_horizon
from ocnopt.experiments.reproduce import ode_time
from ocnopt.experiments.reproduce.kept import kept_runs
from ocnopt.experiments.reproduce.report import Settings, Watcher
from ocnopt.experiments.reproduce.runner import reproduce

SHORT = Horizon("feedback", 0.4, 0.3, 0, steps=6, every=2, channels=2, batch_size=16)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 1, 14, 14, generator=generator)
    y = torch.randint(10, (160,), generator=generator)
    return Data(x[:96], y[:96], x[96:], y[96:], 10)


@pytest.mark.parametrize("rule", ["fixed", "first-order", "feedback"])
def test_a_run_tells_its_time_and_what_it_cost(rule, data):
    result = train_horizon(replace(SHORT, rule=rule), data)
    assert [p["step"] for p in result["points"]] == [2, 4, 6]
    assert all(p["evaluations"] > 10 for p in result["points"])
    assert result["diverged"] is None and 0 <= result["test_accuracy"] <= 1
    moved = {p["time"] for p in result["points"]} != {1.0}
    assert moved == (rule != "fixed")


def test_a_fixed_time_is_plain_training(data):
    """The same weights as a loop without any of it."""
    one = train_horizon(replace(SHORT, rule="fixed"), data)
    two = train_horizon(replace(SHORT, rule="feedback", lr=1e-12), data)
    assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-4)


def test_a_run_that_diverges_is_a_result(data):
    result = train_horizon(replace(SHORT, weights_lr=1e6, steps=20), data)
    assert result["diverged"] is not None and result["test_loss"] is None


def test_runs_are_kept(tmp_path, data):
    settings = Settings("ode-time", tmp_path, cache=tmp_path / "cache", processes=1)
    calls = []

    def train(run, data):
        calls.append(run)
        return train_horizon(run, data)

    runs = [SHORT, replace(SHORT, seed=1)]
    first = kept_runs(settings, "a", runs, data, train, Watcher())
    again = kept_runs(settings, "a", runs, data, train, Watcher())
    assert first == again and len(calls) == 2
    kept_runs(settings, "another", runs[:1], data, train, Watcher())
    assert len(calls) == 3


def test_the_page(tmp_path, data, monkeypatch):
    monkeypatch.setattr(ode_time.datasets, "load", lambda name, root: data)
    monkeypatch.setattr(ode_time, "_fixed", lambda like: replace(like, rule="fixed", lr=0.0))
    monkeypatch.setattr(ode_time, "QUICK_TUNING_STEPS", 10)
    monkeypatch.setattr(ode_time, "QUICK_STEPS", 10)
    original = ode_time._tuning
    monkeypatch.setattr(
        ode_time,
        "_tuning",
        lambda quick, c: [replace(h, batch_size=8, channels=2) for h in original(quick, c)],
    )
    settings = Settings("ode-time", tmp_path, quick=True, seeds=2, processes=1)
    report = reproduce(settings)
    page = (tmp_path / "ode-time.md").read_text()
    assert (tmp_path / "ode-time.png").stat().st_size > 10_000
    assert [row[1] for row in report.table] == ["fixed", "first-order", "feedback"]
    assert "at penalty 0.08" in report.sentence and report.sentence in page.replace("With", "with")
    assert len(report.rows) == 2 + 6
