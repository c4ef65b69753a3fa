"""Random lists as sets of blocks, and the BlockMask that should say the same."""

from __future__ import annotations

from dataclasses import dataclass

import token_masks
import torch
from hypothesis import strategies as st
from problem_masks import Lists, list_tensors

from video_attn import BlockMask


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
