"""Tests of this folder run where the C++ component is built."""

import pytest
from problems import require_backend


@pytest.fixture(autouse=True, scope="module")
def _backend_is_here() -> None:
    require_backend("cpu")
