"""Whether tensors are finite, however great or small their entries and their number."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt.finite import all_finite, finite_blocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1.0, "max"))
def test_finite(dtype, size):
    """Entries whose squares overflow are finite all the same."""
    size = torch.finfo(dtype).max if size == "max" else size
    tensors = [torch.full((3, 4), size, dtype=dtype), torch.full((5,), -size, dtype=dtype)]
    assert all_finite(tensors)
    assert finite_blocks(tensors[0]).tolist() == [True] * 3


@pytest.mark.parametrize(("dtype", "bad", "size"), itertools.product(DTYPES, BAD, (1.0, "max")))
def test_one_entry_is_not(dtype, bad, size):
    size = torch.finfo(dtype).max if size == "max" else size
    tensors = [torch.full((3, 4, 2), size, dtype=dtype) for _ in range(3)]
    tensors[1][2, 3, 1] = bad
    assert not all_finite(tensors)
    assert finite_blocks(tensors[1]).tolist() == [True, True, False]


def test_nothing_and_empty():
    assert all_finite([])
    assert all_finite([torch.zeros(0), torch.zeros(2, 0)])
    assert not all_finite([torch.zeros(0), torch.tensor(math.nan)])


def test_of_several_types():
    mixed = [torch.ones(2, dtype=dtype) for dtype in DTYPES]
    assert all_finite(mixed)
    mixed[3][0] = math.inf
    assert not all_finite(mixed)


def test_sparse():
    dense = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert all_finite([dense.to_sparse()])
    dense[0, 1] = math.inf
    assert not all_finite([dense.to_sparse()])
    # Finite each, but added up they are not.
    index, great = torch.tensor([[0, 0], [1, 1]]), torch.full((2,), 3e38)
    assert not all_finite([torch.sparse_coo_tensor(index, great, (2, 2), check_invariants=True)])


@given(st.lists(st.floats(width=32), max_size=40))
def test_as_entry_by_entry(values):
    found = torch.tensor(values, dtype=torch.float32)
    assert all_finite([found]) == bool(found.isfinite().all())
