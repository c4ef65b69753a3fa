"""BlockMask against sets of blocks, one block at a time."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import token_masks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_examples import Example, examples, lists_of
from problem_masks import Lists

from video_attn import BlockMask, attention

INT32_MAX = 2**31 - 1
some = settings(max_examples=60)


def as_lists(lists: Lists) -> list:
    return [[[sorted(row) for row in rows] for rows in heads] for heads in lists]


# -- construction and the other forms --------------------------------------------------------------


@some
@given(examples(), st.integers(0, 2))
def test_every_form_says_the_same(example, spare):
    mask = example.mask(spare)
    assert (mask.num_q_blocks, mask.num_kv_blocks) == example.blocks
    assert lists_of(mask.kv_num_blocks, mask.kv_indices) == as_lists(example.lists)
    dense = mask.to_dense()
    again = BlockMask.from_dense(
        dense, *example.sizes, mask.q_block_lens, mask.kv_block_lens,
        q_len=example.lengths[0], kv_len=example.lengths[1],
    )  # fmt: skip
    assert lists_of(again.kv_num_blocks, again.kv_indices) == as_lists(example.lists)
    assert torch.equal(again.to_dense(), dense)
    for form in (mask, again, mask.compact(), mask.to("cpu")):
        assert torch.equal(form.to_token_mask(), example.tokens())


@some
@given(examples())
def test_what_stands_past_a_list_is_never_looked_at(example):
    """INT32_MAX and negative numbers there change no form, figure or transpose."""
    mask = example.mask(spare=2)
    past = torch.arange(mask.kv_indices.shape[-1]) >= mask.kv_num_blocks[..., None]
    for garbage in (INT32_MAX, -1, -(2**31)):
        indices = mask.kv_indices.masked_fill(past, garbage)
        spoiled = BlockMask.from_indices(
            indices, *example.sizes, q_len=mask.q_len, kv_len=mask.kv_len,
            kv_num_blocks=mask.kv_num_blocks, q_block_lens=mask.q_block_lens,
            kv_block_lens=mask.kv_block_lens,
        )  # fmt: skip
        assert torch.equal(spoiled.to_token_mask(), example.tokens())
        assert spoiled.attended_pairs() == mask.attended_pairs()
        assert lists_of(*spoiled.transposed()) == lists_of(*mask.transposed())
        assert torch.equal(spoiled.refine(1).to_token_mask(), example.tokens())
        assert torch.equal(spoiled.compact().to_token_mask(), example.tokens())
        assert "BlockMask(" in repr(spoiled)


def test_counts_may_be_left_out():
    indices = torch.tensor([[[[0, 2], [1, 2]]]], dtype=torch.int32)
    mask = BlockMask.from_indices(indices, 4, 4, q_len=7, kv_len=12)
    assert mask.kv_num_blocks.tolist() == [[[2, 2]]]
    assert mask.kv_num_blocks.dtype == torch.int32
    expected = token_masks.listed_tokens([[[{0, 2}, {1, 2}]]], (4, 4), (7, 12))
    assert torch.equal(mask.to_token_mask(), expected)


def test_lengths_default_to_whole_blocks():
    mask = BlockMask.from_dense(torch.ones(1, 1, 3, 5, dtype=torch.bool), 16, 32)
    assert (mask.q_len, mask.kv_len) == (48, 160)


# -- the transpose ---------------------------------------------------------------------------------


@some
@given(examples())
def test_transpose(example):
    """Who sees each key block, ascending; the same tensors at the next call."""
    mask = example.mask(spare=1)
    expected = [
        [
            [[i for i, row in enumerate(rows) if j in row] for j in range(example.blocks[1])]
            for rows in heads
        ]
        for heads in example.lists
    ]
    assert lists_of(mask.q_num_blocks, mask.q_indices) == expected
    assert mask.q_num_blocks.dtype == mask.q_indices.dtype == torch.int32
    assert mask.transposed() is mask.transposed()
    assert mask.q_indices is mask.transposed()[1]


def test_transpose_made_under_inference_mode_serves_training():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 8, 8)
    with torch.inference_mode():
        assert mask.q_num_blocks.tolist() == [[[2, 2]]]
    q = torch.randn(1, 1, 16, 8, requires_grad=True)
    attention(q, q, q, mask, backend="reference").sum().backward()
    assert q.grad is not None


def test_transpose_made_under_fake_tensors_is_not_kept():
    """torch.export and the like trace with fake tensors around real masks."""
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 8, 8)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert mask.transposed()[0].shape == (1, 1, 2)
    assert mask.q_num_blocks.tolist() == [[[2, 2]]]


# -- refine ----------------------------------------------------------------------------------------


@some
@given(examples(), st.data())
def test_refine_keeps_every_pair(example, data):
    """Smaller blocks, the same tokens: lens are cut block by block."""
    mask = example.mask()
    factors = [
        data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        for size in example.sizes
    ]
    fine = mask.refine(*factors)
    assert torch.equal(fine.to_token_mask(), example.tokens())
    assert (fine.q_block_size, fine.kv_block_size) == tuple(
        size // factor for size, factor in zip(example.sizes, factors, strict=True)
    )
    assert fine.attended_pairs() == mask.attended_pairs()


def test_refine_of_one_sta_tile():
    """384 tokens of a tile, 300 of them valid, as three blocks of 128."""
    lens = torch.tensor([[300]], dtype=torch.int32)
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 384, 384, lens, lens)
    fine = mask.refine(3)
    assert fine.kv_block_lens.tolist() == [[128, 128, 44]]
    assert lists_of(fine.kv_num_blocks, fine.kv_indices) == [[[[0, 1, 2]] * 3]]


# -- figures ---------------------------------------------------------------------------------------


@some
@given(examples())
def test_figures_count_tokens(example):
    mask, tokens = example.mask(), example.tokens()
    pairs = int(tokens.sum())
    assert mask.attended_pairs() == pairs
    assert mask.flops(64) == 4 * 64 * pairs
    everything = Example(
        [[[set(range(example.blocks[1]))] * example.blocks[0]]], example.sizes, example.lengths,
        example.q_block_lens, example.kv_block_lens,
    ).tokens()  # fmt: skip
    possible = int(everything.expand(tokens.shape[0], -1, -1, -1).sum()) * tokens.shape[1]
    assert mask.density() == pytest.approx(pairs / possible if possible else 0.0)


def test_flops_of_a_mask_that_serves_many_heads():
    mask = BlockMask.from_dense(torch.eye(4, dtype=torch.bool)[None, None], 8, 8)
    assert mask.flops(16) == 4 * 16 * 4 * 64
    assert mask.flops(16, batch=2, heads=24) == 48 * mask.flops(16)
    many = BlockMask.from_dense(torch.eye(4, dtype=torch.bool).expand(2, 3, 4, 4), 8, 8)
    assert many.flops(16, batch=2, heads=3) == many.flops(16) == 6 * mask.flops(16)


def test_density_of_the_sta_example():
    """13 of 128 blocks in every row."""
    keep = (torch.arange(128) < 13).expand(1, 1, 128, 128)
    assert BlockMask.from_dense(keep, 64, 64).density() == 13 / 128


# -- the object ------------------------------------------------------------------------------------


def test_repr_tells_a_person_what_it_is():
    keep = torch.eye(5, dtype=torch.bool).expand(2, 3, 5, 5)
    lens = torch.full((1, 5), 7, dtype=torch.int32)
    text = repr(BlockMask.from_dense(keep, 64, 128, lens, q_len=300, kv_len=640))
    for part in ("300 x 640 tokens", "blocks 64 x 128", "5 x 5 blocks", "batch 2", "heads 3",
                 "cpu", "q_block_lens", "density 0.2"):  # fmt: skip
        assert part in text, text
    assert "kv_block_lens" not in text


def test_immutable_and_compared_by_identity():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 8, 8)
    with pytest.raises(FrozenInstanceError):
        mask.q_len = 7
    with pytest.raises(FrozenInstanceError):
        del mask.kv_indices
    assert mask == mask
    assert mask != mask.to("cpu")
    assert len({mask, mask.compact()}) == 2


def test_derived_masks_leave_the_original_alone():
    example = Example([[[{0, 1}, {1}]]], (4, 4), (8, 8), None, None)
    mask = example.mask(spare=1)
    before = [x.clone() for x in (mask.kv_num_blocks, mask.kv_indices)]
    lens = torch.tensor([[2, 4]], dtype=torch.int32)
    cut = mask.with_lens(None, lens)
    assert cut.attended_pairs() == 4 * 6 + 4 * 4
    for derived in (cut, mask.refine(2), mask.compact(), mask.to("cpu")):
        assert derived is not mask
    assert mask.kv_block_lens is None
    assert mask.compact().kv_indices.shape[-1] == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (mask.kv_num_blocks, mask.kv_indices), strict=True)
    )


def test_to_moves_everything():
    """The meta device stands for another device: the transposed lists move too."""
    lens = torch.tensor([[4, 2]], dtype=torch.int32)
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 4, 4, lens, lens)
    mask.transposed()
    moved = mask.to("meta")
    tensors = (moved.kv_num_blocks, moved.kv_indices, moved.q_block_lens, moved.kv_block_lens)
    assert moved.device.type == "meta"
    assert all(x.device.type == "meta" for x in (*tensors, *moved.transposed()))
    assert "density" not in repr(moved), "a density would be read from the device"


@pytest.mark.gpu
def test_no_host_synchronisation_on_gpu(gpu):
    """Making, transposing and refining a mask, and calling attention, never waits for the GPU."""
    keep = torch.rand(2, 3, 8, 8, device=gpu) < 0.5
    q = torch.randn(2, 3, 512, 64, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = BlockMask.from_dense(keep, 64, 64).refine(2)
        assert mask.transposed()[0].shape == (2, 3, 16)
        attention(q, q, q, mask).sum().backward()
        assert "density" not in repr(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lists_of_width_zero_see_nothing() -> None:
    """Without counts the lists' width is the count, also when that is 0."""
    empty = torch.empty(1, 1, 2, 0, dtype=torch.int32)
    mask = BlockMask.from_indices(empty, 4, 4, q_len=8, kv_len=8)
    assert mask.attended_pairs() == 0
    q, k, v = torch.randn(3, 1, 1, 8, 4)
    out, lse = attention(q, k, v, mask, return_lse=True, backend="reference")
    assert out.eq(0).all() and lse.isneginf().all()
