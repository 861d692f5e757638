"""What data sets there are; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

from ocnopt.experiments.data.density_sets import DENSITIES
from ocnopt.experiments.data.describe import DataSet, Download
from ocnopt.experiments.data.series_sets import SERIES
from ocnopt.experiments.problems import DatasetName

__all__ = ["DENSITIES", "IDX_FILES", "SERIES", "SETS", "DataSet", "Download", "all_sets"]

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _downloads(
    names: tuple[str, ...],
    mirrors: tuple[str, ...],
    md5s: tuple[str, ...],
    sizes: tuple[int, ...],
) -> tuple[Download, ...]:
    return tuple(
        Download(name, tuple(mirror + name for mirror in mirrors), f"md5:{md5}", size)
        for name, md5, size in zip(names, md5s, sizes, strict=True)
    )


_DIGITS = DataSet(
    name="digits",
    title="handwritten digits, small",
    train=1437,
    test=360,
    shape=(1, 8, 8),
    classes=10,
    layout="comes with scikit-learn; a stratified split of 80/20, always the same",
    licence="CC BY 4.0",
    citation="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
    origin="scikit-learn",
)

_WINE = DataSet(
    name="wine",
    title="chemical analyses of wines",
    train=142,
    test=36,
    shape=(13,),
    classes=3,
    layout="comes with scikit-learn; a stratified split of 80/20, always the same",
    licence="CC BY 4.0",
    citation="Aeberhard and Forina, Wine, UCI, 1991",
    origin="scikit-learn",
)

_CLUSTERS = DataSet(
    name="clusters",
    title="Gaussian clusters",
    train=1200,
    test=300,
    shape=(30,),
    classes=12,
    layout="generated; the same at every call",
    licence="none needed",
    citation="after Fig. 8 of Liu, Chen and Theodorou, DDPNOpt, ICLR 2021",
    origin="generated",
)

_MNIST = DataSet(
    name="mnist",
    title="handwritten digits",
    train=60_000,
    test=10_000,
    shape=(1, 28, 28),
    classes=10,
    layout="IDX files, gzip-compressed or not; the publisher's test set",
    licence="CC BY-SA 3.0",
    citation="LeCun, Bottou, Bengio and Haffner, Proc. IEEE 86, 1998",
    folder="mnist",
    files=IDX_FILES,
    downloads=_downloads(
        IDX_FILES,
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        (9_912_422, 28_881, 1_648_877, 4_542),
    ),
)

_FASHION_MNIST = DataSet(
    name="fashion-mnist",
    title="articles of clothing",
    train=60_000,
    test=10_000,
    shape=(1, 28, 28),
    classes=10,
    layout="IDX files, gzip-compressed or not; the publisher's test set",
    licence="MIT",
    citation="Xiao, Rasul and Vollgraf, arXiv:1708.07747, 2017",
    folder="fashion-mnist",
    files=IDX_FILES,
    downloads=_downloads(
        IDX_FILES,
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        (26_421_880, 29_515, 4_422_102, 5_148),
    ),
)

_CIFAR_10 = DataSet(
    name="cifar-10",
    title="small photographs",
    train=50_000,
    test=10_000,
    shape=(3, 32, 32),
    classes=10,
    layout="the binary version: records of a label byte and 3072 bytes, channel first",
    licence="none stated; its authors ask to be cited",
    citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    folder="cifar-10-batches-bin",
    files=(*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
    downloads=_downloads(
        ("cifar-10-binary.tar.gz",),
        (
            "https://www.cs.toronto.edu/~kriz/",
            "https://cave.cs.toronto.edu/kriz/",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
        ),
        ("c32a1d4ab5d03f1284b67883e8d87530",),
        (170_052_171,),
    ),
)

_SVHN = DataSet(
    name="svhn",
    title="house numbers, one digit each",
    train=73_257,
    test=26_032,
    shape=(3, 32, 32),
    classes=10,
    layout="MATLAB files of cropped digits: X 32x32x3xN, y Nx1 with 10 for the digit 0",
    licence="for non-commercial use only",
    citation="Netzer et al., NIPS Workshop on Deep Learning, 2011",
    folder="svhn",
    files=("train_32x32.mat", "test_32x32.mat"),
    downloads=_downloads(
        ("train_32x32.mat", "test_32x32.mat"),
        ("http://ufldl.stanford.edu/housenumbers/", "https://ufldl.stanford.edu/housenumbers/"),
        ("e26dedcc434d2e4c54c9b2d4a06d8373", "eb5a983be6a315427106f1b164d9cef3"),
        (182_040_794, 64_275_384),
    ),
)

#: Sets to train a classifier on.
SETS: Mapping[DatasetName, DataSet] = {
    "digits": _DIGITS,
    "wine": _WINE,
    "clusters": _CLUSTERS,
    "mnist": _MNIST,
    "fashion-mnist": _FASHION_MNIST,
    "cifar-10": _CIFAR_10,
    "svhn": _SVHN,
    **SERIES,
}


def all_sets() -> dict[str, DataSet]:
    """Return every set that has a name, those without classes last."""
    return {facts.name: facts for facts in (*SETS.values(), *DENSITIES.values())}
