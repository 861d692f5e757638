import gzip

import numpy as np
import pytest
import torch

from ocnopt.experiments import datasets
from ocnopt.experiments.data.idx import read_idx
from ocnopt.experiments.errors import InputError


def test_round_trip(tmp_path, write_idx):
    images = np.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", images)
    assert read_idx(tmp_path / "a.gz", dims=3).tolist() == images.tolist()


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no file"):
        read_idx(tmp_path / "a.gz", dims=3)


def test_from_files(mnist_root, monkeypatch):
    data = datasets.load("mnist", mnist_root)
    assert data.train_x.shape == (60, 1, 8, 8)
    assert data.test_y.tolist() == [i % 10 for i in range(20)]
    assert abs(float(data.train_x.mean())) < 1e-5
    assert abs(float(data.train_x.std()) - 1) < 1e-5
    monkeypatch.setenv("OCNOPT_DATA", str(mnist_root))
    assert torch.equal(datasets.load("mnist").train_x, data.train_x)


def test_unpacked_files_whatever_their_names(mnist_root):
    expected = datasets.load("mnist", mnist_root)
    for number, path in enumerate(sorted((mnist_root / "mnist").iterdir())):
        raw = gzip.decompress(path.read_bytes())
        path.unlink()
        # A browser that unpacks what it saves may leave the .gz or drop it.
        (path if number % 2 else path.with_suffix("")).write_bytes(raw)
    data = datasets.load("mnist", mnist_root)
    assert torch.equal(data.train_x, expected.train_x)
    assert torch.equal(data.test_y, expected.test_y)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-20], "cannot be read"),
        (lambda raw: b"not gzip at all", "no IDX file"),
        (lambda raw: raw[:40] + bytes(8) + raw[48:], "cannot be read"),
        (lambda raw: b"", "no IDX file"),
        (lambda raw: gzip.compress(b""), "no IDX file"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-5]), "states 3840 bytes"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"more"), "holds 3844"),
        (lambda raw: gzip.compress(b"\x00\x00\x0d" + gzip.decompress(raw)[3:]), "no IDX file"),
        (lambda raw: gzip.decompress(raw)[:-5], "states 3840 bytes"),
        (lambda raw: bytes((0, 0, 8, 3)) + bytes(12), "holds no images"),
    ],
    ids=[
        "cut",
        "no gzip",
        "corrupt",
        "empty",
        "empty gzip",
        "short",
        "long",
        "other type",
        "short unpacked",
        "none",
    ],
)
def test_damaged_file_is_named(mnist_root, damage, says):
    file = mnist_root / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=says) as raised:
        datasets.load("mnist", mnist_root)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_images_and_labels_must_match(mnist_root, write_idx):
    file = mnist_root / "mnist" / "train-labels-idx1-ubyte.gz"
    write_idx(file, np.zeros(59))
    with pytest.raises(InputError, match="59 labels for the 60 images") as raised:
        datasets.load("mnist", mnist_root)
    assert str(file) in str(raised.value)


def test_images_in_place_of_labels(mnist_root):
    folder = mnist_root / "mnist"
    images = (folder / "train-images-idx3-ubyte.gz").read_bytes()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(images)
    with pytest.raises(InputError, match=r"train-labels.* no IDX file of bytes with 1 dim"):
        datasets.load("mnist", mnist_root)


def test_label_out_of_range(mnist_root, write_idx):
    file = mnist_root / "mnist" / "t10k-labels-idx1-ubyte.gz"
    write_idx(file, np.full(20, 10))
    with pytest.raises(InputError, match="label above 9") as raised:
        datasets.load("mnist", mnist_root)
    assert str(file) in str(raised.value)


def test_two_sizes(mnist_root, write_idx):
    write_idx(mnist_root / "mnist" / "t10k-images-idx3-ubyte.gz", np.zeros((20, 9, 9)))
    with pytest.raises(InputError, match="two sizes"):
        datasets.load("mnist", mnist_root)


def test_images_that_do_not_vary(mnist_root, write_idx):
    write_idx(mnist_root / "mnist" / "train-images-idx3-ubyte.gz", np.zeros((60, 8, 8)))
    with pytest.raises(InputError, match="inputs of mnist do not vary"):
        datasets.load("mnist", mnist_root)
