"""The tiny models of diffusers, made once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_models import MODELS, Tiny

import video_attn.sparsity as mtsa


@pytest.fixture(scope="session")
def built() -> dict[str, Any]:
    return {}


@pytest.fixture
def model_of(built: dict[str, Any]) -> Iterator[Any]:
    """Makes each tiny model once; what a test did to it is undone."""

    def model(name: str) -> tuple[Tiny, Any]:
        if name not in built:
            built[name] = MODELS[name].model()
        return MODELS[name], built[name]

    yield model
    for made in built.values():
        mtsa.unsparsify(made)
        assert not mtsa.is_attn_sparsified(made)
