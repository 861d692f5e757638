import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import one_line

from ocnopt import cli

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "sklearn", "matplotlib", "numpy", "scipy")

OWN = """
from collections import OrderedDict

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)).mean(1))


class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


def encoder(shape, classes):
    return Encoder()


def fickle():
    return Fickle()


def plain():
    return nn.PReLU()


def unfinished(shape, classes):
    raise KeyError("boom")


def dollars():
    inner = nn.Sequential(OrderedDict({"a$b_{$": nn.Linear(4, 3), "$_{$": nn.BatchNorm1d(3)}))
    return nn.Sequential(OrderedDict({"in$_{$side": inner}))


def closed():
    raise ValueError("no data today")


def words():
    x = torch.randint(9, (20, 5))
    return x[:15], x[:15, 0] % 3, x[15:], x[15:, 0] % 3


def numbers():
    x = torch.ones(20, 4)
    return x[:15], torch.zeros(15).long(), x[15:], torch.zeros(5).long()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "inspected_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return cli.main(["inspect", *words])


def looked_at(capsys, *words):
    assert run(*words, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from ocnopt.cli import main; code = main(['inspect', '--help']);"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules];"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for option in ("--recipe", "--network", "--alignment", "--output", "--data-root", "--json"):
        assert option in done.stdout


def test_a_table_for_people(capsys):
    assert run("--network", "residual-cnn", "--widths", "4,6") == 0
    out = capsys.readouterr().out
    for words in ("blocks.1.shortcut", "Conv2d 6x4x1x1", "3 (3 to 4)"):
        assert words in out
    out = " ".join(out.split())  # lines break where the terminal ends
    assert "7 players in 6 stages" in out
    assert "alignment 0 of 0 to 1" in out
    assert "1 branch can be aligned, each by itself in 2 ways" in out


def test_ways_that_are_too_many_to_count(capsys, monkeypatch):
    monkeypatch.setattr("ocnopt.control.placement._WORK", 0)
    assert run("--network", "residual-cnn", "--widths", "4,6") == 0
    assert "each by itself in at least 1 ways" in " ".join(capsys.readouterr().out.split())


def test_a_chain_has_no_places(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert "fcn on digits: 5 players in 5 stages" in out
    assert "one alignment" in out
    assert "place" not in out


def test_json(capsys):
    words = ["--network", "residual-cnn", "--widths", "4,6", "--norm", "batch"]
    found = looked_at(capsys, *words, "--alignment", "-1")
    assert (found["alignment"], found["alignments"], found["placements"]) == (1, 2, 2)
    assert found["exact"]
    assert (found["players"], found["idle"], found["unowned"]) == (13, [], [])
    (together,) = [
        stage
        for stage in found["stages"]
        if any(player["name"] == "blocks.1.shortcut.conv" for player in stage["players"])
    ]
    assert [player["name"] for player in together["players"]] == [
        "blocks.1.conv2",
        "blocks.1.shortcut.conv",
    ]
    assert together["players"][1]["shapes"] == {"weight": [6, 4, 1, 1]}
    assert [together["players"][1][key] for key in ("place", "earliest", "latest")] == [4, 3, 4]
    assert sorted(map(tuple, together["alive"].values())) == [(4, 8, 8), (6, 4, 4)]
    assert found["branches"] == [
        {
            "players": ["blocks.1.shortcut.conv"],
            "earliest": [3],
            "latest": [4],
            "placements": 2,
            "exact": True,
        }
    ]


def test_a_recipe_needs_no_data(capsys):
    found = looked_at(capsys, "--recipe", "cifar-10-inception", "--data-root", "nowhere")
    assert found["dataset"] == "cifar-10"
    assert found["alignments"] == 3
    assert list(found["stages"][0]["alive"].values()) == [[3, 32, 32]]


def test_an_own_network_by_export(capsys):
    words = ["--dataset", "inspected_own:words", "--network", "inspected_own:encoder"]
    found = looked_at(capsys, *words)
    assert [[p["name"] for p in stage["players"]] for stage in found["stages"]] == [
        ["embed"],
        ["layer.norm1"],
        ["layer.linear1"],
        ["layer.linear2"],
        ["layer.norm2"],
        ["head"],
    ]
    assert {part["parameter"] for part in found["unowned"]} == {
        f"layer.self_attn.{name}"
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    assert run(*words) == 0
    assert "layer.self_attn.in_proj_weight: " in capsys.readouterr().out


def test_a_picture(capsys, here):
    assert run("--recipe", "digits-inception", "--output", "out") == 0
    assert "written: game.png, game.json in out" in capsys.readouterr().out
    assert (here / "out" / "game.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((here / "out" / "game.json").read_text())["network"] == "inception"


def test_names_with_dollar_signs_are_drawn(here):
    words = ["--dataset", "inspected_own:numbers", "--network", "inspected_own:dollars"]
    assert run(*words, "--output", "out") == 0
    assert (here / "out" / "game.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_number_may_have_a_point(capsys):
    words = ["--network", "residual-cnn", "--widths", "4,6", "--alignment", "1.0"]
    assert looked_at(capsys, *words)["alignment"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--recipe", "nothing"], "digits-inception"),
        (["--network", "fnc"], "residual-fcn"),
        (["--dataset", "wine", "--network", "inception"], "images"),
        (["--alignment", "1"], "give 0 to 0"),
        (["--alignment", "-2"], "give 0 to 0"),
        (["--alignment", "late"], "ocnopt inspect --help"),
        (["--alignment", "1.5"], "--alignment must be a whole number, not 1.5"),
        (["--alignment=-0.5"], "--alignment must be a whole number, not -0.5"),
        (["--widths", "3,x"], "whole numbers"),
        (["--depth", "2"], "depth belongs to"),
        (["--network", "absent_module:model"], "absent_module"),
        (["--network", "inspected_own:encoder"], "cannot take inputs of shape (2, 1, 8, 8)"),
        (
            ["--network", "inspected_own:unfinished"],
            "unfinished raised KeyError: 'boom' (inspected",
        ),
        (
            ["--dataset", "inspected_own:closed"],
            "closed raised ValueError: no data today (inspected",
        ),
        (
            ["--dataset", "inspected_own:numbers", "--network", "inspected_own:fickle"],
            "could not be traced",
        ),
        (["--dataset", "inspected_own:numbers", "--network", "inspected_own:plain"], "no player"),
        (["--output", "inspected_own.py"], "--output"),
        (["stray"], "stray"),
    ],
)
def test_bad_input_is_one_clear_line_and_code_2(words, says, capsys):
    assert run(*words) == 2
    assert says in one_line(capsys)
