"""MaskArguments: a block mask as operators take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskArguments(NamedTuple):
    """A mask, or its absence, as the plain values that operators take: fields of a BlockMask."""

    kv_num_blocks: Tensor | None = None
    kv_indices: Tensor | None = None
    q_num_blocks: Tensor | None = None
    q_indices: Tensor | None = None
    q_block_lens: Tensor | None = None
    kv_block_lens: Tensor | None = None
    q_block_size: int = 0
    kv_block_size: int = 0

    @property
    def lists(self) -> tuple[Tensor | None, Tensor | None]:
        """Key blocks of every query block: how many, and which."""
        return self.kv_num_blocks, self.kv_indices

    @property
    def transposed_lists(self) -> tuple[Tensor | None, Tensor | None]:
        """Query blocks of every key block: how many, and which."""
        return self.q_num_blocks, self.q_indices

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the sizes, in the order of the fields."""
        return *self.lists, *self.transposed_lists, self.q_block_lens, self.kv_block_lens

    @property
    def slots(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Valid tokens of the blocks, and their sizes, of queries and of keys."""
        return self.q_block_lens, self.kv_block_lens, self.q_block_size, self.kv_block_size
