"""Radial masks: the closed form against the definition, the published figures, the options."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from radial_cases import blocks_of, layout_of, ours, rule_of
from radial_oracle import Definition, block_mask, frame_pair, published_block_mask, token_mask

from video_attn import VideoLayout
from video_attn.patterns.radial import (
    RadialRule,
    density_by_distance,
    frame_density,
    frame_windows,
    radial_mask,
)

# What must not go wrong: one token, one frame, blocks larger than frames or than all, frames that
# start at block borders and one beside them, text that fills blocks or does not, every option.
CHOSEN = [
    Definition(frames=1, tokens=1, block=1),
    Definition(frames=1, tokens=7, block=16),
    Definition(frames=5, tokens=1, block=3, text=2),
    Definition(frames=6, tokens=3, block=8, text=5, text_first=True),
    Definition(frames=4, tokens=16, block=8),
    Definition(frames=4, tokens=17, block=8),
    Definition(frames=4, tokens=15, block=8, text=8),
    Definition(frames=4, tokens=15, block=8, text=9, text_first=True),
    Definition(frames=5, tokens=20, block=1, split=0),
    Definition(frames=5, tokens=33, block=8, split=0, decay=0.3),
    Definition(frames=5, tokens=33, block=8, split=0, decay=1e9),
    Definition(frames=5, tokens=33, block=8, split=0, min_window=0, decay=0.01),
    Definition(frames=5, tokens=33, block=8, split=0, min_window=2, decay=0.01, text=3),
    Definition(frames=5, tokens=33, block=8, split=0, neighbor=0.5),
    Definition(frames=5, tokens=33, block=8, split=0, neighbor=0.01),
    Definition(frames=5, tokens=33, block=8, split=0, sink=1),
    Definition(frames=5, tokens=33, block=8, split=0, sink=9),
    Definition(frames=9, tokens=33, block=8, split=16, sink=1),
    Definition(frames=9, tokens=33, block=8, split=64),
    Definition(frames=9, tokens=7, block=4, split=128),
    Definition(frames=3, tokens=129, block=32, text=70, text_first=True),
    Definition(frames=3, tokens=129, block=48, text=70),
]  # fmt: skip


def random_definitions(count: int) -> list[Definition]:
    choose = random.Random(20250614)
    definitions = []
    for _ in range(count):
        block = choose.choice((1, 3, 4, 8, 12, 16, 32))
        tokens = choose.randint(1, 48)
        definitions.append(
            Definition(
                frames=choose.randint(1, max(1, min(10, 240 // tokens))),
                tokens=tokens,
                block=max(block, 4) if tokens > 16 else block,
                text=choose.choice((0, 0, 1, choose.randint(1, 40))),
                text_first=choose.random() < 0.5,
                decay=choose.choice((0.05, 0.2, 0.5, 1.0, 1.7, 4)),
                neighbor=choose.choice((1.0, 0.5, 0.25)),
                min_window=choose.choice((None, None, 0, 1, 5)),
                split=choose.choice((0, 8, 16, 128)),
                sink=choose.choice((0, 0, 1, 2)),
                pooling=choose.choice(("majority", "majority", "cover")),
            )
        )
    return definitions


DEFINITIONS = CHOSEN + random_definitions(60)


def name_of(definition: Definition) -> str:
    text = (
        f"-{'text+' if definition.text_first else '+'}{definition.text}" if definition.text else ""
    )
    return f"{definition.frames}x{definition.tokens}-b{definition.block}{text}-{definition.pooling}"


@pytest.mark.parametrize("definition", DEFINITIONS, ids=name_of)
def test_mask_equals_the_definition(definition: Definition) -> None:
    mask = ours(definition)
    assert torch.equal(blocks_of(mask), block_mask(definition))
    tokens = mask.to_token_mask()[0, 0]
    assert tokens.shape == (definition.length, definition.length)
    assert tokens.any(1).all() and tokens.any(0).all()
    defined = token_mask(definition)
    for i in range(definition.length):
        if definition.frame_of(i) is None:
            assert tokens[i].all() and tokens[:, i].all()
    if definition.pooling == "cover":
        assert (tokens >= defined).all()


@pytest.mark.parametrize("definition", DEFINITIONS, ids=name_of)
def test_no_frame_loses_its_own_tokens(definition: Definition) -> None:
    """Every token sees all of its own frame, tails included; so does the sink, if there is one."""
    density = frame_density(layout_of(definition), ours(definition))
    assert torch.equal(density.diagonal(), torch.ones(definition.frames).double())
    assert (density[:, : definition.sink] == 1).all()


@pytest.mark.parametrize("definition", DEFINITIONS[:40], ids=name_of)
def test_windows_and_densities_of_frame_pairs(definition: Definition) -> None:
    layout = layout_of(definition)
    windows = frame_windows(layout, rule_of(definition), definition.block)
    mask = ours(definition)
    density = frame_density(layout, mask)
    tokens = mask.to_token_mask()[0, 0]
    start, s = definition.video_start, definition.tokens
    position = torch.arange(s)
    for i in range(definition.frames):
        for j in range(definition.frames):
            within = (position[:, None] - position).abs() <= windows[i, j]
            assert torch.equal(within, frame_pair(definition, i, j))
            pair = tokens[start + i * s :, start + j * s :][:s, :s]
            assert density[i, j].item() == pytest.approx(pair.double().mean().item(), abs=1e-12)
    by_distance = density_by_distance(density)
    frames = torch.arange(definition.frames)
    for d in range(definition.frames):
        at = (frames[:, None] - frames).abs() == d
        assert by_distance[d].item() == pytest.approx(density[at].mean().item(), abs=1e-12)


@pytest.mark.parametrize("frames, tokens, block, text", [
    (4, 32, 8, 0), (4, 37, 8, 11), (6, 20, 16, 13), (3, 50, 16, 40), (5, 29, 12, 24),
    (7, 24, 8, 0), (9, 33, 16, 7),
])  # fmt: skip
@pytest.mark.parametrize("sink, neighbor", [(1, 1.0), (0, 0.5)])
@pytest.mark.parametrize("decay, split", [(1.0, 0), (0.2, 32)])
def test_published_pooling_equals_the_published_procedure(
    frames: int, tokens: int, block: int, text: int, sink: int, neighbor: float,
    decay: float, split: int,
) -> None:  # fmt: skip
    definition = Definition(
        frames, tokens, block, text, decay=decay, neighbor=neighbor, split=split, sink=sink,
        pooling="published",
    )  # fmt: skip
    grid = published_block_mask(definition)
    blocks = len(grid)
    seen = blocks_of(ours(definition))[:blocks, :blocks]
    # Ours lets each block see itself, the published grid may not, where a frame lost its tail.
    assert torch.equal(seen, grid | torch.eye(blocks, dtype=torch.bool))


def test_every_query_sees_its_own_block_even_where_the_published_rule_drops_it() -> None:
    """2 frames of 15 tokens in blocks of 8: frame 1 starts at 7 in its block and loses its end."""
    published = blocks_of(ours(Definition(2, 15, 8, pooling="published")))
    assert published.tolist()[3] == [False, False, False, True]
    assert blocks_of(ours(Definition(2, 15, 8))).tolist()[3][1:] == [True] * 3


WAN, HUNYUAN, COGVIDEOX = (RadialRule.for_model(m) for m in ("wan", "hunyuan", "cogvideox"))
# (rule, decay, frames, tokens per frame, text, block size, published block sparsity)
PUBLISHED = {
    "wan-768p-69f": (WAN, 0.2, 18, 3840, 0, 128, 0.7129),
    "wan-768p-69f-d1": (WAN, 1.0, 18, 3840, 0, 128, 0.5691),
    "wan-768p-69f-d0.01": (WAN, 0.01, 18, 3840, 0, 128, 0.7129),
    "wan-768p-69f-half": (replace(WAN, neighbor_fraction=0.5), 0.2, 18, 3840, 0, 128, 0.7366),
    "wan2.2-768p-77f": (WAN, 0.8, 20, 3840, 0, 64, 0.6509),
    "wan-480p-81f": (WAN, 0.2, 21, 1560, 0, 128, 0.6613),
    "wan-720p-81f": (WAN, 0.2, 21, 3600, 0, 128, 0.7378),
    "wan-768p-161f": (WAN, 1.0, 41, 3840, 0, 128, 0.7361),
    "hunyuan-768p-117f": (HUNYUAN, 0.95, 30, 3840, 256, 128, 0.7222),
    "hunyuan-720p-129f": (HUNYUAN, 0.95, 33, 3600, 256, 128, 0.7267),
    "hunyuan-720p-253f": (HUNYUAN, 1.0, 64, 3600, 256, 128, 0.8206),
    "hunyuan-720p-509f": (HUNYUAN, 1.0, 128, 3600, 256, 128, 0.8902),
    "cogvideox-d1": (COGVIDEOX, 1.0, 13, 1350, 226, 128, 0.470),
    "cogvideox-d0.5": (COGVIDEOX, 0.5, 13, 1350, 226, 128, 0.595),
    "cogvideox-d0.2": (COGVIDEOX, 0.2, 13, 1350, 226, 128, 0.635),
    "cogvideox-b64": (COGVIDEOX, 1.0, 13, 1350, 226, 64, 0.480),
    "cogvideox-b64-d0.2": (COGVIDEOX, 0.2, 13, 1350, 226, 64, 0.701),
    "cogvideox1.5": (COGVIDEOX, 1.0, 11, 4080, 226, 128, 0.553),
    "cogvideox1.5-d0.2": (COGVIDEOX, 0.2, 11, 4080, 226, 128, 0.710),
}
# Frames that are whole blocks: there the rule of ours is the published one.
SAME_RULE = [name for name, (*_, s, _, b, _) in PUBLISHED.items() if s % b == 0]


def sparsity(name: str, pooling: str) -> float:
    """Over the grid that the published code has: whole blocks only."""
    rule, decay, frames, tokens, text, block, _ = PUBLISHED[name]
    layout = VideoLayout((frames, 1, tokens), (1, 1, 1), text)
    rule = replace(rule, decay_factor=decay, pooling=pooling)
    whole = layout.sequence_length // block
    mask = radial_mask(layout, rule, block_size=block)
    return 1 - blocks_of(mask)[:whole, :whole].double().mean().item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_pooling_has_the_published_sparsity(name: str) -> None:
    expected = PUBLISHED[name][-1]
    digits = len(str(expected)) - 2
    assert sparsity(name, "published") == pytest.approx(expected, abs=0.6 * 10**-digits)


@pytest.mark.parametrize("name", SAME_RULE)
def test_majority_pooling_is_the_published_one_where_frames_are_whole_blocks(name: str) -> None:
    assert sparsity(name, "majority") == sparsity(name, "published")
    assert len(SAME_RULE) >= 7


@pytest.mark.parametrize("name", ["cogvideox-d1", "cogvideox1.5", "wan-480p-81f"])
def test_majority_pooling_loses_no_tail_where_the_published_one_does(name: str) -> None:
    rule, _, frames, tokens, text, block, _ = PUBLISHED[name]
    layout = VideoLayout((frames, 1, tokens), (1, 1, 1), text)
    own = {
        pooling: frame_density(
            layout, radial_mask(layout, replace(rule, pooling=pooling), block_size=block)
        ).diagonal()
        for pooling in ("majority", "published")
    }
    assert own["published"].min() < 1
    assert (own["majority"] == 1).all()


def test_masks_are_kept_by_their_full_key() -> None:
    layout = VideoLayout((3, 4, 6), (1, 4, 6), 5)
    first = radial_mask(layout, RadialRule(decay_factor=0.5), block_size=8)
    again = radial_mask(layout, RadialRule(decay_factor=0.5), block_size=8)
    assert again.kv_indices.data_ptr() == first.kv_indices.data_ptr()
    others = [
        (replace(layout, text_first=True), RadialRule(decay_factor=0.5), 8),
        (replace(layout, text_length=4), RadialRule(decay_factor=0.5), 8),
        (replace(layout, grid=(4, 4, 6)), RadialRule(decay_factor=0.5), 8),
        (layout, RadialRule(decay_factor=0.25), 8),
        (layout, RadialRule(decay_factor=0.5, sink_frames=1), 8),
        (layout, RadialRule(decay_factor=0.5, pooling="cover"), 8),
        (layout, RadialRule(decay_factor=0.5), 16),
    ]
    for other_layout, rule, block_size in others:
        other = radial_mask(other_layout, rule, block_size=block_size)
        assert other.kv_indices.data_ptr() != first.kv_indices.data_ptr()
    assert radial_mask(
        layout, RadialRule(decay_factor=0.5), block_size=8, device="meta"
    ).device == (torch.device("meta"))


def test_larger_masks_hold_together() -> None:
    """75,600 tokens: lists ascend and stay in range; no window looks one way only."""
    layout = VideoLayout((21, 45, 80), (1, 45, 80))
    cover = replace(RadialRule.for_model("hunyuan", 0.2), pooling="cover")
    keep = blocks_of(radial_mask(layout, cover))
    assert keep.shape == (591, 591) and torch.equal(keep, keep.T)
    mask = radial_mask(layout, RadialRule.for_model("wan", 0.2))
    listed = torch.arange(mask.kv_indices.shape[-1]) < mask.kv_num_blocks[..., None]
    rising = mask.kv_indices.diff(dim=-1) > 0
    assert (rising | ~listed[..., 1:]).all()
    assert mask.kv_indices.max() == 590 and mask.kv_indices.min() == 0
    assert mask.density() == pytest.approx(1 - 0.7366, abs=1e-3)


@pytest.mark.parametrize("change, error, words", [
    ({"decay_factor": 0}, ValueError, "decay_factor must be a finite number > 0, got 0"),
    ({"decay_factor": float("inf")}, ValueError, "decay_factor"),
    ({"decay_factor": float("nan")}, ValueError, "decay_factor"),
    ({"decay_factor": "1"}, TypeError, "decay_factor"),
    ({"decay_factor": True}, TypeError, "decay_factor"),
    ({"neighbor_fraction": 1.5}, ValueError, r"neighbor_fraction must be in \(0, 1\], got 1.5"),
    ({"neighbor_fraction": 0}, ValueError, "neighbor_fraction"),
    ({"min_window": -1}, ValueError, "min_window must be >= 0, got -1"),
    ({"min_window": 1.0}, TypeError, "min_window"),
    ({"split_width": -1}, ValueError, "split_width"),
    ({"sink_frames": -1}, ValueError, "sink_frames"),
    ({"sink_frames": None}, TypeError, "sink_frames"),
    ({"pooling": "mean"}, ValueError, "pooling must be one of majority, cover, published"),
    ({"decay": 1}, TypeError, "decay"),
])  # fmt: skip
def test_wrong_rules_are_refused(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RadialRule(**change)


@pytest.mark.parametrize("change, error, words", [
    ({"layout": (3, 4, 4)}, TypeError, "layout must be a VideoLayout, got tuple"),
    ({"rule": "wan"}, TypeError, "rule must be a RadialRule, got str"),
    ({"block_size": 0}, ValueError, "block_size must be >= 1, got 0"),
    ({"block_size": 8.0}, TypeError, "block_size"),
    ({"scenes": [0, 2]}, TypeError, "scenes must be a Scenes or None, got list"),
])  # fmt: skip
def test_wrong_masks_are_refused(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"layout": VideoLayout((3, 4, 4), (1, 4, 4)), "rule": RadialRule()} | change
    with pytest.raises(error, match=words):
        radial_mask(**arguments)


def test_unknown_models_and_foreign_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type must be one of wan, hunyuan, cogvideox; got"):
        RadialRule.for_model("mochi")
    layout = VideoLayout((3, 4, 4), (1, 4, 4))
    mask = radial_mask(replace(layout, text_length=3), block_size=8)
    with pytest.raises(ValueError, match="mask has q_len 51, but layout has 48 tokens"):
        frame_density(layout, mask)
