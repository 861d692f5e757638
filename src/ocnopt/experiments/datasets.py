"""The data sets, standardized and in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.idx import read_idx
from ocnopt.experiments.problems import DatasetName

DATA_VARIABLE = "OCNOPT_DATA"
_SPLIT_SEED = 0  # one fixed split: seeds vary the training, never the task


@dataclass(frozen=True)
class Data:
    """A training and a test set.

    Attributes:
        train_x: Inputs, (N, features) or (N, channels, height, width), float32.
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
    """Load a data set by name.

    Args:
        name: `digits` and `wine` come with scikit-learn (a stratified 80/20 split, always the
            same); `mnist` and `fashion-mnist` are read from files and keep their own test sets.
        root: Folder that holds `mnist/` or `fashion-mnist/`; None takes the environment variable
            OCNOPT_DATA.

    Returns:
        The data on the CPU. Wine is standardized per feature; images as a whole, by one mean and
        one deviation, so that a pixel that never varies stays harmless. Both by the statistics of
        the training set alone.

    Raises:
        InputError: If files are missing or damaged, or scikit-learn is not installed.
    """
    if name == "digits":
        return _digits()
    if name == "wine":
        return _wine()
    return _idx_images(name, root)


def _digits() -> Data:
    bunch = _sklearn("load_digits")
    pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return _split(pixels, torch.from_numpy(bunch.target).long(), per_feature=False)


def _wine() -> Data:
    bunch = _sklearn("load_wine")
    features = torch.from_numpy(bunch.data).float()
    return _split(features, torch.from_numpy(bunch.target).long(), per_feature=True)


def _sklearn(loader: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise InputError(
            "digits and wine come with scikit-learn; pip install 'ocnopt[experiments]'"
        ) from None
    return getattr(datasets, loader)()


def _split(x: Tensor, y: Tensor, *, per_feature: bool) -> Data:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        range(len(y)), test_size=0.2, stratify=y.numpy(), random_state=_SPLIT_SEED
    )
    return _standardized(x[train], y[train], x[test], y[test], per_feature=per_feature)


def _idx_images(name: str, root: Path | None) -> Data:
    if root is None:
        variable = os.environ.get(DATA_VARIABLE)
        if not variable:
            raise InputError(
                f"{name} is read from files; say where with --data-root FOLDER or {DATA_VARIABLE}"
                f" (the folder that holds {name}/)"
            )
        root = Path(variable)
    folder = root / name
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; --data-root must be the folder that holds {name}/")
    parts: list[Tensor] = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", dims=3)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dims=1)
        if len(images) != len(labels) or not len(labels):
            raise InputError(
                f"{folder} has {len(images)} {part} images and {len(labels)} labels; fetch it again"
            )
        if int(labels.max()) > 9:
            raise InputError(f"{folder} has a {part} label above 9; fetch it again")
        parts += [images.unsqueeze(1).float() / 255, labels.long()]
    train_x, train_y, test_x, test_y = parts
    if train_x.shape[1:] != test_x.shape[1:]:
        raise InputError(f"{folder} has training and test images of two sizes; fetch it again")
    return _standardized(train_x, train_y, test_x, test_y, per_feature=False, classes=10)


def _standardized(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    per_feature: bool,
    classes: int | None = None,
) -> Data:
    mean = train_x.mean(0) if per_feature else train_x.mean()
    deviation = train_x.std(0) if per_feature else train_x.std()
    if not bool((deviation > 0).all()):
        raise InputError("the training inputs do not vary; the data cannot be standardized")
    return Data(
        train_x=(train_x - mean) / deviation,
        train_y=train_y,
        test_x=(test_x - mean) / deviation,
        test_y=test_y,
        classes=int(train_y.max()) + 1 if classes is None else classes,
    )
