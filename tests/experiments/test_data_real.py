"""The published data sets themselves, where OCNOPT_DATA names a folder that has them."""

import gzip
import hashlib
import os
from pathlib import Path

import pytest
import torch

from ocnopt.experiments import datasets
from ocnopt.experiments.data.locate import find_files, missing_files
from ocnopt.experiments.data.series import check_published, lengths, load_series
from ocnopt.experiments.data.sets import DENSITIES, SERIES, SETS
from ocnopt.experiments.data.tabular import load_density

VARIABLE = os.environ.get("OCNOPT_DATA")
pytestmark = pytest.mark.skipif(not VARIABLE, reason="OCNOPT_DATA is not set")

# Of the unpacked bytes: a gzip wrapper can differ between copies that are the same.
MD5 = {
    "mnist": (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    "fashion-mnist": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}
COUNTS = {
    "mnist": (
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ),
    "fashion-mnist": ([6000] * 10, [1000] * 10),
    "cifar-10": ([5000] * 10, [1000] * 10),
    "svhn": (
        [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659],
        [1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595],
    ),
}


@pytest.fixture(params=list(COUNTS))
def name(request):
    missing = missing_files(SETS[request.param], Path(VARIABLE))
    if missing:
        pytest.skip(f"no {missing[0]} of {request.param} in OCNOPT_DATA")
    return request.param


def test_it_is_as_described(name):
    data, facts = datasets.load(name), SETS[name]
    assert (len(data.train_x), len(data.test_x)) == (facts.train, facts.test)
    assert (data.shape, data.classes) == (facts.shape, facts.classes)
    assert (data.train_y.bincount().tolist(), data.test_y.bincount().tolist()) == COUNTS[name]
    dims = (0, 2, 3) if facts.shape[0] > 1 else (0, 1, 2, 3)
    mean, deviation = data.train_x.mean(dims), data.train_x.std(dims)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", list(MD5), indirect=True)
def test_unpacked_bytes_are_the_publishers(name):
    found = []
    for path in find_files(SETS[name], Path(VARIABLE)):
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        found.append(hashlib.md5(raw).hexdigest())
    assert tuple(found) == MD5[name]


@pytest.fixture(params=list(SERIES))
def series(request):
    missing = missing_files(SERIES[request.param], Path(VARIABLE))
    if missing:
        pytest.skip(f"no {missing[0]} of {request.param} in OCNOPT_DATA")
    return request.param


def test_series_are_as_described(series):
    facts = SERIES[series]
    check_published(find_files(facts, Path(VARIABLE))[0].parent, facts)
    parts = load_series(series)
    data = datasets.load(series)
    assert (len(data.train_x), len(data.test_x)) == (facts.train, facts.test)
    assert (data.shape, data.classes) == (facts.shape, facts.classes)
    everything = torch.cat((data.train_y, data.test_y)).bincount(minlength=facts.classes)
    for x, y in (parts.train, parts.validation, parts.test):
        share = len(y) / everything.sum()
        assert float((y.bincount(minlength=facts.classes) - share * everything).abs().max()) <= 1
        longest = x.isfinite().all(-1)
        assert torch.equal(longest.sum(-1), lengths(x))
        assert torch.equal(
            longest.sort(-1, descending=True).values, longest
        )  # padding is at the end
    d = facts.shape[1] // 2
    x = parts.train[0][parts.train[0].isfinite().all(-1)].double()
    torch.testing.assert_close(x[:, d + 1 :].mean(0), torch.zeros(d).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(x[:, d + 1 :].std(0), torch.ones(d).double(), atol=1e-4, rtol=0)
    assert float(x[:, : d + 1].min()) == 0 and float(x[:, : d + 1].max()) == 1


@pytest.mark.parametrize("name", list(DENSITIES))
def test_tables_are_as_described(name):
    facts = DENSITIES[name]
    if missing_files(facts, Path(VARIABLE)):
        pytest.skip(f"no {name} in OCNOPT_DATA")
    found = load_density(name)
    assert (len(found.train) + len(found.validation), len(found.test)) == (facts.train, facts.test)
    assert found.train.shape[1:] == facts.shape
