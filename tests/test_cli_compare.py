import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import one_line

from ocnopt import cli
from ocnopt.experiments.data.sets import SERIES, SETS
from ocnopt.experiments.recipes import RECIPES

ROOT = Path(__file__).parents[1]
SMALL = ["--dataset", "wine", "--steps", "10", "--seeds", "1", "--processes", "1"]
TWO = ["--optimizer", "sgd lr=0.1,0.2", "--optimizer", "ddpnopt lr=0.1,0.2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working folder, and times that are not judged."""
    monkeypatch.setattr("ocnopt.experiments.compare.stepper._MOST_TENS", 1)
    monkeypatch.setattr("ocnopt.experiments.compare.stepper._LONG", 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return cli.main(["compare", *words])


def test_help_is_light_and_names_every_recipe_and_data_set(capsys):
    script = (
        "import sys; from ocnopt.cli import main; code = main(['compare', '--help']);"
        "sys.exit('torch' in sys.modules or code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in ("compare", "train"):
        assert cli.main([command, "--help"]) == 0
        words = "".join(capsys.readouterr().out.replace("│", " ").split())
        assert all(name in words for name in RECIPES)
        assert all(name in words for name in SETS.keys() - SERIES.keys())


def test_a_table_for_people_and_the_files(capsys, here):
    assert run(*SMALL, *TWO, "--output", "out") == 0
    captured = capsys.readouterr()
    for words in ("sgd", "ddpnopt", "workable", "no telling", "compare.html", "in out"):
        assert words in captured.out
    assert captured.err == ""
    assert (here / "out" / "compare.html").exists()
    assert (here / "runs" / "cache").is_dir()


def test_networks_of_blocks_can_be_changed(here):
    words = ["--network", "residual-fcn", "--widths", "5,4", "--depth", "1", "--output", "out"]
    assert run(*SMALL, *TWO, *words) == 0
    settings = json.loads((here / "out" / "compare.json").read_text())["settings"]
    assert (settings["network"], settings["depth"]) == ("residual-fcn", 1)
    page = (here / "out" / "compare.md").read_text()
    assert "residual-fcn of hidden widths 5, 4 and tanh, 1 layer per block" in page


def test_json_is_one_object_on_stdout(capsys):
    words = ["--recipe", "wine-fcn", *SMALL[2:], *TWO]
    assert run(*words, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert found["settings"]["head"] == "sigmoid"
    assert found["settings"]["steps"] == 10
    assert [c["label"] for c in found["contenders"]] == ["sgd", "ddpnopt"]
    assert found["contenders"][0]["best_lr"] in (0.1, 0.2)
    assert "losses" not in found["contenders"][0]["final"][0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optimizer", "sdg"], "sgd"),
        (["--lr", "fast"], "FROM:TO:COUNT"),
        (["--recipe", "nothing"], "digits-fcn"),
        (["--seeds", "0"], "seeds"),
        (["--seeds", "few"], "ocnopt compare --help"),
        (["--margin", "-1"], "margin"),
        (["--validation", "0"], "validation"),
        (["--processes", "0"], "processes"),
        (["--steps", "0"], "at least 1"),
        (["--network", "absent_module:model"], "absent_module"),
        (["--dataset", "mnist", "--data-root", "nowhere"], "nowhere"),
        (["--batch-size", "100000"], "batch-size"),
    ],
)
def test_bad_input_is_one_clear_line_and_code_2(words, says, capsys):
    assert run(*words) == 2
    assert says in one_line(capsys)


def test_a_folder_that_cannot_be_written_is_refused_first(capsys, here):
    (here / "taken").write_text("")
    assert run(*SMALL, *TWO, "--output", "taken") == 2
    assert "--output" in one_line(capsys)
    assert not (here / "runs").exists()


def test_train_takes_a_recipe_and_what_is_ones_own(capsys, here):
    (here / "trained_own.py").write_text(
        "import torch\n"
        "def model(shape, classes):\n    return torch.nn.Linear(shape[0], classes)\n"
        "def data():\n"
        "    x = torch.randn(40, 3)\n"
        "    return x[:30], (x[:30, 0] > 0).long(), x[30:], (x[30:, 0] > 0).long()\n"
    )
    words = ["--dataset", "trained_own:data", "--network", "trained_own:model", "--json"]
    words += ["--optimizer", "torch.optim:Adagrad", "--lr", "0.1", "--steps", "5"]
    words += ["--batch-size", "10"]
    assert cli.main(["train", *words]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 8
    assert cli.main(["train", "--recipe", "wine-fcn", "--steps", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["head"], found["steps"], found["batch_size"]) == ("sigmoid", 3, 8)


@pytest.mark.parametrize(
    ("command", "says"), [("compare", "in the cache"), ("data", "files"), ("train", "--resume")]
)
def test_interruption_says_what_is_kept(command, says, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_app", lambda: interrupted)
    assert cli.main([command]) == 130
    assert says in one_line(capsys)
