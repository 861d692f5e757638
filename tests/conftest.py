"""What tests of several folders share; the oracles are importable under every import mode."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
for folder in (TESTS / "oracle", TESTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture
def exact():
    """Exact arithmetic up to rounding: float64, one seed per test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
