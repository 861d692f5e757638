import json

import pytest

from ocnopt.experiments.files import write_atomically, write_json


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.bin"
    write_atomically(file, lambda out: out.write(b"old"))

    def fail(out):
        out.write(b"half of the new")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk"):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_old_content_stays_until_the_new_is_complete(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")

    def look(out):
        out.write(b"new")
        out.flush()
        assert file.read_bytes() == b"old"

    write_atomically(file, look)
    assert file.read_bytes() == b"new"


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": 2}})
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": 2}}
