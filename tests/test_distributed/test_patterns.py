"""Every pattern on several ranks equals one process, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
from rank_pool import PAIR, RANKS, RankPool

from video_attn import Dense, Radial, Scenes, SlidingTile, VideoSparse, VideoTokens

TILE = (2, 3, 4)
PLAIN = VideoTokens((4, 3, 8))
RAGGED = VideoTokens((3, 5, 7), text_length=13, valid_text=7)
TEXT = VideoTokens((3, 5, 7), text_length=5)
FEW_HOLES = VideoTokens((4, 6, 7), text_length=5)  # padding of tiles travels by Ulysses
TEXT_FIRST = VideoTokens((4, 4, 5), text_length=9, text_first=True)
PER_ITEM = VideoTokens((3, 5, 5), text_length=11, valid_text=(11, 4))
SCENES = Scenes((0, 2, 4), ((True, False), (True, True)), unit="latent")
KINDS = ("ulysses", "ring", "usp")
CASES: dict[str, tuple[Any, VideoTokens, str, dict[str, Any]]] = {
    "sliding": (SlidingTile((3, 1, 3), TILE), PLAIN, "even", {}),
    "sliding-text": (SlidingTile((1, 3, 1), TILE), RAGGED, "random", {"layout": "bshd"}),
    "sliding-per-head": (
        SlidingTile(((1, 1, 1), (3, 3, 3), (1, 3, 1), (3, 1, 1)), TILE), RAGGED, "scattered",
        {"heads": 4, "kv_heads": 2},
    ),
    "sliding-in-tile-order": (SlidingTile((1, 1, 3), TILE), TEXT, "random", {"tile_order": True}),
    "sliding-few-holes": (
        SlidingTile((1, 1, 3), TILE), FEW_HOLES, "random", {"tile_order": True, "batch": 2},
    ),
    "sliding-batch": (SlidingTile((1, 3, 1), TILE), PER_ITEM, "even", {"batch": 2}),
    "radial": (Radial(block_size=16), PLAIN, "even", {"heads": 5, "kv_heads": 5}),
    "radial-text-first": (Radial(block_size=20), TEXT_FIRST, "text everywhere", {"heads": 2,
                                                                              "kv_heads": 1}),
    "scenes": (
        Radial(block_size=16, scenes=SCENES), TEXT_FIRST, "random", {"heads": 2, "kv_heads": 2},
    ),
    "dense": (Dense(), PLAIN, "random", {}),
    "dense-valid": (Dense(), PER_ITEM, "even", {"batch": 2}),
    "selected": (VideoSparse(top_k=2, tile=TILE, gate=0), PLAIN, "even", {}),
    "selected-short-end": (
        VideoSparse(top_k=2, tile=TILE, gate=None), VideoTokens((4, 3, 8), text_length=5), "even",
        {},
    ),
    "selected-coarse": (VideoSparse(top_k_ratio=0.3, tile=TILE, gate=None), RAGGED, "random", {}),
    "selected-gate": (
        VideoSparse(top_k=3, tile=TILE), RAGGED, "text everywhere",
        {"gate": "tensor", "layout": "bshd", "heads": 4, "kv_heads": 2},
    ),
    "selected-head-gate": (VideoSparse(top_k=3, tile=TILE), TEXT, "scattered", {"gate": "heads"}),
    "selected-in-tile-order": (VideoSparse(top_k=2, tile=TILE), RAGGED, "text everywhere",
        {"tile_order": True, "gate": "tensor"}),
    "selected-few-holes": (
        VideoSparse(top_k=2, tile=TILE), FEW_HOLES, "even",
        {"tile_order": True, "gate": "tensor", "heads": 4, "kv_heads": 2},
    ),
    "selected-batch": (
        VideoSparse(top_k=2, tile=TILE), PER_ITEM, "even",
        {"batch": 2, "gate": "number", "head_chunks": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_like_one_process(ranks: RankPool, name: str, kind: str) -> None:
    pattern, tokens, how, options = CASES[name]
    index = list(CASES).index(name)
    size = RANKS if kind == "usp" or index % 2 else len(PAIR)
    options = {"head_chunks": (None, 2, 3)[index % 3], **options}
    ranks.run(size, "pattern_cases:pattern", pattern, tokens, kind, how, **options)
