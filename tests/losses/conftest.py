"""Everything here is compared to rounding."""

import pytest


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test of the folder."""
