"""The data sets, standardized and in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocnopt.experiments.data.cifar import read_batches
from ocnopt.experiments.data.clusters import SPREAD, gaussian_clusters
from ocnopt.experiments.data.damage import damaged
from ocnopt.experiments.data.idx import read_images
from ocnopt.experiments.data.locate import find_files
from ocnopt.experiments.data.series import load_series
from ocnopt.experiments.data.sets import SERIES, SETS
from ocnopt.experiments.data.svhn import read_mat
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import DatasetName

_SPLIT_SEED = 0  # one fixed split: seeds vary the training, never the task


@dataclass(frozen=True)
class Data:
    """A training and a test set.

    Attributes:
        train_x: Inputs, (N, features), (N, channels, height, width) or, for time series,
            (N, steps, channels), float32; the rows past a series' end are NaN.
        train_y: Classes, (N,), int64.
        test_x: Inputs of the test set.
        test_y: Classes of the test set.
        classes: Number of classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: torch.device) -> Data:
        """Return the same data on a device."""
        return replace(
            self,
            train_x=self.train_x.to(device),
            train_y=self.train_y.to(device),
            test_x=self.test_x.to(device),
            test_y=self.test_y.to(device),
        )


def load(name: DatasetName, root: Path | None = None) -> Data:
    """Load a data set by name; nothing is ever downloaded here.

    Args:
        name: `digits` and `wine` come with scikit-learn (a stratified 80/20 split, always the
            same); `clusters` are generated; `mnist`, `fashion-mnist`, `cifar-10` and `svhn` are
            read from files and keep their own test sets; time series are read from files and split
            anew (`ocnopt.experiments.data.series.load_series`), their validation part being the
            end of the training set here.
        root: Folder that holds `mnist/` and so on; None takes the environment variable
            OCNOPT_DATA, else a folder in the user's cache.

    Returns:
        The data on the CPU, standardized by the statistics of the training set alone. Wine and
        clusters have a mean and a deviation per feature; grey images one of each as a whole, so
        that a pixel that never varies stays harmless; colour images one per channel; time series
        one per channel as well, of the training part without the validation part.

    Raises:
        InputError: If files are missing (it says how to get them) or damaged, or scikit-learn is
            needed and not installed.
    """
    if name == "digits":
        return _digits()
    if name == "wine":
        return _wine()
    if name == "clusters":
        return _clusters()
    if name not in SETS:
        raise InputError(f"there is no data set {name!r}; choose from {', '.join(SETS)}")
    if name in SERIES:
        return _series(name, root)
    data_set = SETS[name]
    files = find_files(data_set, root)
    if name == "cifar-10":
        train, test = read_batches(files[:-1]), read_batches(files[-1:])
    elif name == "svhn":
        train, test = read_mat(files[0]), read_mat(files[1])
    else:
        train = read_images(files[0], files[1], data_set.classes)
        test = read_images(files[2], files[3], data_set.classes)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise damaged(files[0].parent, "has training and test images of two sizes")
    dims = (0, 2, 3) if train[0].shape[1] > 1 else (0, 1, 2, 3)
    (train_x, train_y), (test_x, test_y) = _scaled(train), _scaled(test)
    return _standardized(name, train_x, train_y, test_x, test_y, dims, data_set.classes)


def _series(name: DatasetName, root: Path | None) -> Data:
    parts = load_series(name, root)
    train_x, train_y = map(torch.cat, zip(parts.train, parts.validation, strict=True))
    return Data(train_x, train_y, *parts.test, classes=parts.classes)


def _digits() -> Data:
    bunch = _sklearn("load_digits")
    pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return _split("digits", pixels, torch.from_numpy(bunch.target).long(), dims=(0, 1, 2, 3))


def _wine() -> Data:
    bunch = _sklearn("load_wine")
    features = torch.from_numpy(bunch.data).float()
    return _split("wine", features, torch.from_numpy(bunch.target).long(), dims=(0,))


def _clusters() -> Data:
    facts = SETS["clusters"]
    x, y = gaussian_clusters(facts.classes, SPREAD, _SPLIT_SEED)
    train = slice(facts.train)
    test = slice(facts.train, facts.train + facts.test)
    return _standardized("clusters", x[train], y[train], x[test], y[test], (0,), facts.classes)


def _sklearn(loader: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise InputError(
            "digits and wine come with scikit-learn; pip install 'ocnopt[experiments]'"
        ) from None
    return getattr(datasets, loader)()


def _split(name: DatasetName, x: Tensor, y: Tensor, dims: tuple[int, ...]) -> Data:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        range(len(y)), test_size=0.2, stratify=y.numpy(), random_state=_SPLIT_SEED
    )
    classes = SETS[name].classes
    return _standardized(name, x[train], y[train], x[test], y[test], dims, classes)


def _scaled(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    pixels, labels = images
    return pixels.float().div_(255), labels


def _standardized(
    name: DatasetName,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    dims: tuple[int, ...],
    classes: int,
) -> Data:
    """Subtract mean and divide by deviation over `dims`, in place: colour images are large."""
    mean = train_x.mean(dims, keepdim=True)
    deviation = train_x.std(dims, keepdim=True)
    if not bool((deviation > 0).all()):
        raise InputError(f"the training inputs of {name} do not vary; fetch it again")
    for x in (train_x, test_x):
        x.sub_(mean).div_(deviation)
    return Data(train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, classes=classes)
