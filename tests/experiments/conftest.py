import gzip

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    """These problems are small; many threads only slow them down and disturb neighbours."""
    torch.set_num_threads(1)


def _write_idx(path, array):
    """Write an array of bytes as a gzip-compressed IDX file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, array.ndim))
    header += b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def write_idx():
    """A function that writes an array as an IDX file."""
    return _write_idx


@pytest.fixture
def mnist_root(tmp_path):
    """A folder with a small stand-in for MNIST, of the same format: 8x8 noise, 60 and 20."""
    generator = np.random.default_rng(0)
    root = tmp_path / "data"
    for part, size in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (size, 8, 8))
        _write_idx(root / "mnist" / f"{part}-images-idx3-ubyte.gz", images)
        labels = np.arange(size) % 10
        _write_idx(root / "mnist" / f"{part}-labels-idx1-ubyte.gz", labels)
    return root


@pytest.fixture
def no_data_variable(monkeypatch, tmp_path_factory):
    """Without a data folder in the environment, and with an empty one in the cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.delenv("OCNOPT_DATA", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda project: cache / project)
    return cache / "ocnopt"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    seen = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        seen.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen
