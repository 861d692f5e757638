import gzip

import numpy as np
import pytest
import torch

from ocnopt.experiments import datasets
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.idx import read_idx
from ocnopt.experiments.order import DataOrder


def test_digits_are_images_standardized_by_the_training_set():
    data = datasets.load("digits")
    assert data.train_x.shape == (1437, 1, 8, 8)
    assert data.test_x.shape == (360, 1, 8, 8)
    assert data.classes == 10
    assert data.train_x.mean().abs() < 1e-5
    assert abs(float(data.train_x.std()) - 1) < 1e-5
    assert data.train_y.dtype == torch.int64
    # Stratified: every class has its fifth in the test set.
    assert int((data.test_y.bincount() - 36).abs().max()) <= 1


def test_wine_is_standardized_per_feature():
    data = datasets.load("wine")
    assert data.shape == (13,)
    assert data.classes == 3
    torch.testing.assert_close(data.train_x.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std(0), torch.ones(13), atol=1e-5, rtol=0)


def test_the_split_is_always_the_same():
    assert torch.equal(datasets.load("wine").test_x, datasets.load("wine").test_x)


def test_idx_round_trip(tmp_path, write_idx):
    images = np.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", images)
    assert read_idx(tmp_path / "a.gz", dims=3).tolist() == images.tolist()


def test_mnist_from_files(mnist_root, monkeypatch):
    data = datasets.load("mnist", mnist_root)
    assert data.train_x.shape == (60, 1, 8, 8)
    assert data.test_y.tolist() == [i % 10 for i in range(20)]
    monkeypatch.setenv("OCNOPT_DATA", str(mnist_root))
    assert torch.equal(datasets.load("mnist").train_x, data.train_x)


def test_missing_data_says_where_to_put_it(no_data_variable, tmp_path):
    with pytest.raises(InputError, match=r"--data-root FOLDER or OCNOPT_DATA"):
        datasets.load("mnist")
    with pytest.raises(InputError, match=r"no folder .*fashion-mnist"):
        datasets.load("fashion-mnist", tmp_path)
    (tmp_path / "mnist").mkdir()
    with pytest.raises(InputError, match=r"no file .*train-images-idx3-ubyte\.gz"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-20], "cannot be read"),
        (lambda raw: b"not gzip at all", "cannot be read"),
        (lambda raw: raw[:40] + bytes(8) + raw[48:], "cannot be read"),
        (lambda raw: gzip.compress(b""), "no IDX file"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-5]), "states 3840 bytes"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"more"), "holds 3844"),
        (lambda raw: gzip.compress(b"\x00\x00\x0d" + gzip.decompress(raw)[3:]), "no IDX file"),
    ],
    ids=["cut", "no gzip", "corrupt", "empty", "short", "long", "other type"],
)
def test_damaged_idx_is_named(mnist_root, damage, says):
    file = mnist_root / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=says) as raised:
        datasets.load("mnist", mnist_root)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_images_and_labels_must_match(mnist_root, write_idx):
    write_idx(mnist_root / "mnist" / "train-labels-idx1-ubyte.gz", np.zeros(59))
    with pytest.raises(InputError, match="60 train images and 59 labels"):
        datasets.load("mnist", mnist_root)


def test_order_visits_every_sample_once_per_epoch_and_depends_on_the_step_alone():
    order = DataOrder(20, 4, seed=3, device=torch.device("cpu"))
    assert order.steps_per_epoch == 5
    batches = [order.batch(step).tolist() for step in range(15)]
    for epoch in range(3):
        seen = [i for batch in batches[5 * epoch : 5 * epoch + 5] for i in batch]
        assert sorted(seen) == list(range(20))
    assert batches[:5] != batches[5:10]
    other = DataOrder(20, 4, seed=3, device=torch.device("cpu"))
    assert [other.batch(step).tolist() for step in reversed(range(15))] == batches[::-1]


def test_orders_of_neighbouring_seeds_and_epochs_differ():
    def epoch(seed, number):
        return DataOrder(50, 50, seed, torch.device("cpu")).batch(number).tolist()

    assert epoch(0, 1) != epoch(1, 0)


def test_incomplete_batch_is_dropped():
    order = DataOrder(10, 4, seed=0, device=torch.device("cpu"))
    assert order.steps_per_epoch == 2
    assert all(len(order.batch(step)) == 4 for step in range(6))
