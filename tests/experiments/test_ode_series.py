"""The races of the time series, and the network with an untrained Neural ODE beside them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ocnopt import cli
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.outcome import Outcome
from ocnopt.experiments.race import Contender
from ocnopt.experiments.reproduce import ode_series, untrained
from ocnopt.experiments.reproduce.ode_series import CHARACTERS, QUICK, WORDS
from ocnopt.experiments.reproduce.report import Report, Settings
from ocnopt.experiments.reproduce.untrained import UNTRAINED, beside_untrained
from ocnopt.experiments.setup import build_network, load_data
from ocnopt.experiments.training import train
from ocnopt.experiments.watcher import Watcher

RACES = (WORDS, CHARACTERS)


@pytest.fixture
def root(tmp_path):
    """A folder with stand-ins for both data sets: two classes of waves, of unequal lengths."""
    generator = np.random.default_rng(0)
    for stem in ("ArticularyWordRecognition", "CharacterTrajectoriesHalf"):
        folder = tmp_path / "data" / "uea" / stem
        folder.mkdir(parents=True)
        for part in ("TRAIN", "TEST"):
            lines = []
            for label in range(30):
                time = np.arange(generator.integers(20, 40))
                wave = np.sin((0.05 + 0.1 * (label % 2)) * time + generator.random())
                series = [wave, np.cos(wave) + 0.1 * time]
                text = ":".join(",".join(f"{v:.4f}" for v in channel) for channel in series)
                lines.append(f"{text}:{label % 2}")
            head = f"@problemName {stem}\n@timeStamps false\n@classLabel true 0 1\n@data\n"
            (folder / f"{stem}_{part}.ts").write_text(head + "\n".join(lines) + "\n")
    return tmp_path / "data"


def small(race):
    """A race of a second; batches that the stand-ins have."""
    base = replace(race.base, batch_size=16, epochs=3, steps=None, stride=8, method="midpoint")
    lrs = race.contenders[0].lrs[2:3]
    contenders = tuple(replace(c, lrs=lrs, also={"rest_lr": (0.01, 0.05)}) for c in race.contenders)
    return replace(race, base=base, contenders=contenders, seeds=2, tuning_epochs=1)


@pytest.mark.parametrize("race", RACES, ids=lambda race: race.base.dataset)
def test_the_races_are_fair_and_the_papers(race):
    """The rates of 4.11 are tried, for what lies inside and outside of the Neural ODE."""
    assert [c.label for c in race.contenders] == ["Adam", "SGD", "SNOpt"]
    assert {c.candidates for c in race.contenders} == {12}
    assert race.seeds >= 3 and race.base.method == "rk4"
    for contender, rate in zip(race.contenders, (0.001, 0.003, 0.003), strict=True):
        assert rate in contender.lrs
        assert 0.003 in contender.also["rest_lr"]
    snopt = race.contenders[2].options
    assert (snopt["update_every"], snopt["sample_step"]) == (100, 1.0)
    assert snopt["damping"] == (0.1 if race is WORDS else 0.05)
    assert QUICK[race.title].final.dataset == race.base.dataset


def test_a_whole_experiment(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ode_series.QUICK, WORDS.title, small(WORDS))
    words = ["reproduce", "ode-series", "--quick", "--data-root", str(root), "--processes", "1"]
    words += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert cli.main(words) == 0
    assert "With the Neural ODE left untrained" in " ".join(capsys.readouterr().out.split())
    kept = json.loads((tmp_path / "out" / "ode-series.json").read_text())
    rows = {}
    for row in kept["rows"]:
        rows.setdefault(row["kind"], []).append(row)
    assert {kind: len(found) for kind, found in rows.items()} == {
        "tuning": 6,
        "final": 6,
        "summary": 3,
        "untrained": 2,
    }
    (adam,) = [r for r in rows["tuning"] if r["contender"] == "Adam" and r["chosen"]]
    assert {r["rest_lr"] for r in rows["untrained"]} == {adam["rest_lr"]}
    assert rows["untrained"][0]["curve"]["step"] == rows["final"][0]["curve"]["step"]
    page = (tmp_path / "out" / "ode-series.md").read_text()
    assert f"**Here:** {kept['seen']}" in page
    assert page.count("| untrained |") == 1 and "(83.7)" in page


def test_without_its_data_an_experiment_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="character-trajectories-half"):
        ode_series.characters(
            Settings("ode-characters", tmp_path, True, data_root=tmp_path), Watcher()
        )


def test_an_untrained_neural_ode_keeps_its_weights(root):
    final = replace(small(CHARACTERS).final, data_root=root)
    config = replace(final, optimizer="sgd", lr=UNTRAINED, options={"rest_lr": 0.05}).resolved()
    torch.manual_seed(config.seed)
    initial = dict(build_network(config, load_data(config)).named_parameters())
    trained = dict(train(config).model.named_parameters())
    for name, value in trained.items():
        assert torch.equal(value, initial[name]) is name.startswith("ode.")


# What is written of it, from made-up numbers


def outcome(seed, *accuracies):
    """A run that is evaluated every 2 steps, each of which takes a second."""
    steps = range(0, 2 * len(accuracies), 2)
    return Outcome(
        seed=seed,
        train_loss=0.1,
        test_accuracy=accuracies[-1],
        diverged_step=None,
        steps=steps[-1],
        seconds_per_step=1.0,
        accuracies=tuple(zip(steps, accuracies, strict=True)),
        clock=tuple((step, float(step), 2.0 * step) for step in steps),
    )


def report():
    """A race of Adam alone, with two runs: 4 steps an epoch, 0.8 in the end."""
    final = [
        {"kind": "final", "contender": "Adam", "test_accuracy": 0.8, "diverged_step": None}
    ] * 2
    return Report(
        columns=(),
        table=(),
        sentence="Seen.",
        page="# A race\n\n**Here:** Seen.\n",
        rows=[
            {"kind": "tuning", "contender": "Adam", "rest_lr": 0.01, "chosen": False},
            {"kind": "tuning", "contender": "Adam", "rest_lr": 0.03, "chosen": True},
            *final,
            {
                "kind": "summary",
                "contender": "Adam",
                "seconds_to": {"0.98": [3.0, float("inf")]},
                "epochs_to": {"0.98": [0.5, float("inf")]},
            },
        ],
        facts={
            "targets": {"0.98": 0.784},
            "settings": {"steps_per_epoch": 4},
            "clock": "CPU seconds",
        },
    )


@pytest.fixture
def race():
    adam = Contender("Adam", "adam", (0.1,), also={"rest_lr": (0.01, 0.03)})
    return replace(WORDS, contenders=(adam,), seeds=2, paper=None)


@pytest.mark.parametrize(
    ("runs", "line", "says"),
    [
        (
            [(0.1, 0.5, 0.79, 0.9), (0.1, 0.8, 0.7, 0.9)],
            "| untrained | 90.0 ± 0.0 | 3 | 0.75 |",
            "final test accuracy is 90.0 ± 0.0 %, above Adam beyond the spread.",
        ),
        (
            [(0.1, 0.2, 0.3, 0.5), (0.1, 0.7, 0.6, 0.8)],
            "| untrained | 65.0 ± 21.2 | never on 1 of 2 | never on 1 of 2 |",
            "is 65.0 ± 21.2 %, no different from Adam beyond the spread.",
        ),
        (
            [(0.1, 0.2, 0.3, 0.5), (0.1, 0.7, 0.6, 0.6)],
            "| untrained | 55.0 ± 7.1 | never on 2 of 2 | never on 2 of 2 |",
            "is 55.0 ± 7.1 %, below Adam beyond the spread.",
        ),
    ],
)
def test_what_is_said_of_it(race, tmp_path, monkeypatch, runs, line, says):
    asked = []

    def run_grid(configs, **_):
        asked.extend(configs)
        return [outcome(seed, *accuracies) for seed, accuracies in enumerate(runs)]

    monkeypatch.setattr(untrained, "run_grid", run_grid)
    found = beside_untrained(report(), race, Settings("x", tmp_path), Watcher())
    assert [(c.optimizer, c.lr, c.options, c.seed) for c in asked] == [
        ("sgd", UNTRAINED, {"rest_lr": 0.03}, seed) for seed in (0, 1)
    ]
    assert found.sentence.startswith("Seen. With") and found.sentence.endswith(says)
    assert f"**Here:** {found.sentence}\n" in found.page
    assert line in found.page
    assert "| Adam | 80.0 ± 0.0 | never on 1 of 2 | never on 1 of 2 |" in found.page
    last = found.rows[-1]
    assert (last["kind"], last["seed"], last["test_accuracy"]) == ("untrained", 1, runs[1][-1])
    assert last["curve"]["seconds"] == [0, 2, 4, 6]


def test_without_a_baseline_there_is_nothing_beside_it(race, tmp_path, monkeypatch):
    monkeypatch.setattr(untrained, "run_grid", None)
    plain = report()
    none = replace(plain, facts={**plain.facts, "targets": {}})
    assert beside_untrained(none, race, Settings("x", tmp_path), Watcher()) is none
    none = replace(plain, rows=plain.rows[:1])
    assert beside_untrained(none, race, Settings("x", tmp_path), Watcher()) is none
