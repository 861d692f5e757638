"""`ocnopt reproduce`: experiments at toy size, their folders, and bad input."""

import json
from dataclasses import replace

import pytest
import torch

from ocnopt import cli
from ocnopt.experiments.reproduce import EXPERIMENTS, Experiment, figure5, figure8
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher
from ocnopt.experiments.reproduce.runner import reproduce


def run(*words):
    return cli.main(["reproduce", *words])


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


@pytest.fixture
def tiny(monkeypatch):
    """Experiments of a second."""
    monkeypatch.setattr(figure8, "QUICK", replace(figure8.QUICK, clusters=(5,), iterations=(1, 4)))
    monkeypatch.setattr(figure5, "QUICK", figure5.Preset(("fcn", "cnn"), 2, 4, 2, 1))


def test_every_experiment_can_be_found():
    for entry in EXPERIMENTS.values():
        module = __import__(entry.module, fromlist=[entry.function])
        assert callable(getattr(module, entry.function))


def test_figure8(tiny, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert run("figure8", "--quick", "--seeds", "2", "--output", str(folder)) == 0
    out = capsys.readouterr().out
    assert "k-1 singular values with cross-entropy (4 of 4 spectra)" in " ".join(out.split())
    assert sorted(file.name for file in folder.iterdir()) == [
        f"figure8.{kind}" for kind in ("html", "json", "md", "png")
    ]
    results = json.loads((folder / "figure8.json").read_text())
    counts = {(row["case"], row["seed"], row["iteration"]): row["count"] for row in results["rows"]}
    assert counts == {
        (case, seed, iteration): count
        for case, count in (("cross-entropy", 4), ("MSE", 5))
        for seed in (0, 1)
        for iteration in (1, 4)
    }
    page = (folder / "figure8.md").read_text()
    assert "`ocnopt reproduce figure8 --quick --seeds 2`" in page
    assert "(figure8.png)" in page


def test_figure8_follows_the_classes_where_there_are_more_outputs():
    """Values beyond k - 1 leave with cross-entropy, and stay with MSE."""
    many = replace(figure8.CASES[3], lr=0.3)
    mse = replace(figure8.CASES[1], outputs=figure8.MANY)
    first, last = figure8.watch_spectra(many, 8, 1, (1, 80))
    assert (first["count"], last["count"]) == (19, 7)
    assert [row["count"] for row in figure8.watch_spectra(mse, 8, 1, (1, 20))] == [20, 20]


def test_figure5(tiny, tmp_path, capsys, mnist_root):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    words = ["--output", str(tmp_path / "out"), "--data-root", str(mnist_root)]
    assert run("figure5", "--quick", *words) == 0
    assert "Correlation" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    results = json.loads((tmp_path / "out" / "figure5.json").read_text())
    for row in results["rows"]:
        assert -1 <= row["correlation"] <= 1 and 0 <= row["best_of_nine"] <= 1
        if row["form"] == "rank one" and row["layer"].endswith("input"):
            assert row["gradient"] == pytest.approx(1, abs=1e-4)
    assert {row["network"] for row in results["rows"]} == {"fcn", "cnn"}
    assert "figure5.png" in (tmp_path / "out" / "figure5.md").read_text()


def test_most_confused_images_come_first():
    data = figure5.datasets.Data(*(torch.zeros(2, 1, 2, 2), torch.zeros(2).long()) * 2, classes=10)
    x = torch.zeros(30, 1, 2, 2)
    x[:, 0, 0, 0] = torch.arange(30)
    y = torch.tensor([y for y, _ in figure5.PAIRS for _ in range(3)] + [0] * 6)
    data = replace(data, test_x=x, test_y=y)

    class Table(torch.nn.Module):
        def forward(self, x):
            z = torch.zeros(len(x), 10)
            z[:, 3] = x[:, 0, 0, 0] % 3 + 1  # every image is most like a 3, the third one most
            return z

    images = figure5._confused(Table(), data, 2)
    assert images.y.tolist() == [y for y, _ in figure5.PAIRS for _ in range(2)]
    assert images.c.tolist() == [c for _, c in figure5.PAIRS for _ in range(2)]
    assert images.x[:2, 0, 0, 0].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["figure99"], "choose one of figure3"),
        ([], "NAME"),
        (["figure8", "--seeds", "0"], "at least 1"),
        (["figure8", "--seeds", "many"], "--seeds"),
        (["figure8", "--quik"], "ocnopt reproduce --help"),
        (["figure8", "--output", "file"], "cannot write to file"),
        (["figure5", "--data-root", "nowhere"], "nowhere"),
        (["figure5"], "OCNOPT_DATA"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    words, says, capsys, tmp_path, monkeypatch, no_data_variable
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert run(*words) == 2
    assert says in one_line(capsys)
    assert list(tmp_path.glob("**/*.*")) == []


def test_help_lists_the_experiments(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for word in (*EXPERIMENTS, "--quick", "--seeds", "--output", "--data-root"):
        assert word in out


def test_interruption_is_one_line(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_reproduce", interrupted)
    assert run("figure8") == 130
    assert "no page was written" in one_line(capsys)


def shown(settings, watcher):
    watcher.start(1)
    watcher.advance()
    row = {"value": float("nan")}
    return Report(("a",), [["1"]], "Seen.", "# Page", [row, row], {"lr": 0.1})


def test_files_replace_older_ones_and_hold_no_nan(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "shown", Experiment(__name__, "shown", "nothing"))
    monkeypatch.setattr(
        "ocnopt.experiments.reproduce.runner.import_module",
        lambda name: __import__("sys").modules[__name__],
    )
    (tmp_path / "shown.md").write_text("older")
    seen = []
    watcher = Watcher()
    watcher.advance = lambda text="": seen.append(text)
    report = reproduce(Settings("shown", tmp_path), watcher)
    assert report.sentence == "Seen." and seen == [""]
    assert (tmp_path / "shown.md").read_text() == "# Page\n"
    results = json.loads((tmp_path / "shown.json").read_text())
    assert results == {"seen": "Seen.", "lr": 0.1, "rows": [{"value": None}] * 2}
