"""diffusers' context parallelism with apply(): four ranks give what one gives."""

from __future__ import annotations

import pytest
from rank_pool import RANKS, RankPool


@pytest.mark.parametrize(
    ("degrees", "pattern"),
    [
        ("ulysses", "sliding_per_head"), ("ulysses", "groups"), ("ring", "sliding"),
        ("ring", "selected"), ("usp", "radial"), ("usp", "sliding_per_head"),
    ],
)  # fmt: skip
def test_wan(ranks: RankPool, degrees: str, pattern: str) -> None:
    ranks.run(RANKS, "diffusers_cases:wan", degrees, pattern)


@pytest.mark.parametrize("pattern", ["sliding", "selected"])
def test_ltx2(ranks: RankPool, pattern: str) -> None:
    ranks.run(RANKS, "diffusers_cases:ltx2", pattern)


def test_pipelines(ranks: RankPool) -> None:
    """Two groups of two ranks."""
    ranks.run(RANKS, "diffusers_cases:wan_pipeline", "sliding")
    ranks.run(RANKS, "diffusers_cases:ltx2_pipeline")


def test_dense_layers(ranks: RankPool) -> None:
    ranks.run(RANKS, "diffusers_cases:dense_layers")
