import json

from ocnopt.experiments import demo


def test_demo_ends_with_a_table_a_plot_and_a_sentence_from_its_numbers(tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path), "--seeds", "2", "--steps", "60"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["seen"] in out
    assert kept["seen"].startswith("At learning rate 0.1 feedback ")
    assert len(kept["runs"]) == 8
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_demo_that_cannot_write_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--output", str(tmp_path / "file"), "--steps", "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
