import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from ocnopt.experiments import datasets
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.data.series import lengths, load_series, split
from ocnopt.experiments.data.series_sets import SERIES
from ocnopt.experiments.data.spline import fill, with_time_and_intensity
from ocnopt.experiments.data.ts import read_ts
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.setup import load_data

NAN = float("nan")

SMALL = """\
# A description, with an @ and a : in it.
@problemName Small
@timeStamps false
@missing true
@univariate false
@Dimensions 2
@equalLength false
@classLabel true b a 10.0

@data
1,2.5,-3e-1:4,?,6:a
# Another comment.
1,NaN:2,3:b

7 , 8,?,? : 9,nan,10,?:10.0
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "Small_TRAIN.ts"
    path.write_text(SMALL)
    return path


def test_a_small_file(small):
    found = read_ts(small)
    assert found.classes == ("b", "a", "10.0")
    assert found.labels.tolist() == [1, 0, 2]
    assert found.labels.dtype == np.int64
    assert found.channels == 2
    expected = [
        [[1, 2.5, -0.3], [4, NAN, 6]],
        [[1, NAN], [2, 3]],
        [[7, 8, NAN], [9, NAN, 10]],  # the last step, at which nothing was observed, is padding
    ]
    for series, numbers in zip(found.values, expected, strict=True):
        assert series.dtype == np.float64
        np.testing.assert_array_equal(series, np.array(numbers))


def test_other_spellings_of_the_header(small):
    small.write_bytes(
        "# caf\xe9\r\n@TIMESTAMPS false\r\n@UNIVARIATE true\r\n@seriesLength 2\r\n@other x\r\n"
        "@ClassLabel TRUE x y\r\n@DATA\r\n1,2:y\r\n3,4:x".encode("latin-1")
    )
    found = read_ts(small)
    assert (found.channels, found.classes, found.labels.tolist()) == (1, ("x", "y"), [1, 0])
    np.testing.assert_array_equal(found.values[1], [[3, 4]])


def swapped(old, new):
    assert old in SMALL
    return SMALL.replace(old, new)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ends before its data"),
        (SMALL[: SMALL.index("@data")], "ends before its data"),
        (SMALL[: SMALL.index("1,2.5")], "holds no series"),
        (swapped("@problemName", "problemName"), "line 2 neither a comment nor"),
        (swapped("@Dimensions 2", "@Dimensions two"), "no number of dimensions in line 6"),
        (swapped("@Dimensions 2", "@Dimensions"), "no number of dimensions in line 6"),
        (swapped("@Dimensions 2", "@Dimensions 3"), "2 dimensions in line 11, not 3"),
        (swapped("@univariate false\n@Dimensions 2", "@univariate true"), "2 dimen.*10, not 1"),
        (swapped("@Dimensions 2\n", "").replace("1,NaN:2,3:b", "2,3:b"), "1 dimensions in line 12"),
        (
            swapped(":4,?,6:a", ":a").replace("@Dimensions 2\n", ""),
            "2 dimensions in line 12, not 1",
        ),
        (swapped("1,2.5,-3e-1:4,?,6:a", "a"), "0 dimensions in line 11"),
        (swapped("@equalLength false", "@equalLength true"), "2 steps in line 13, not 3 as before"),
        (swapped("@classLabel true b a 10.0", "@classLabel false"), "names no classes before line"),
        (swapped("@classLabel true b a 10.0", "@classLabel true"), "names no classes before line"),
        (swapped(":10.0\n", ":10\n"), "ends line 15 with '10', none of"),
        (SMALL[:-10], r"ends line 15 with '9,nan,', none of"),
        (swapped("-3e-1", "-3e-"), "has in line 11 what is no number"),
        (swapped("2.5", "2?5"), "has in line 11 what is no number"),
        (swapped("2.5", ""), "has in line 11 what is no number"),
        (swapped("2.5", "inf"), "infinite value in line 11"),
        (swapped("4,?,6", "4,?"), r"dimensions of \[2, 3\] steps in line 11"),
        (swapped("1,NaN:2,3", "?,NaN:NaN,?"), "no observation in line 13"),
    ],
)
def test_damage_is_named_with_its_line(small, text, says):
    small.write_text(text)
    with pytest.raises(InputError, match=says) as raised:
        read_ts(small)
    assert str(raised.value).startswith(f"{small} ")
    assert "\n" not in str(raised.value)


def test_time_stamps_are_refused_by_name(small):
    small.write_text(swapped("@timeStamps false", "@timeStamps true"))
    with pytest.raises(InputError, match=r"time stamps \(line 3: @timeStamps true\)"):
        read_ts(small)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_ts(tmp_path)


def test_a_file_that_is_cut_or_corrupt_never_ends_in_another_error(small):
    whole = SMALL.encode()
    for place in range(len(whole)):
        for body in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place:]):
            small.write_bytes(body)
            try:
                read_ts(small)  # a cut at the end of a line leaves a shorter file
            except InputError as error:
                assert str(small) in str(error)


def natural_spline(knots, values, at):
    """The cubic pieces a + b t + c t^2 + d t^3 by one dense system; at lies within the knots."""
    pieces = len(knots) - 1
    rows, right = [], []

    def row(entries, value):
        rows.append(np.zeros(4 * pieces))
        for piece, coefficients in entries:
            rows[-1][4 * piece : 4 * piece + 4] += coefficients
        right.append(value)

    def derivatives(t):
        return np.array([[1, t, t**2, t**3], [0, 1, 2 * t, 3 * t**2], [0, 0, 2, 6 * t]])

    for i in range(pieces):
        row([(i, derivatives(knots[i])[0])], values[i])
        row([(i, derivatives(knots[i + 1])[0])], values[i + 1])
    for i in range(pieces - 1):
        for order in (1, 2):
            at_knot = derivatives(knots[i + 1])[order]
            row([(i, at_knot), (i + 1, -at_knot)], 0)
    row([(0, derivatives(knots[0])[2])], 0)
    row([(pieces - 1, derivatives(knots[-1])[2])], 0)
    solution = np.linalg.solve(np.array(rows), np.array(right)).reshape(pieces, 4)
    piece = min(np.searchsorted(knots, at, side="right") - 1, pieces - 1)
    return derivatives(at)[0] @ solution[piece]


@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(2, 12),
    share=st.floats(0.1, 0.9),
)
@settings(max_examples=60, deadline=None)
def test_gaps_follow_the_natural_spline_and_ends_stay(seed, length, share):
    generator = np.random.default_rng(seed)
    series = generator.standard_normal((3, length))
    series[generator.random((3, length)) < share] = NAN
    given_ = series.copy()
    filled = fill(series)
    np.testing.assert_array_equal(series, given_)  # what was given stays as it is
    assert np.isfinite(filled).all()
    for before, after in zip(series, filled, strict=True):
        knots = np.flatnonzero(np.isfinite(before))
        np.testing.assert_array_equal(after[knots], before[knots])
        for t in np.flatnonzero(np.isnan(before)):
            if not len(knots):
                expected = 0
            elif len(knots) == 1 or t < knots[0]:
                expected = before[knots[0]]
            elif t > knots[-1]:
                expected = before[knots[-1]]
            else:
                expected = natural_spline(knots, before[knots], t)
            assert after[t] == pytest.approx(expected, abs=1e-8)


def test_channels_of_a_series():
    series = np.array([[0.5, NAN, 1.5, 2.0], [NAN, 1.0, NAN, NAN]])
    rows = with_time_and_intensity(series, longest=5)
    assert rows.shape == (5, 5) and rows.dtype == np.float32
    np.testing.assert_allclose(rows[:4, 0], [0, 0.2, 0.4, 0.6], rtol=1e-6)
    np.testing.assert_allclose(rows[:4, 1], [0.2, 0.2, 0.4, 0.6], rtol=1e-6)
    np.testing.assert_allclose(rows[:4, 2], [0, 0.2, 0.2, 0.2], rtol=1e-6)
    expected = natural_spline([0, 2, 3], [0.5, 1.5, 2.0], 1)
    np.testing.assert_allclose(rows[:4, 3], [0.5, expected, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rows[:4, 4], [1, 1, 1, 1])
    assert np.isnan(rows[4]).all()
    assert lengths(torch.from_numpy(rows)).item() == 4


NAME = "character-trajectories-half"
STEM = SERIES[NAME].files[0].removesuffix("_TRAIN.ts")
KINDS = 3


def text_of(series, labels, names):
    """A .ts file of arrays (channels, length)."""
    lines = [f"@dimensions {len(series[0])}", f"@classLabel true {' '.join(names)}", "@data"]
    for values, label in zip(series, labels, strict=True):
        channels = [",".join("?" if np.isnan(v) else repr(float(v)) for v in row) for row in values]
        lines.append(":".join([*channels, names[label]]))
    return "\n".join(lines) + "\n"


def write_set(root, series, labels, cut=30, names=("x", "y", "z")):
    folder = root / SERIES[NAME].folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"TRAIN": slice(cut), "TEST": slice(cut, None)}
    for part, which in parts.items():
        text = text_of(series[which], labels[which], names)
        (folder / f"{STEM}_{part}.ts").write_text(text)
    return folder


@pytest.fixture
def made(tmp_path):
    """Two channels, 4 to 9 steps, 60 series of three classes, with gaps; and the folder of them."""
    generator = np.random.default_rng(0)
    labels = np.arange(60) % KINDS
    series = []
    for label in labels:
        values = generator.normal([[5.0], [-2.0]], [[3.0], [0.5]], (2, generator.integers(4, 10)))
        values[0] += label
        values[generator.random(values.shape) < 0.1] = NAN
        values[:, -1] = 1.0  # lengths are as they are drawn
        series.append(values)
    write_set(tmp_path, series, labels)
    return tmp_path, series, labels


def test_parts_follow_the_protocol(made):
    root, series, labels = made
    # The protocol as it is published: the series themselves are split, stratified by the labels.
    places = np.arange(60)
    train, rest, _, kinds = train_test_split(
        places, labels, train_size=0.7, random_state=0, shuffle=True, stratify=labels
    )
    validation, test = train_test_split(
        rest, train_size=0.5, random_state=1, shuffle=True, stratify=kinds
    )
    observed = [
        np.concatenate([row[np.isfinite(row)] for row in (series[i][channel] for i in train)])
        for channel in (0, 1)
    ]
    longest = max(values.shape[1] for values in series)
    found = load_series(NAME, root)
    assert found.classes == KINDS
    parts = {"train": train, "validation": validation, "test": test}
    assert [len(part) for part in parts.values()] == [42, 9, 9]
    for name, part in parts.items():
        x, y = getattr(found, name)
        assert x.shape == (len(part), longest, 5) and x.dtype == torch.float32
        assert y.tolist() == labels[part].tolist()
        assert lengths(x).tolist() == [series[i].shape[1] for i in part]
        for row, i in zip(x.double().numpy(), part, strict=True):
            for channel, values in enumerate(series[i]):
                seen = np.flatnonzero(np.isfinite(values))
                mean, deviation = observed[channel].mean(), observed[channel].std(ddof=1)
                standardized = (values[seen] - mean) / deviation
                np.testing.assert_allclose(
                    row[seen, 3 + channel], standardized, rtol=1e-5, atol=1e-6
                )
            assert np.isfinite(row[: series[i].shape[1]]).all()
            assert np.isnan(row[series[i].shape[1] :]).all()


def test_nothing_but_the_training_part_decides_its_numbers(made):
    root, series, labels = made
    before = load_series(NAME, root)
    _, validation, test = split(labels, root)
    for i in (*validation, *test):
        series[i] = series[i] * 100
    write_set(root, series, labels)
    after = load_series(NAME, root)
    torch.testing.assert_close(after.train[0], before.train[0], equal_nan=True, rtol=0, atol=0)
    assert float(after.test[0].nan_to_num().abs().max()) > 50


def test_every_series_is_in_one_part_alone():
    labels = np.arange(201) % 7
    parts = split(labels, "here")
    assert sorted(np.concatenate(parts).tolist()) == list(range(201))
    for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
        counts = np.bincount(labels[part], minlength=7)
        assert np.abs(counts - share * np.bincount(labels)).max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(parts, split(labels, "here"), strict=True))


def test_as_data_the_validation_part_ends_the_training_set(made):
    root, _, _ = made
    data, parts = datasets.load(NAME, root), load_series(NAME, root)
    assert data.shape == parts.test[0].shape[1:]
    assert data.classes == KINDS
    for place, kind in ((0, "x"), (1, "y")):
        expected = torch.cat((parts.train[place], parts.validation[place]))
        got = getattr(data, f"train_{kind}")
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)
        got = getattr(data, f"test_{kind}")
        torch.testing.assert_close(got, parts.test[place], equal_nan=True, rtol=0, atol=0)


def test_a_share_for_validation_is_taken_from_the_training_set(made):
    root, _, _ = made
    config = TrainConfig(dataset=NAME, data_root=root, batch_size=8, validation=0.15 / 0.85)
    data = load_data(config)
    assert (len(data.train_y), len(data.test_y)) == (42, 9)
    assert data.test_y.bincount().tolist() == [3, 3, 3]


def test_files_that_do_not_go_together(made):
    root, series, labels = made
    folder = root / SERIES[NAME].folder
    says = rf"{STEM}_TEST\.ts has other dimensions or classes than {STEM}_TRAIN\.ts"
    text = text_of(series[30:], labels[30:], ("x", "z", "y"))
    (folder / f"{STEM}_TEST.ts").write_text(text)
    with pytest.raises(InputError, match=says):
        load_series(NAME, root)
    text = text_of([values[:1] for values in series[30:]], labels[30:], ("x", "y", "z"))
    (folder / f"{STEM}_TEST.ts").write_text(text)
    with pytest.raises(InputError, match=says):
        load_series(NAME, root)


def test_too_few_of_a_class(made):
    root, series, labels = made
    write_set(root, [*series, series[0]], np.append(labels, 3), names=("x", "y", "z", "rare"))
    with pytest.raises(InputError, match="too few series of a class") as raised:
        load_series(NAME, root)
    assert str(root / SERIES[NAME].folder) in str(raised.value)


@pytest.mark.parametrize("value", [2.5, NAN])
def test_a_dimension_that_does_not_vary(made, value):
    root, series, labels = made
    for values in series:
        values[1] = value
    write_set(root, series, labels)
    with pytest.raises(InputError, match="dimension 1 that does not vary"):
        load_series(NAME, root)


def test_no_series(tmp_path):
    with pytest.raises(InputError, match="'mnist' is no set of time series; choose from artic"):
        load_series("mnist", tmp_path)


@pytest.mark.parametrize(
    ("module", "says"),
    [("sklearn.model_selection", "scikit-learn"), ("scipy.interpolate", "SciPy")],
)
def test_what_is_not_installed(made, monkeypatch, module, says):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"with {says}; pip install 'ocnopt\[experiments\]'"):
        load_series(NAME, made[0])
