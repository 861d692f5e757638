import sys

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ocnopt.experiments import datasets
from ocnopt.experiments.data.svhn import read_mat
from ocnopt.experiments.errors import InputError


def content(samples):
    """X and y as the publisher has them: images last, the digit 0 as 10."""
    generator = np.random.default_rng(samples)
    return {
        "X": generator.integers(0, 256, (32, 32, 3, samples), dtype=np.uint8),
        "y": (np.arange(samples, dtype=np.uint8) % 10 + 1).reshape(-1, 1),
    }


@pytest.fixture
def root(tmp_path):
    """A folder with a training and a test file in the publisher's format, 12 and 5 images."""
    (tmp_path / "svhn").mkdir()
    savemat(tmp_path / "svhn" / "train_32x32.mat", content(12), do_compression=True)
    savemat(tmp_path / "svhn" / "test_32x32.mat", content(5))
    return tmp_path


def test_axes_and_labels(root):
    x, y = read_mat(root / "svhn" / "train_32x32.mat")
    assert x.dtype == torch.uint8 and x.is_contiguous()
    assert x.shape == (12, 3, 32, 32)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert torch.equal(x[7, 2], torch.from_numpy(content(12)["X"][:, :, 2, 7]))


def test_from_files(root):
    data = datasets.load("svhn", root)
    assert data.train_x.shape == (12, 3, 32, 32)
    assert data.test_y.tolist() == [1, 2, 3, 4, 5]
    assert data.classes == 10
    torch.testing.assert_close(data.train_x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


def changed(**variables):
    return lambda path: savemat(path, {**content(12), **variables})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3000]), "cannot be read as a MATLAB"),
        (lambda path: path.write_bytes(b"no MATLAB"), "cannot be read as a MATLAB"),
        (lambda path: path.write_bytes(b""), "cannot be read as a MATLAB"),
        (lambda path: savemat(path, {"y": content(12)["y"]}), "no variable X"),
        (lambda path: savemat(path, {"X": content(12)["X"]}), "no variable y"),
        (changed(X=content(12)["X"].transpose(3, 0, 1, 2)), "X of uint8 12x32x32x3, not of"),
        (changed(X=content(12)["X"].astype(float)), "X of float64"),
        (changed(X=content(12)["X"][..., 0]), "X of uint8 32x32x3, not"),
        (changed(y=content(11)["y"]), "y of uint8 11x1 for an X of 32x32x3x12"),
        (changed(y=content(12)["y"] * 0.5), "y of float64"),
        (changed(y=content(12)["y"] - 1), "label outside 1 to 10"),
        (changed(y=content(12)["y"] + 1), "label outside 1 to 10"),
    ],
    ids=[
        "cut",
        "other",
        "empty",
        "no X",
        "no y",
        "axes",
        "type",
        "images",
        "lengths",
        "fractions",
        "from 0",
        "above",
    ],
)
def test_damaged_file_is_named(root, damage, says):
    file = root / "svhn" / "train_32x32.mat"
    damage(file)
    with pytest.raises(InputError, match=says) as raised:
        datasets.load("svhn", root)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_corrupt_byte_never_ends_in_another_error(root):
    file = root / "svhn" / "train_32x32.mat"
    whole = file.read_bytes()
    for place in range(0, 400, 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_mat(file)  # a byte of the header's text may be anything
        except InputError as error:
            assert str(file) in str(error)


def test_without_scipy(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match="SciPy"):
        datasets.load("svhn", root)
