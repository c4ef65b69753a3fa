"""BlockMask against sets of blocks, one block at a time."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
import token_masks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problem_masks import Lists, any_in_block, list_tensors

from video_attn import BlockMask, attention

INT32_MAX = 2**31 - 1
some = settings(max_examples=60)


@dataclass
class Example:
    """Lists as sets, and the BlockMask that should say the same."""

    lists: Lists
    sizes: tuple[int, int]
    lengths: tuple[int, int]
    q_block_lens: list[list[int]] | None
    kv_block_lens: list[list[int]] | None

    @property
    def blocks(self) -> tuple[int, int]:
        nq, nk = (-(-n // size) for n, size in zip(self.lengths, self.sizes, strict=True))
        return nq, nk

    def mask(self, spare: int = 0) -> BlockMask:
        counts, indices = list_tensors(self.lists, self.blocks[1], spare)
        lens = (self.q_block_lens, self.kv_block_lens)
        q_lens, kv_lens = (None if x is None else torch.tensor(x, dtype=torch.int32) for x in lens)
        return BlockMask.from_indices(
            indices, *self.sizes, q_len=self.lengths[0], kv_len=self.lengths[1],
            kv_num_blocks=counts, q_block_lens=q_lens, kv_block_lens=kv_lens,
        )  # fmt: skip

    def tokens(self) -> torch.Tensor:
        return token_masks.listed_tokens(
            self.lists, self.sizes, self.lengths, self.q_block_lens, self.kv_block_lens
        )


@st.composite
def examples(draw: st.DrawFn) -> Example:
    sizes = draw(st.tuples(st.sampled_from([1, 2, 4, 6]), st.sampled_from([1, 2, 4, 6])))
    lengths = draw(st.tuples(st.integers(1, 17), st.integers(1, 17)))
    nq, nk = (-(-n // size) for n, size in zip(lengths, sizes, strict=True))
    batch, heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    row = st.sets(st.integers(0, nk - 1))
    rows = st.lists(row, min_size=nq, max_size=nq)
    lists = [[draw(rows) for _ in range(heads)] for _ in range(batch)]

    def lens(blocks: int, size: int) -> list[list[int]] | None:
        count = draw(st.sampled_from([0, 1, 2]))
        one = st.lists(st.integers(0, size), min_size=blocks, max_size=blocks)
        return [draw(one) for _ in range(count)] or None

    return Example(lists, sizes, lengths, lens(nq, sizes[0]), lens(nk, sizes[1]))


def lists_of(counts: torch.Tensor, indices: torch.Tensor) -> list:
    """Nested lists with what each count covers."""
    if counts.dim() == 0:
        return indices[: int(counts)].tolist()
    return [lists_of(c, i) for c, i in zip(counts, indices, strict=True)]


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


# -- FlexAttention ---------------------------------------------------------------------------------


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


def test_lists_of_width_zero_see_nothing() -> None:
    """Without counts the lists' width is the count, also when that is 0."""
    empty = torch.empty(1, 1, 2, 0, dtype=torch.int32)
    mask = BlockMask.from_indices(empty, 4, 4, q_len=8, kv_len=8)
    assert mask.attended_pairs() == 0
    q, k, v = torch.randn(3, 1, 1, 8, 4)
    out, lse = attention(q, k, v, mask, return_lse=True, backend="reference")
    assert out.eq(0).all() and lse.isneginf().all()
