"""Shards: who holds what, and wrong ones are refused."""

from __future__ import annotations

import pytest
import torch

from video_attn import BlockMask
from video_attn.distributed import Shards, balanced_shards, striped_shards


def test_default_is_the_rule_of_the_documentation() -> None:
    assert Shards.even(10, 4).ranges == (((0, 2),), ((2, 5),), ((5, 7),), ((7, 10),))
    assert Shards.chunked(10, 4).lengths == (3, 3, 3, 1)
    assert Shards.chunked(5, 4).lengths == (2, 2, 1, 0)
    assert Shards.even(2, 4).lengths == (0, 1, 0, 1)


def test_text_on_every_rank() -> None:
    video = Shards.even(6, 2)
    assert video.with_text(2).ranges == (((0, 3), (6, 8)), ((3, 6), (6, 8)))
    assert video.with_text(2, text_first=True).ranges == (((0, 2), (2, 5)), ((0, 2), (5, 8)))
    assert video.with_text(2).length == 8


def test_take_and_join_are_inverse() -> None:
    shards = Shards((((0, 2), (5, 7)), (), ((2, 5), (0, 1))))
    x = torch.randn(2, 7, 3)
    parts = [shards.take(x, rank) for rank in range(3)]
    assert [p.shape[1] for p in parts] == list(shards.lengths) == [4, 0, 4]
    assert torch.equal(shards.join(parts), x)
    assert not shards.is_contiguous and Shards.of_lengths((3, 0, 4)).is_contiguous


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ((), "an entry for each rank"),
        ((((0, 4),), ((5, 6),)), "leave tokens 4 to 4 to no rank"),
        ((((0, 4), (3, 6)),), "ranges of rank 0 overlap at token 3"),
        ((((4, 2),),), "0 <= start <= stop"),
    ],
)
def test_refusals(ranges: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shards(ranges)


def test_refusals_of_makers() -> None:
    with pytest.raises(ValueError, match="ranks must be >= 1, got 0"):
        Shards.even(4, 0)
    with pytest.raises(TypeError, match="lengths must be an int, got 1.5"):
        Shards.of_lengths([1.5])  # type: ignore[list-item]
    oblong = BlockMask.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool), 4, 4)
    for make in (balanced_shards, striped_shards):
        with pytest.raises(ValueError, match="same blocks for queries and keys"):
            make(oblong, 2)
    with pytest.raises(ValueError, match="x has 3 tokens on dim 1, but shards 4"):
        Shards.even(4, 2).take(torch.zeros(1, 3, 2), 0)
