"""DTensors in, DTensors out; other placements are refused with what to do."""

from __future__ import annotations

import pytest
from rank_pool import PAIR, RANKS, RankPool


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize(("layout", "dim"), [("bhsd", 2), ("bshd", 1), ("bhsd", 1), ("bshd", 2)])
def test_like_one_process(ranks: RankPool, layout: str, dim: int, kind: str) -> None:
    size = RANKS if dim == 2 else len(PAIR)
    ranks.run(size, "dtensor_cases:like_one_process", layout, dim, kind)


def test_refusals(ranks: RankPool) -> None:
    plain, other, whole, channels, group = ranks.run(len(PAIR), "dtensor_cases:refusals")[0]
    assert plain == "TypeError: k must be a DTensor like the others, got Tensor"
    assert other.startswith("ValueError: k must have the mesh and placements of q")
    assert "sharded over the sequence or the heads, got placements (Replicate(),)" in whole
    assert "Shard(2), or over the heads, Shard(1)" in channels
    assert group.startswith("ValueError: group must be None or the mesh of q")
