"""BlockMask to and from ``torch.nn.attention.flex_attention.BlockMask``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from .block_mask import BlockMask, dense_from_lists


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
    """(partial blocks that keep a pair, q lens, kv lens) of a mask cut by lengths only."""
    (q_size, kv_size), (q_len, kv_len) = mask.BLOCK_SIZE, mask.seq_lengths
    batch, _, nq, nk = partial.shape
    q_lens = _full_lens(batch, nq, q_size, q_len, partial.device)
    kv_lens = _full_lens(batch, nk, kv_size, kv_len, partial.device)
    q_seen, kv_seen = full.any(1).any(-1), full.any(1).any(-2)  # lengths fixed by a full block
    nonempty = partial.clone()
    for b, h, i, j in partial.nonzero().tolist():
        tokens = _block_tokens(mask, b, h, i, j)
        rows, columns = tokens.any(1), tokens.any(0)
        q_n, kv_n = int(rows.sum()), int(columns.sum())
        if q_n == 0:
            nonempty[b, h, i, j] = False
            continue
        expected = torch.zeros_like(tokens)
        expected[:q_n, :kv_n] = True
        agrees = (not q_seen[b, i] or q_lens[b, i] == q_n) and (
            not kv_seen[b, j] or kv_lens[b, j] == kv_n
        )
        if not torch.equal(tokens, expected) or not agrees:
            raise ValueError(
                f"mask: block (batch {b}, head {h}, query block {i}, key block {j}) keeps "
                f"{int(tokens.sum())} of {tokens.numel()} pairs in a way that block lengths cannot "
                "say. Allowed: whole blocks, or the first m queries x the first n keys with the "
                "same m for a query block and the same n for a key block"
            )
        q_lens[b, i], kv_lens[b, j] = q_n, kv_n
        q_seen[b, i] = kv_seen[b, j] = True
    return nonempty, q_lens, kv_lens


def _full_lens(batch: int, blocks: int, size: int, length: int, device: torch.device) -> Tensor:
    starts = torch.arange(blocks, dtype=torch.int32, device=device) * size
    return (length - starts).clamp_(max=size).expand(batch, -1).clone()


def _block_tokens(mask: flex_attention.BlockMask, b: int, h: int, i: int, j: int) -> Tensor:
    """bool [rows, columns] of one block by its mask_mod, cut at the end of the sequence."""
    (q_size, kv_size), (q_len, kv_len) = mask.BLOCK_SIZE, mask.seq_lengths
    device = mask.kv_num_blocks.device
    q_idx = torch.arange(i * q_size, min((i + 1) * q_size, q_len), device=device)[:, None]
    kv_idx = torch.arange(j * kv_size, min((j + 1) * kv_size, kv_len), device=device)[None, :]
    one = torch.ones((), dtype=torch.int64, device=device)
    tokens = mask.mask_mod(one * b, one * h, q_idx, kv_idx)
    return tokens.expand(q_idx.shape[0], kv_idx.shape[1])
