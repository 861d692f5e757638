import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from command_line import one_line

from ocnopt import cli
from ocnopt.experiments.data import fetch as fetching
from ocnopt.experiments.data import sets
from ocnopt.experiments.data.sets import SETS, all_sets


def run(*words):
    return cli.main(["data", *words])


@pytest.mark.parametrize("words", [["--help"], ["get", "--help"], ["list"], ["where", "digits"]])
def test_nothing_heavy_is_imported(words):
    heavy = ("torch", "numpy", "scipy", "sklearn", "matplotlib")
    script = (
        "import sys; from ocnopt.cli import main; code = main(['data', *sys.argv[1:]]);"
        f"found = [m for m in {heavy!r} if m in sys.modules];"
        "sys.exit(f'imported {found}' if found else code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_names_the_commands(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("list", "get", "where"))
    assert cli.main(["--help"]) == 0
    assert "data" in capsys.readouterr().out


def test_list_shows_every_set_and_whether_it_is_there(capsys, mnist_root, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert run("list", "--data-root", str(mnist_root)) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name, facts in all_sets().items():
        assert f"{facts.train:,} + {facts.test:,}" in lines[name]
        assert "x".join(map(str, facts.shape)) in lines[name]
    assert lines["mnist"].split()[-1] == lines["digits"].split()[-1] == "yes"
    assert lines["svhn"].split()[-1] == lines["gas"].split()[-1] == "no"
    assert str(mnist_root) in out


def test_list_fits_a_narrow_terminal(capsys, mnist_root, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("list", "--data-root", str(mnist_root)) == 0
    table = capsys.readouterr().out.splitlines()[:-1]
    assert max(map(len, table)) <= 80
    assert len(table) == len(all_sets()) + 3  # heading, rule and an empty line: nothing is folded
    assert all(name in line for name, line in zip(all_sets(), table[2:-1], strict=True))


def test_list_as_json(capsys, mnist_root):
    assert run("list", "--data-root", str(mnist_root), "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["data_root"] == str(mnist_root)
    by_name = {facts["name"]: facts for facts in listed["sets"]}
    assert list(by_name) == list(all_sets())
    assert by_name["mnist"]["present"] and by_name["mnist"]["missing"] == []
    assert by_name["digits"]["present"] and by_name["digits"]["folder"] is None
    assert not by_name["svhn"]["present"]
    assert by_name["svhn"]["missing"] == ["train_32x32.mat", "test_32x32.mat"]
    assert by_name["svhn"]["folder"] == str(mnist_root / "svhn")


def test_where(capsys, mnist_root, monkeypatch):
    monkeypatch.setenv("OCNOPT_DATA", str(mnist_root))
    assert run("where", "mnist") == 0
    assert capsys.readouterr().out == f"{mnist_root / 'mnist'}\n"
    assert run("where", "mnist", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == [str(mnist_root / "mnist" / name) for name in SETS["mnist"].files]
    assert run("where", "digits") == 0
    assert "scikit-learn" in capsys.readouterr().out


def test_where_it_would_be(capsys, no_data_variable):
    assert run("where", "svhn") == 2
    says = one_line(capsys)
    assert str(no_data_variable / "svhn") in says
    assert "'ocnopt data get svhn'" in says


@pytest.fixture
def small_mnist(mnist_root, tmp_path, monkeypatch):
    """MNIST as if it were published by a folder with small files."""
    bodies = {path.name: path.read_bytes() for path in (mnist_root / "mnist").iterdir()}
    downloads = tuple(
        replace(
            download,
            urls=(f"http://127.0.0.1:1/{download.name}",),
            checksum=f"md5:{hashlib.md5(bodies[download.name]).hexdigest()}",
        )
        for download in SETS["mnist"].downloads
    )
    monkeypatch.setitem(sets.SETS, "mnist", replace(SETS["mnist"], downloads=downloads))
    monkeypatch.setattr(fetching, "PAUSE", 0)
    monkeypatch.setenv("NO_PROXY", "*")
    return bodies


def test_get_then_load(capsys, tmp_path, small_mnist, monkeypatch):
    import pooch

    def given(url, output_file, *args):
        with open(output_file, "wb") as file:
            file.write(small_mnist[url.rsplit("/")[-1]])

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **options: given)
    root = tmp_path / "other"
    assert run("get", "mnist", "digits", "--data-root", str(root)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[0] == f"mnist: fetched to {root / 'mnist'}"
    assert captured.out.splitlines()[1].startswith("digits: nothing to fetch")
    words = ["--dataset", "mnist", "--optimizer", "sgd", "--steps", "1", "--json"]
    assert cli.main(["train", *words, "--data-root", str(root)]) == 0
    capsys.readouterr()
    assert run("get", "mnist", "--data-root", str(root)) == 0
    assert "already in" in capsys.readouterr().out
    assert run("get", "mnist", "--data-root", str(root), "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)["sets"]
    assert (told["name"], told["fetched"], told["present"]) == ("mnist", False, True)


def test_get_of_a_set_that_cannot_be_fetched(capsys, tmp_path):
    assert run("get", "gas", "--data-root", str(tmp_path / "root")) == 2
    says = one_line(capsys)
    assert "ethylene_CO.txt of https://archive.ics.uci.edu/dataset/322" in says
    assert "ethylene_CO.pickle" in says and "can run code" in says
    assert not (tmp_path / "root").exists()
    (tmp_path / "gas").mkdir()
    (tmp_path / "gas" / "ethylene_CO.txt").touch()
    assert run("get", "gas", "--data-root", str(tmp_path)) == 0
    assert "already in" in capsys.readouterr().out


def test_get_that_fails_is_one_line_and_code_2(capsys, tmp_path, small_mnist):
    assert run("get", "mnist", "--data-root", str(tmp_path / "other")) == 2
    says = one_line(capsys)
    assert "http://127.0.0.1:1/train-images-idx3-ubyte.gz" in says
    assert str(tmp_path / "other" / "mnist" / "train-images-idx3-ubyte.gz") in says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["get"], "which data sets"),
        (["get", "cifar"], "ocnopt data --help"),
        (["where"], "ocnopt data --help"),
        (["where", "imagenet"], "imagenet"),
        (["lst"], "list"),
        (["get", "digits", "--data-rot", "x"], "--data-rot"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, says, capsys):
    assert run(*words) == 2
    assert says in one_line(capsys)
