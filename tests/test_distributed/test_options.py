"""Heads, precisions, determinism, backends and refusals of calls on several ranks."""

from __future__ import annotations

import pytest
import torch
from rank_pool import PAIR, RANKS, RankPool

from video_attn.distributed import sequence_parallel_attention, sequence_parallel_plan

REFUSALS = (
    "kind must be one of ulysses, ring, usp; got 'spiral'",
    "group must be a two-dimensional DeviceMesh",
    "head_chunks must be an int >= 1 or None, got 0",
    "mask must be a BlockMask, a pattern",
    "is_causal is for dense attention",
    "gate is for VideoSparse",
    "tile_order is for SlidingTile and VideoSparse",
    "shards has 3 ranks, but the group 2",
    "shards has 90 tokens, but mask has 96",
    "layout must be 'bhsd' or 'bshd', got 'sbhd'",
    "timeout must be a number of seconds > 0, got 0",
    "abacus",
)


@pytest.mark.parametrize(
    "case", ["heads", "repeats", "half_precision", "quantized", "backends", "compiled", "unchecked"]
)
def test_options(ranks: RankPool, case: str) -> None:
    ranks.run(RANKS if case in ("heads", "repeats") else len(PAIR), f"option_cases:{case}")


def test_refusals(ranks: RankPool) -> None:
    messages = ranks.run(len(PAIR), "option_cases:refusals")[0]
    for message, expected in zip(messages, REFUSALS, strict=True):
        assert expected in message


def test_without_a_process_group() -> None:
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group first"):
        sequence_parallel_attention(x, x, x)


def test_plans_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="shards must be given for dense attention"):
        sequence_parallel_plan(None, 2, q_heads=1)
    with pytest.raises(ValueError, match=r"ranks must be \(ring, Ulysses\) for 'usp'"):
        sequence_parallel_plan(None, 4, kind="usp", q_heads=1)
