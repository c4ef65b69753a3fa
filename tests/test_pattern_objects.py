"""SlidingTile, VideoSparse, Radial, Dense: what they compute, never read, and refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from token_masks import raster_coordinates, sliding_tile_tokens
from torch import Tensor

import video_attn
from video_attn import Dense, Radial, RadialRule, Scenes, SlidingTile, VideoSparse, VideoTokens

GRID, TEXT, HEADS, DIM = (3, 4, 5), 9, 2, 16
TILE = (2, 2, 2)
PATTERNS: dict[str, Any] = {
    "sliding_tile": SlidingTile((1, 1, 2), TILE),
    "windows_per_head": SlidingTile([(1, 1, 2), (2, 2, 1)], TILE),
    "video_sparse": VideoSparse(top_k_ratio=0.4, tile=TILE),
    "radial": Radial(RadialRule(decay_factor=0.2, split_width=0, min_window=2), block_size=4),
    "rules_per_head": Radial([RadialRule(decay_factor=0.1, split_width=0), "dense"], block_size=4),
    "dense": Dense(),
}


def tensors(tokens: VideoTokens, *, bshd: bool = False, batch: int = 2) -> list[Tensor]:
    """q, k, v as views [B, H, S, D], heads or tokens neighbours in memory."""
    torch.manual_seed(0)
    if bshd:
        shape = (batch, tokens.sequence_length, HEADS, DIM)
        return [torch.randn(shape).transpose(1, 2) for _ in range(3)]
    return [torch.randn(batch, HEADS, tokens.sequence_length, DIM) for _ in range(3)]


def expected(name: str, q: Tensor, k: Tensor, v: Tensor, tokens: VideoTokens) -> Tensor:
    """By the functions for models."""
    pattern, text = PATTERNS[name], {"text_length": tokens.valid_text}
    text["text_first"] = tokens.text_first
    if isinstance(pattern, SlidingTile):
        windows = pattern.windows if len(pattern.windows) > 1 else pattern.windows[0]
        return video_attn.sliding_tile(q, k, v, GRID, windows, tile=TILE, **text)
    if isinstance(pattern, VideoSparse):
        return video_attn.video_sparse(q, k, v, GRID, top_k_ratio=0.4, tile=TILE, gate=0.0, **text)
    if isinstance(pattern, Radial):
        rules = pattern.rule if isinstance(pattern.rule, tuple) else (pattern.rule,) * HEADS
        heads = [
            video_attn.attention(*(x[:, h : h + 1] for x in (q, k, v)), Dense().mask(tokens))
            if rule == "dense"
            else video_attn.radial(
                *(x[:, h : h + 1] for x in (q, k, v)), GRID, rule=rule, block_size=4, **text
            )
            for h, rule in enumerate(rules)
        ]
        return torch.cat(heads, 1)
    return video_attn.attention(q, k, v, pattern.mask(tokens))


@pytest.mark.parametrize("bshd", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_attend_is_the_function_for_models(name: str, bshd: bool) -> None:
    for tokens in (VideoTokens(GRID), VideoTokens(GRID, TEXT, text_first=True)):
        q, k, v = tensors(tokens, bshd=bshd)
        out = PATTERNS[name].attend(q, k, v, tokens)
        torch.testing.assert_close(out, expected(name, q, k, v, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_padded_text_is_never_read(name: str) -> None:
    """NaN in every padded token; lengths as numbers and as a tensor."""
    valid, pattern = (TEXT, 4), PATTERNS[name]
    for said in (valid, torch.tensor(valid)):
        tokens = VideoTokens(GRID, TEXT, valid_text=said)
        q, k, v = tensors(tokens)
        clean = pattern.attend(q, k, v, tokens)
        for x in (q, k, v):
            x[1, :, 60 + 4 :] = torch.nan
        out = pattern.attend(q, k, v, tokens)
        assert torch.equal(out[:, :, :60], clean[:, :, :60]) and out.isfinite().all()
        assert out[1, :, 64:].count_nonzero() == 0
        short = VideoTokens(GRID, 4)
        one = pattern.attend(*(x[1:, :, :64] for x in (q, k, v)), short)
        if name != "radial" and name != "rules_per_head":  # blocks end elsewhere there
            torch.testing.assert_close(out[1:, :, :64], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_gradients_and_heads(name: str) -> None:
    """Of all three tensors; and heads one by one are the heads together."""
    tokens, pattern = VideoTokens(GRID, TEXT), PATTERNS[name]
    inputs = [x.requires_grad_() for x in tensors(tokens)]
    pattern.attend(*inputs, tokens).square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.count_nonzero() for x in inputs)
    q, k, v = (x.detach() for x in inputs)
    whole = pattern.attend(q, k, v, tokens)
    for head in range(HEADS):
        part = (x[:, head : head + 1] for x in (q, k, v))
        one = pattern.of_heads(head, head + 1).attend(*part, tokens)
        torch.testing.assert_close(one, whole[:, head : head + 1], rtol=1e-5, atol=1e-5)
    pattern.check_heads(HEADS)
    assert 0 < pattern.density(tokens, HEADS) <= 1


def test_density_is_of_the_tokens_that_are_there() -> None:
    tokens = VideoTokens(GRID)
    keep = sliding_tile_tokens(raster_coordinates(GRID), GRID, TILE, [(1, 1, 2)])
    assert SlidingTile((1, 1, 2), TILE).density(tokens) == pytest.approx(float(keep.float().mean()))
    assert Dense().density(tokens) == 1 and VideoSparse(1.0, tile=TILE).density(tokens) == 1
    assert VideoSparse(top_k=10**6, tile=TILE).density(tokens) == 1


def test_gates() -> None:
    """auto: the gate of the call, none without one; None: the coarse branch as it is."""
    tokens = VideoTokens(GRID, TEXT, text_first=True)
    q, k, v = tensors(tokens)
    gate = torch.rand(2, HEADS, 60, DIM)  # of the video alone
    whole = torch.cat([torch.zeros(2, HEADS, TEXT, DIM), gate], 2)

    def by_function(weight: Any) -> Tensor:
        return video_attn.video_sparse(
            q, k, v, GRID, top_k_ratio=0.4, tile=TILE, gate=weight, text_first=True
        )

    auto = VideoSparse(0.4, tile=TILE)
    for got, weight in (
        (auto.attend(q, k, v, tokens, gate=gate), whole),
        (auto.attend(q, k, v, tokens), 0.0),
        (VideoSparse(0.4, tile=TILE, gate=None).attend(q, k, v, tokens, gate=gate), None),
        (VideoSparse(0.4, tile=TILE, gate=0.5).attend(q, k, v, tokens, gate=gate), 0.5),
    ):
        torch.testing.assert_close(got, by_function(weight), rtol=1e-5, atol=1e-5)


def test_they_are_values() -> None:
    for pattern in PATTERNS.values():
        twin = pickle.loads(pickle.dumps(pattern))
        assert twin == pattern == copy.deepcopy(pattern) and hash(twin) == hash(pattern)
        with pytest.raises(AttributeError):
            pattern.tile = (1, 1, 1)


@pytest.mark.parametrize("make, error_type, words", [
    (lambda: SlidingTile((0, 1, 1)), ValueError, "window must be three integers >= 1"),
    (lambda: SlidingTile([]), ValueError, "window must be one"),
    (lambda: SlidingTile((1, 1, 1), (0, 8, 8)), ValueError, "tile must be three integers"),
    (lambda: VideoSparse(), ValueError, "top_k or top_k_ratio must be given, and not both"),
    (lambda: VideoSparse(1.5), ValueError, r"top_k_ratio must be in \(0, 1\]"),
    (lambda: VideoSparse(top_k=0), ValueError, "top_k must be 1 to"),
    (lambda: VideoSparse(0.5, gate="learned"), TypeError, "gate must be None, a number or a"),
    (lambda: VideoSparse(0.5, gate=torch.ones(1)), TypeError, "tensors come with a call"),
    (lambda: VideoSparse(0.5, score_dtype=torch.int8), TypeError, "score_dtype must be None"),
    (lambda: Radial("radial"), TypeError, "rule must be a RadialRule, None, or"),
    (lambda: Radial([]), ValueError, "rule must be a RadialRule or one per query head"),
    (lambda: Radial(block_size=0), ValueError, "block_size must be >= 1, got 0"),
    (lambda: Radial(block_size=8.0), TypeError, "block_size must be an int"),
    (lambda: Radial(scenes=[0, 9]), TypeError, "scenes must be a Scenes or None, got list"),
    (lambda: VideoTokens((3, 4)), ValueError, "grid must be three integers"),
    (lambda: VideoTokens(GRID, -1), ValueError, "text_length must be >= 0"),
    (lambda: VideoTokens(GRID, 3, valid_text=4), ValueError, "text_length must be 0 to 3"),
])  # fmt: skip
def test_wrong_patterns_are_refused(make: Any, error_type: type[Exception], words: str) -> None:
    with pytest.raises(error_type, match=words):
        make()


@pytest.mark.parametrize("name", PATTERNS)
def test_wrong_calls_are_refused(name: str) -> None:
    pattern, tokens = PATTERNS[name], VideoTokens(GRID, TEXT)
    q, k, v = tensors(VideoTokens(GRID))
    with pytest.raises(ValueError, match=r"query has 60 tokens, but the video of \(3, 4, 5\)"):
        pattern.attend(q, k, v, tokens)
    with pytest.raises(TypeError, match="wrong"):
        pattern.attend(q, k, v, VideoTokens(GRID), wrong=1)
    if name.endswith("per_head"):
        with pytest.raises(ValueError, match="per query head"):
            pattern.check_heads(3)
    first = VideoTokens(GRID, TEXT, text_first=True, valid_text=4)
    if name in ("radial", "dense"):
        with pytest.raises(ValueError, match="invalid tokens in the middle cannot be left out"):
            pattern.attend(*tensors(first), first)


def test_scenes_limit_a_pattern_of_frames() -> None:
    tokens = VideoTokens(GRID)
    scenes = Scenes([0, 1, 3], [[True, False], [False, True]], unit="latent")
    out = Radial(RadialRule(split_width=0), 4, scenes)
    q, k, v = tensors(tokens)
    v[:, :, 20:] = 0  # the second scene
    assert out.attend(q, k, v, tokens)[:, :, 24:].count_nonzero() == 0
