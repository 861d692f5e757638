import pickle
import re

import numpy as np
import pytest
import torch

from ocnopt.experiments.data.density_sets import DENSITIES
from ocnopt.experiments.data.tabular import load_density, unlike
from ocnopt.experiments.errors import InputError


def thirds(rows):
    """Training, validation and test part, as it is published."""
    tests = int(0.1 * len(rows))
    test, rest = rows[-tests:], rows[:-tests]
    held = int(0.1 * len(rest))
    return rest[:-held], rest[-held:], test


def columns_left(rows):
    """The published rule: as long as columns are alike, drop the first that is like another."""
    left = list(range(rows.shape[1]))
    while True:
        for position, i in enumerate(left):
            like = [j for j in left if np.corrcoef(rows[:, i], rows[:, j])[0, 1] > 0.98]
            if len(like) > 1:
                del left[position]
                break
        else:
            return left


def test_miniboone(tmp_path):
    rows = np.random.default_rng(0).normal(3.0, 2.0, (237, 43)).astype(np.float32)
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", rows)
    found = load_density("miniboone", tmp_path)
    parts = thirds(rows.astype(np.float64))
    known = np.concatenate(parts[:2])
    for got, expected in zip((found.train, found.validation, found.test), parts, strict=True):
        assert got.dtype == torch.float32
        expected = (expected - known.mean(0)) / known.std(0)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert [len(part) for part in parts] == [193, 21, 23]


@pytest.mark.parametrize("rows", [11, 19, 20, 99, 100, 101, 110, 1000])
def test_sizes_of_parts(tmp_path, rows):
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", np.random.default_rng(0).random((rows, 43)))
    found = load_density("miniboone", tmp_path)
    sizes = [len(part) for part in (found.train, found.validation, found.test)]
    assert sizes == [len(part) for part in thirds(np.zeros(rows))]


def test_published_sizes():
    """Those of the paper's Table: with validation, 29,556 + 3,284 and 852,174 + 94,685."""
    for name, rows, sizes in (
        ("miniboone", 36_488, (29_556, 3_284, 3_648)),
        ("gas", 1_052_065, (852_174, 94_685, 105_206)),
    ):
        assert tuple(len(part) for part in thirds(np.zeros(rows))) == sizes
        assert (DENSITIES[name].train, DENSITIES[name].test) == (sum(sizes[:2]), sizes[2])


def sensors(rows):
    """Time, two concentrations and 16 sensors, of which each of the last eight copies another."""
    generator = np.random.default_rng(1)
    table = generator.normal(50.0, 20.0, (rows, 19))
    table[:, 11:] = -2 * table[:, 3:11] + generator.normal(0, 1, (rows, 8))
    table[:, 11:] *= -1  # alike only where the correlation is positive
    table[:, 0] = np.arange(rows) / 100
    return table.round(2)


def write_gas(root, table):
    (root / "gas").mkdir(exist_ok=True)
    path = root / "gas" / "ethylene_CO.txt"
    header = "Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)"
    np.savetxt(path, table, fmt="%.2f", header=header, comments="", delimiter="  ")
    return path


