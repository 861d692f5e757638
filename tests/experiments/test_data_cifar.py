import numpy as np
import pytest
import torch

from ocnopt.experiments import datasets
from ocnopt.experiments.data.cifar import read_batches
from ocnopt.experiments.errors import InputError

RECORDS = 3


@pytest.fixture
def pixels():
    """Three images per batch, six batches: (6, 3, channel, row, column)."""
    return np.random.default_rng(0).integers(0, 256, (6, RECORDS, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def root(tmp_path, pixels):
    """A folder with batches in the publisher's format; labels count on from file to file."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for batch, (name, images) in enumerate(zip(names, pixels, strict=True)):
        records = [
            bytes([(RECORDS * batch + i) % 10]) + image.tobytes() for i, image in enumerate(images)
        ]
        (folder / name).write_bytes(b"".join(records))
    return tmp_path


def test_batches_in_their_order(root, pixels):
    folder = root / "cifar-10-batches-bin"
    x, y = read_batches([folder / "data_batch_2.bin", folder / "data_batch_1.bin"])
    assert x.dtype == torch.uint8
    assert y.tolist() == [3, 4, 5, 0, 1, 2]
    assert torch.equal(x[:3], torch.from_numpy(pixels[1]))


def test_from_files(root, pixels):
    data = datasets.load("cifar-10", root)
    assert data.train_x.shape == (15, 3, 32, 32)
    assert data.test_x.shape == (3, 3, 32, 32)
    assert data.train_y.tolist() == [i % 10 for i in range(15)]
    assert data.test_y.tolist() == [5, 6, 7]
    assert data.classes == 10
    # One mean and one deviation per channel, those of the training set.
    torch.testing.assert_close(data.train_x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    train = pixels[:5].transpose(2, 0, 1, 3, 4).reshape(3, -1) / 255
    mean, deviation = train.mean(1)[:, None, None], train.std(1, ddof=1)[:, None, None]
    test = (pixels[5] / 255 - mean) / deviation
    torch.testing.assert_close(data.test_x, torch.from_numpy(test).float())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-1], "9218 bytes, which is no whole number of records of 3073"),
        (lambda raw: b"", "has 0 bytes"),
        (lambda raw: b"\x0a" + raw[1:], "label above 9"),
    ],
    ids=["cut", "empty", "label"],
)
def test_damaged_batch_is_named(root, damage, says):
    file = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=says) as raised:
        datasets.load("cifar-10", root)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_batch_that_is_missing_is_named(root):
    (root / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(InputError, match=r"no file .*data_batch_4\.bin"):
        datasets.load("cifar-10", root)


def test_a_channel_that_does_not_vary(root):
    for file in (root / "cifar-10-batches-bin").iterdir():
        records = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, 3073).copy()
        records[:, 1025:2049] = 7
        file.write_bytes(records.tobytes())
    with pytest.raises(InputError, match="cifar-10 do not vary"):
        datasets.load("cifar-10", root)
