"""Bytes moved are those that were planned, sparse moves less than dense, and balance is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import PAIR, RANKS, RankPool

from video_attn import BlockMask, Radial, SlidingTile, VideoLayout, VideoTokens, sliding_tile_mask
from video_attn.distributed import (
    Shards,
    balanced_shards,
    sequence_parallel_plan,
    striped_shards,
)

LAYOUT = VideoLayout((8, 4, 4), (1, 4, 4))
WINDOW = sliding_tile_mask(LAYOUT, (3, 1, 1))
PER_HEAD = BlockMask.from_dense(
    torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.3, 16, 16
)
TEXT = VideoTokens((8, 4, 4), text_length=9)
ONE_TOKEN = BlockMask.from_dense(torch.eye(8, dtype=torch.bool)[None, None], 16, 16)
CASES: dict[str, tuple[Any, int, Shards, dict[str, Any]]] = {
    "window": (WINDOW, 1, Shards.even(128, RANKS), {}),
    "window-uneven": (WINDOW, 2, Shards.of_lengths((10, 70, 0, 48)), {}),
    "window-striped": (WINDOW, 1, striped_shards(WINDOW, RANKS), {}),
    # The last token of the second block is all that a rank needs of another.
    "one-token": (ONE_TOKEN, 1, Shards.of_lengths((31, 33, 32, 32)), {}),
    "per-head": (PER_HEAD, 2, Shards.even(128, RANKS), {}),
    "text": (
        SlidingTile((3, 1, 1), (1, 4, 4)), 1, Shards.even(128, RANKS).with_text(9),
        {"tokens": TEXT},
    ),
    "few-holes": (
        SlidingTile((1, 1, 3), (2, 3, 4)), 2, Shards.even(173, RANKS),
        {"tokens": VideoTokens((4, 6, 7), text_length=5), "tile_order": True},
    ),
    "radial": (Radial(block_size=10), 1, Shards.even(137, RANKS), {"tokens": TEXT}),
    "dense": (None, 2, Shards.of_lengths((10, 70, 0, 48)), {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ulysses", "ring", "usp"])
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_planned(ranks: RankPool, name: str, kind: str) -> None:
    mask, batch, shards, options = CASES[name]
    ranks.run(RANKS, "traffic_cases:sent", mask, kind, batch, shards, **options)


def test_windows_send_less_than_dense(ranks: RankPool) -> None:
    shards = Shards.even(128, RANKS)
    sparse, dense = (
        [sent for sent, *_ in ranks.run(RANKS, "traffic_cases:sent", mask, "ring", 1, shards)]
        for mask in (WINDOW, None)
    )
    # One block to either neighbour, of two on each rank; dense: both to all three others.
    assert [n * 6 for n in sparse] == [n * k for n, k in zip(dense, (1, 2, 2, 1), strict=True)]


def test_a_ring_whose_ranks_list_only_their_own_sends_nothing(ranks: RankPool) -> None:
    keep = torch.eye(8, dtype=torch.bool)[None, None]
    mask = BlockMask.from_dense(keep, 16, 16)
    total, *_, traffic = ranks.run(
        RANKS, "traffic_cases:sent", mask, "ring", 1, Shards.even(128, RANKS)
    )[0]
    assert total == 0 and "ring: keys" not in traffic


@pytest.mark.parametrize("hot", [False, True])
def test_selected_tiles_are_all_that_moves(ranks: RankPool, hot: bool) -> None:
    for keys, wanted, dense in ranks.run(len(PAIR), "traffic_cases:selected", (8, 4, 8), hot):
        assert keys == wanted
        assert keys < 0.5 * dense if hot else keys <= dense


def test_text_does_not_pull_all_keys_to_its_owner() -> None:
    layout = VideoLayout((16, 4, 4), (1, 4, 4), text_length=9)
    with_text, without = (
        sequence_parallel_plan(
            sliding_tile_mask(x, (3, 1, 1)), 4, kind="ring", q_heads=2, head_dim=16,
            shards=Shards.even(256, 4) if x.text_length == 0 else Shards.even(256, 4).with_text(9),
        )
        for x in (layout, VideoLayout(layout.grid, layout.tile))
    )  # fmt: skip
    keys = [
        sum(n for sent in plan.forward for label, n in sent.items() if "keys" in label)
        for plan in (with_text, without)
    ]
    text = 2 * 9 * 16 * 2 * 2  # heads, tokens, channels, key and value, bytes
    assert keys[0] == keys[1] + 3 * text  # the text's keys to the three that are not their source
    assert "wide rows: queries" in with_text.forward[0]


@pytest.mark.parametrize("mask", [PER_HEAD, WINDOW, None], ids=["per-head", "window", "dense"])
@pytest.mark.parametrize(("kind", "ranks"), [("ulysses", 4), ("ring", 4), ("usp", (2, 2))])
def test_ranks_share_the_pairs_of_all_heads_and_batches(
    mask: BlockMask | None, kind: str, ranks: Any
) -> None:
    plan = sequence_parallel_plan(
        mask, ranks, kind=kind, q_heads=4, kv_heads=2, batch=3,
        shards=Shards.of_lengths((10, 70, 0, 48)),
    )  # fmt: skip
    pairs = 12 * 128**2 if mask is None else mask.flops(1, batch=3, heads=4) / 4
    assert sum(plan.pairs) == pairs


def test_balance() -> None:
    growing = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    mask = BlockMask.from_dense(growing, 8, 8)
    plans = {
        name: sequence_parallel_plan(mask, 4, kind="ring", q_heads=1, shards=shards)
        for name, shards in {
            "even": Shards.even(128, 4), "balanced": balanced_shards(mask, 4),
            "striped": striped_shards(mask, 4),
        }.items()
    }  # fmt: skip
    # 136 pairs of blocks, 34 each: even parts have 10, 26, 42, 58.
    assert plans["even"].imbalance == pytest.approx(58 / 34)
    assert plans["striped"].imbalance == pytest.approx(40 / 34)
    assert plans["balanced"].imbalance == pytest.approx(
        39 / 34
    )  # rows 12 to 14: no cut of whole blocks is better
    assert balanced_shards(mask, 4).lengths == (64, 24, 24, 16)
    assert "imbalance 1.706" in str(plans["even"])


def test_balance_of_tiles_with_padding_and_text() -> None:
    pattern, tokens = SlidingTile((3, 3, 3), (2, 3, 4)), VideoTokens((7, 8, 11), text_length=5)
    shards = balanced_shards(pattern, 3, tokens=tokens)
    assert shards.length == tokens.sequence_length and shards.is_contiguous
    even, balanced = (
        sequence_parallel_plan(
            pattern, 3, kind="ring", q_heads=1, tokens=tokens, tile_order=True, shards=chosen
        )
        for chosen in (None, shards)
    )
    assert balanced.imbalance < min(even.imbalance, 1.1)
    assert not any("tokens <-> blocks" in sent for sent in balanced.forward)