def test_gas(tmp_path):
    table = sensors(2003)
    write_gas(tmp_path, table)
    chosen = np.random.default_rng(0).permutation(2003)[:501]  # a quarter, in random order
    rows = table[chosen, 3:]
    left = columns_left(rows)
    assert left == list(range(8, 16))  # the first of two that are alike goes
    rows = (rows - rows.mean(0)) / rows.std(0, ddof=1)
    found = load_density("gas", tmp_path)
    parts = thirds(rows[:, left])
    assert [len(part) for part in parts] == [406, 45, 50]
    for got, expected in zip((found.train, found.validation, found.test), parts, strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_columns_that_are_left(seed):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((400, 3)) @ generator.standard_normal((3, 12))
    rows += generator.choice([0.05, 0.3, 3.0], 12) * generator.standard_normal((400, 12))
    rows[:, 5] = -rows[:, 4]
    rows[:, 9] = rows[:, 2] * 3 + 1
    rows[:, 11] = rows[:, 2] + 0.01 * generator.standard_normal(400)
    assert unlike(rows) == columns_left(rows)
    assert 2 not in unlike(rows)


class Trap:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def pickled(path):
    path.write_bytes(pickle.dumps(Trap()))


def objects(path):
    np.save(path, np.full((20, 43), Trap(), dtype=object), allow_pickle=True)


def table(change):
    def write(path):
        rows = np.random.default_rng(0).random((20, 43))
        np.save(path, change(rows))

    return write


def put(value):
    def change(rows):
        rows[3, 7] = value
        return rows

    return change


def still(rows):
    rows[:, 7] = 0.1
    return rows


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (pickled, "cannot be read as a NumPy file"),
        (objects, "cannot be read as a NumPy file"),
        (lambda path: path.write_bytes(b""), "cannot be read as a NumPy file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as a NumPy file"),
        (lambda path: np.savez(path.open("wb"), x=np.zeros(3)), "holds no table of numbers"),
        (table(lambda rows: rows[0]), "holds no table of numbers"),
        (table(lambda rows: rows.astype(int)), "holds no table of numbers"),
        (table(lambda rows: rows[:, :-1]), "comes to 42 features, not 43"),
        (table(lambda rows: rows[:10]), r"too few rows to be split in three \(10\)"),
        (table(put(np.nan)), "not finite"),
        (table(put(np.inf)), "not finite"),
        (table(still), "feature 7 that does not vary"),
    ],
)
def test_a_damaged_numpy_file_is_named(tmp_path, damage, says):
    path = tmp_path / "miniboone" / "data.npy"
    path.parent.mkdir()
    table(lambda rows: rows)(path)
    load_density("miniboone", tmp_path)
    damage(path)
    with pytest.raises(InputError, match=says) as raised:
        load_density("miniboone", tmp_path)
    assert str(raised.value).startswith(f"{path} ")
    assert "\n" not in str(raised.value)


def test_a_corrupt_byte_never_ends_in_another_error(tmp_path):
    path = tmp_path / "miniboone" / "data.npy"
    path.parent.mkdir()
    table(lambda rows: rows)(path)
    whole = path.read_bytes()
    for place in range(140):
        for mask in (0xFF, 0x01, 0x10):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            try:
                load_density(
                    "miniboone", tmp_path
                )  # a byte of the header's padding may be anything
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", "too few rows"),
        (lambda text: text.partition("\n")[0], "too few rows"),
        (lambda text: text[: text.index("\n0.40")], r"too few rows to be split in three \(10\)"),
        (lambda text: text[:-60], "number of columns changed from 19 to"),
        (lambda text: text.replace("\n0.70 ", "\n0.70 5 "), "columns changed from 19 to 20 at row"),
        (lambda text: text.replace("\n", " 7\n"), "has 20 columns, not 19"),
        (lambda text: text.replace("\n0.70 ", "\n0.7x "), "could not convert string '0.7x'"),
        (lambda text: re.sub(r"(\n\S+ +\S+ +\S+ +)\S+", r"\1nan", text), "not finite"),
        (lambda text: text + "one two three\n", "cannot be read as a table of numbers"),
        (lambda text: "\x00\x01" * 100, "too few rows"),
    ],
)
def test_a_damaged_text_file_is_named(tmp_path, change, says):
    path = write_gas(tmp_path, sensors(120))
    text = path.read_text()
    path.write_text(change(text))
    with pytest.raises(InputError, match=says) as raised:
        load_density("gas", tmp_path)
    assert str(raised.value).startswith(f"{path} ")
    assert "\n" not in str(raised.value)


def test_sensors_that_leave_too_many(tmp_path):
    write_gas(tmp_path, np.random.default_rng(0).random((500, 19)))
    with pytest.raises(InputError, match="comes to 16 features, not 8"):
        load_density("gas", tmp_path)


def test_a_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "gas").mkdir()
    pickled(tmp_path / "gas" / "ethylene_CO.pickle")
    with pytest.raises(InputError, match=r"ethylene_CO\.pickle .* not read: a pickle can run code"):
        load_density("gas", tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="'ocnopt data get miniboone --data-root"):
        load_density("miniboone", tmp_path)
    with pytest.raises(InputError, match="no density 'power'; choose from miniboone, gas"):
        load_density("power", tmp_path)
