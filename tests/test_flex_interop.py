"""BlockMask.to_flex and from_flex: every pair is kept, and what lengths cannot say is refused."""

from __future__ import annotations

import pytest
import token_masks
import torch
from hypothesis import given, settings
from mask_examples import examples, lists_of
from problem_masks import any_in_block

from video_attn import BlockMask


@settings(max_examples=40)
@given(examples())
def test_flex_round_trip(example):
    """To FlexAttention and back keeps every pair of tokens, lengths included."""
    mask, tokens = example.mask(), example.tokens()
    flex = mask.to_flex()
    assert torch.equal(flex_tokens(flex, tokens.shape), tokens)
    assert flex.seq_lengths == example.lengths
    again = BlockMask.from_flex(flex).to_token_mask()
    assert torch.equal(again.expand_as(tokens), tokens)


def flex_tokens(flex, shape: tuple[int, ...]) -> torch.Tensor:
    """What FlexAttention computes: full blocks whole, partial blocks through mask_mod."""
    q_len, kv_len = shape[2:]
    b, h, i, j = (torch.arange(n) for n in shape)
    index = torch.meshgrid(b, h, i, j, indexing="ij")
    inside = flex.mask_mod(*index)
    kept = torch.zeros(shape, dtype=torch.bool)
    (q_size, kv_size) = flex.BLOCK_SIZE
    for counts, indices, full in (
        (flex.kv_num_blocks, flex.kv_indices, False),
        (flex.full_kv_num_blocks, flex.full_kv_indices, True),
    ):
        lists = lists_of(counts, indices)
        block = token_masks.listed_tokens(
            [[[set(row) for row in rows] for rows in heads_] for heads_ in lists],
            (q_size, kv_size), (q_len, kv_len),
        )  # fmt: skip
        kept |= block.expand(shape) if full else block.expand(shape) & inside
    return kept


def flex_mask(mask_mod, batch=1, heads=1, q_len=64, kv_len=64, size=16):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mask_mod, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=size)


ACCEPTED = {
    "everything": (lambda b, h, i, j: i >= 0, {}),
    "windows of blocks": (lambda b, h, i, j: (i // 16 - j // 16).abs() <= 1, {}),
    "documents of whole blocks": (lambda b, h, i, j: i // 32 == j // 32, {}),
    "heads differ": (lambda b, h, i, j: (i // 16 + j // 16) % 3 == h, {"heads": 3}),
    "key padding": (lambda b, h, i, j: j < 41, {}),
    "key padding per batch": (lambda b, h, i, j: j < 41 - 20 * b, {"batch": 2}),
    "query and key padding": (lambda b, h, i, j: (i < 33) & (j < 50), {}),
    "padding inside blocks": (lambda b, h, i, j: (j % 16 < 5) & (i % 16 < 7), {}),
    "ragged end": (lambda b, h, i, j: i >= 0, {"q_len": 57, "kv_len": 71}),
    "nothing": (lambda b, h, i, j: i < 0, {}),
}
REFUSED = {
    "causal": (lambda b, h, i, j: i >= j, {}),
    "window of tokens": (lambda b, h, i, j: (i - j).abs() < 10, {}),
    "documents of 20": (lambda b, h, i, j: i // 20 == j // 20, {}),
    "every second key": (lambda b, h, i, j: j % 2 == 0, {}),
    "last keys of a block": (lambda b, h, i, j: j % 16 >= 8, {}),
    "length per head": (lambda b, h, i, j: j < 41 - 20 * h, {"heads": 2}),
    "key length per query block": (lambda b, h, i, j: j % 16 < 8 + i // 16, {}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_from_flex_takes_what_lengths_can_say(name):
    mask_mod, shape = ACCEPTED[name]
    flex = flex_mask(mask_mod, **shape)
    mask = BlockMask.from_flex(flex)
    batch, heads = flex.kv_num_blocks.shape[:2]
    index = [torch.arange(n) for n in (batch, heads, *flex.seq_lengths)]
    expected = mask_mod(*torch.meshgrid(*index, indexing="ij")).expand(batch, heads, -1, -1)
    assert torch.equal(mask.to_token_mask().expand_as(expected), expected)
    assert (mask.q_block_size, mask.kv_block_size) == flex.BLOCK_SIZE
    # Blocks without a pair are not listed: they would be work for nothing.
    assert torch.equal(mask.to_dense(), any_in_block(expected, 16, 16))


@pytest.mark.parametrize("name", REFUSED)
def test_from_flex_refuses_masks_inside_blocks(name):
    mask_mod, shape = REFUSED[name]
    with pytest.raises(ValueError, match=r"mask: block .*block lengths cannot say"):
        BlockMask.from_flex(flex_mask(mask_mod, **shape))


def test_from_flex_with_partial_lists_alone():
    """Blocks that a mask_mod keeps whole need not stand in FlexAttention's list of full ones."""
    made = flex_mask(lambda b, h, i, j: (i // 16 >= j // 16) & (j < 41))
    counts = torch.tensor([[[1, 2, 3, 3]]], dtype=torch.int32)
    indices = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4)
    alone = type(made).from_kv_blocks(
        counts, indices, BLOCK_SIZE=16, mask_mod=made.mask_mod, seq_lengths=(64, 64)
    )
    expected = BlockMask.from_flex(made).to_token_mask()
    assert torch.equal(BlockMask.from_flex(alone).to_token_mask(), expected)
    assert int(expected[0, 0, 63].sum()) == 41


def test_from_flex_without_mask_mod_takes_all_blocks_as_whole():
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    flex = FlexBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, seq_lengths=(32, 32))
    assert BlockMask.from_flex(flex).to_dense().tolist() == [[[[False, True], [True, True]]]]
