"""BlockMask to and from ``torch.nn.attention.flex_attention.BlockMask``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from .block_lists import dense_from_lists
from .block_mask import BlockMask

_TOKENS = 1 << 22  # pairs of tokens that are looked at in one go


def to_flex(mask: BlockMask) -> flex_attention.BlockMask:
    """The same mask for FlexAttention: whole blocks as full ones, the others with a mask_mod."""
    keep = mask.to_dense()
    batch = max(mask.batch, keep.shape[0])
    keep = keep.expand(batch, -1, -1, -1)
    q_lens, kv_lens = mask.q_lens().expand(batch, -1), mask.kv_lens().expand(batch, -1)
    # A block cut only by the end of the sequence is partial to FlexAttention too.
    whole = (q_lens == mask.q_block_size)[:, None, :, None]
    whole = whole & (kv_lens == mask.kv_block_size)[:, None, None, :]
    one_batch, one_head = batch == 1, keep.shape[1] == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        i, j = q_idx // mask.q_block_size, kv_idx // mask.kv_block_size
        b = torch.zeros_like(b) if one_batch else b
        h = torch.zeros_like(h) if one_head else h
        inside = (q_idx % mask.q_block_size < q_lens[b, i]) & (
            kv_idx % mask.kv_block_size < kv_lens[b, j]
        )
        return inside & keep[b, h, i, j]

    partial, full = _flex_lists(keep & ~whole), _flex_lists(keep & whole)
    return flex_attention.BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=(mask.q_block_size, mask.kv_block_size),
        mask_mod=mask_mod,
        seq_lengths=(mask.q_len, mask.kv_len),
    )


def from_flex(mask: flex_attention.BlockMask) -> BlockMask:
    """See :meth:`BlockMask.from_flex`."""
    if not isinstance(mask, flex_attention.BlockMask):
        raise TypeError(f"mask must be a flex_attention.BlockMask, got {type(mask).__name__}")
    q_size, kv_size = mask.BLOCK_SIZE
    q_len, kv_len = mask.seq_lengths
    nq, nk = -(-q_len // q_size), -(-kv_len // kv_size)
    partial = dense_from_lists(mask.kv_num_blocks, mask.kv_indices, nk)[..., :nq, :]
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = dense_from_lists(mask.full_kv_num_blocks, mask.full_kv_indices, nk)[..., :nq, :]
    if mask.mask_mod is flex_attention.noop_mask:
        full, partial = full | partial, torch.zeros_like(partial)
    q_lens = kv_lens = None
    if bool(partial.any()):
        partial, q_lens, kv_lens = _lens_of_partial_blocks(mask, partial, full)
    return BlockMask.from_dense(
        full | partial, q_size, kv_size, q_lens, kv_lens, q_len=q_len, kv_len=kv_len
    ).compact()


def _flex_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    counts = keep.sum(-1, dtype=torch.int32)
    return counts, torch.argsort(keep, dim=-1, descending=True, stable=True).int()


def _lens_of_partial_blocks(
    mask: flex_attention.BlockMask, partial: Tensor, full: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(partial blocks that keep a pair, q lens, kv lens) of a mask cut by lengths only.

    Many blocks at a time; the host reads how many there are, and whether all are.
    """
    (q_size, kv_size), (q_len, kv_len) = mask.BLOCK_SIZE, mask.seq_lengths
    batch, _, nq, nk = partial.shape
    q_lens = _full_lens(batch, nq, q_size, q_len, partial.device)
    kv_lens = _full_lens(batch, nk, kv_size, kv_len, partial.device)
    # Lengths that blocks ask for: the least and the largest must agree where any does.
    q_asked, kv_asked = _Asked(q_lens, full.any(1).any(-1)), _Asked(kv_lens, full.any(1).any(-2))
    blocks = partial.nonzero()
    counts = torch.empty(len(blocks), 2, dtype=torch.int32, device=partial.device)
    wrong = torch.empty(len(blocks), dtype=torch.bool, device=partial.device)
    step = max(1, _TOKENS // (q_size * kv_size))
    for start in range(0, len(blocks), step):
        stop = start + step
        counts[start:stop], wrong[start:stop] = _prefixes(_block_tokens(mask, blocks[start:stop]))
    q_n, kv_n = counts.unbind(1)
    kept = q_n > 0
    b, h, i, j = blocks[kept].unbind(1)
    q_lens, q_clash = q_asked.resolve(b, i, q_n[kept])
    kv_lens, kv_clash = kv_asked.resolve(b, j, kv_n[kept])
    clash = q_clash | kv_clash
    if bool(wrong.any() | clash.any()):
        block = (blocks[wrong] if bool(wrong.any()) else blocks[kept][clash])[:1]
        _refuse(block[0], _block_tokens(mask, block)[0])
    nonempty = torch.zeros_like(partial)
    nonempty[b, h, i, j] = True
    return nonempty, q_lens, kv_lens


def _prefixes(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(m and n int32 [P, 2], bool [P]: not so) where the first m queries see the first n keys.

    Of blocks of tokens bool [P, q size, kv size]: each query that sees any key sees as many as all
    of them together, so they see the same ones.
    """
    in_row, columns = tokens.sum(2, dtype=torch.int32), tokens.any(1)
    rows, n = in_row > 0, columns.sum(1, dtype=torch.int32)
    m = rows.sum(1, dtype=torch.int32)
    wrong = (rows & (in_row != n[:, None])).any(1)
    for kept, count in ((rows, m), (columns, n)):
        position = torch.arange(kept.shape[1], device=kept.device)
        wrong |= (kept != (position < count[:, None])).any(1)
    return torch.stack([m, n], 1), wrong


class _Asked(NamedTuple):
    """Lengths of whole blocks [B, N], and of which of them some full block is known to be seen."""

    lens: Tensor
    fixed: Tensor

    def resolve(self, b: Tensor, block: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The lengths [B, N] with those that partial blocks ask for, and which of these disagree
        with others.
        """
        at = b * self.lens.shape[1] + block
        least = torch.where(self.fixed, self.lens, self.lens.max() + 1).flatten()
        largest = torch.where(self.fixed, self.lens, 0).flatten()
        least = least.scatter_reduce(0, at, asked, "amin")
        largest = largest.scatter_reduce(0, at, asked, "amax")
        lens = torch.where(largest > 0, largest, self.lens.flatten())
        return lens.view_as(self.lens), (least != largest)[at]


def _refuse(block: Tensor, tokens: Tensor) -> None:
    b, h, i, j = block.tolist()
    raise ValueError(
        f"mask: block (batch {b}, head {h}, query block {i}, key block {j}) keeps "
        f"{int(tokens.sum())} of {tokens.numel()} pairs in a way that block lengths cannot "
        "say. Allowed: whole blocks, or the first m queries x the first n keys with the "
        "same m for a query block and the same n for a key block"
    )


def _full_lens(batch: int, blocks: int, size: int, length: int, device: torch.device) -> Tensor:
    starts = torch.arange(blocks, dtype=torch.int32, device=device) * size
    return (length - starts).clamp_(max=size).expand(batch, -1).clone()


def _block_tokens(mask: flex_attention.BlockMask, blocks: Tensor) -> Tensor:
    """bool [P, q size, kv size] of blocks [P, 4] by the mask_mod, False past the sequences."""
    (q_size, kv_size), (q_len, kv_len) = mask.BLOCK_SIZE, mask.seq_lengths
    b, h, i, j = blocks[..., None, None].unbind(1)
    q_idx = i * q_size + torch.arange(q_size, device=blocks.device)[:, None]
    kv_idx = j * kv_size + torch.arange(kv_size, device=blocks.device)
    inside = (q_idx < q_len) & (kv_idx < kv_len)
    # A mask_mod may look things up by token: never past the end.
    q_idx, kv_idx = q_idx.clamp(max=q_len - 1), kv_idx.clamp(max=kv_len - 1)
    return mask.mask_mod(b, h, q_idx, kv_idx) & inside
