"""Video sparse attention (VSA): each tile of queries sees the k tiles of keys that score highest.

The scores are those of the block means, so this mask depends on data and changes in every layer;
its shapes do not, so a CUDA graph can hold it. After P. Zhang et al., "VSA: Faster Video Diffusion
with Trainable Sparse Attention", 2025.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from ..block_mask import BlockMask, unchecked_mask
from ..checks import check_number
from ..compiler import constant_result
from ..layout import VideoLayout
from ..static_cache import static_cache

_MAX_DENOMINATOR = 10**6


def kept_blocks(ratio: float, num_blocks: int) -> int:
    """Key blocks to keep per query block: ``ratio * num_blocks`` rounded up, from 1 to all.

    Computed on the fraction that was meant (the simplest within 1e-12 of the float, denominators up
    to a million), not on the float's last bits: 0.29 of 100 is 29, 0.1 of 96 is 10, and 1 - 0.7 of
    100 is 30. Rounding up keeps at least the ratio that was asked for.

    Raises:
        TypeError: ``ratio`` is not a number. ValueError: it is not in (0, 1], or no blocks.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be >= 1, got {num_blocks}")
    # Of numbers only: torch.compile may leave the blocks open.
    numerator, denominator = _meant_fraction(ratio)
    return -(-numerator * num_blocks // denominator)


@constant_result
def _meant_fraction(ratio: float) -> tuple[int, int]:
    """(numerator, denominator) > 0 of the ratio that was meant."""
    if not isinstance(ratio, Fraction):
        ratio = check_number("top_k_ratio", ratio)
    if not 0 < ratio <= 1:
        raise ValueError(f"top_k_ratio must be in (0, 1]: the share of key tiles kept; got {ratio}")
    exact = ratio if isinstance(ratio, Fraction) else Fraction(ratio)
    meant = exact.limit_denominator(_MAX_DENOMINATOR)
    if meant == 0 or abs(meant - exact) > Fraction(1, 10**12):
        meant = exact
    return meant.numerator, meant.denominator


def selected_blocks_mask(
    selected: Tensor,
    counts: Tensor | None,
    block_size: int,
    q_len: int,
    kv_len: int,
    q_block_lens: Tensor | None,
    kv_block_lens: Tensor | None,
) -> BlockMask:
    """The mask where each block sees the blocks ``selected`` for it, int32 [B, H, Nq, k] ascending.

    ``counts`` int32 [B, H, Nq], all k, where a kernel has filled one beside ``selected``: the lists
    are then taken as they are.
    """
    if counts is None:
        return BlockMask.from_indices(
            selected, block_size, block_size, q_len=q_len, kv_len=kv_len,
            q_block_lens=q_block_lens, kv_block_lens=kv_block_lens,
        )  # fmt: skip
    return unchecked_mask(
        kv_num_blocks=counts, kv_indices=selected, q_block_size=block_size,
        kv_block_size=block_size, q_len=q_len, kv_len=kv_len,
        q_block_lens=q_block_lens, kv_block_lens=kv_block_lens,
    )  # fmt: skip


def selected_tiles_mask(
    selected: Tensor,
    layout: VideoLayout,
    *,
    counts: Tensor | None = None,
    text_blocks: int | None = None,
    block_lens: Tensor | None = None,
) -> BlockMask:
    """The mask where each video tile sees the video tiles ``selected`` for it, and the text.

    Args:
        selected: int32 [B, H, num_tiles, k], ascending tile numbers.
        layout: of queries and keys alike, in padded tile order, text last.
        counts: int32 [B, H, num_tiles], all k, or None.
        text_blocks: text blocks that every query sees (default all); queries in text blocks see
            everything.
        block_lens: int32 [B|1, num_blocks], valid tokens of each block; None: all are full.
    """
    size, length = layout.tile_volume, layout.padded_length
    if layout.num_text_blocks == 0:
        return selected_blocks_mask(selected, counts, size, length, length, block_lens, block_lens)
    (*leading, tiles, kept) = selected.shape
    text_blocks = layout.num_text_blocks if text_blocks is None else text_blocks
    beside, text_rows, counts = _beside(
        tiles, kept, layout.num_text_blocks, text_blocks, selected.device
    )  # fmt: skip
    video_rows = torch.cat([selected, beside.expand(*leading, -1, -1)], -1)
    rows = torch.cat([video_rows, text_rows.expand(*leading, -1, -1)], 2)
    return BlockMask.from_indices(
        rows, size, size, q_len=length, kv_len=length, kv_num_blocks=counts.expand(*leading, -1),
        q_block_lens=block_lens, kv_block_lens=block_lens,
    )  # fmt: skip


@static_cache(
    torch.int32,
    lambda tiles, kept, text_rows, text_blocks, device: [
        (tiles, text_blocks + tiles - kept),
        (text_rows, tiles + text_blocks),
        (tiles + text_rows,),
    ],
)
def _beside(
    tiles: int, kept: int, text_rows: int, text_blocks: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What stands beside the selected tiles in the lists: after them in rows of video tiles, all
    rows of text; and the length of every list.
    """
    every = torch.arange(tiles + text_blocks, dtype=torch.int32)
    after = torch.cat([every[tiles:], every.new_zeros(tiles - kept)])
    counts = torch.full((tiles + text_rows,), kept + text_blocks, dtype=torch.int32)
    counts[tiles:] = tiles + text_blocks
    parts = after.repeat(tiles, 1), every.repeat(text_rows, 1), counts
    return tuple(x.to(device) for x in parts)  # type: ignore[return-value]
