"""A pipeline to change."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def pipe() -> Any:
    """A Wan pipeline, the test's own."""
    from tiny_wan import tiny_wan  # here: not every test of the folder needs diffusers

    return tiny_wan()
