"""What print shows of a BlockMask: a line of words, and a picture of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .block_mask import BlockMask


def describe(mask: BlockMask) -> str:
    """Sizes, device, and of a mask on the CPU its density."""
    batch, heads, nq, kmax = mask.kv_indices.shape
    text = (
        f"BlockMask({mask.q_len} x {mask.kv_len} tokens, blocks {mask.q_block_size} x "
        f"{mask.kv_block_size}, {nq} x {mask.num_kv_blocks} blocks, batch {batch}, "
        f"heads {heads}, up to {kmax} per row, {mask.device}"
    )
    lens = [name for name in ("q_block_lens", "kv_block_lens") if getattr(mask, name) is not None]
    if lens:
        text += ", " + " and ".join(lens)
    if mask.device.type == "cpu":  # on a GPU a density would stop the stream
        text += f", density {mask.density():.4f}"
    return text + ")"


def draw(mask: BlockMask) -> str:
    """The blocks of the first batch and head, on new lines; "" for a mask without values."""
    if type(mask.kv_indices) is not Tensor or mask.device.type == "meta":
        return ""
    keep = mask.to("cpu").to_dense()
    batch, heads = keep.shape[:2]
    title = "" if batch * heads == 1 else f"\nbatch 0 of {batch}, head 0 of {heads}:"
    return f"{title}\n{draw_blocks(keep[0, 0])}"


def draw_blocks(keep: Tensor, rows: int = 24, columns: int = 64) -> str:
    """A block matrix [Nq, Nk] as lines of text, of at most ``rows`` x ``columns`` characters.

    A character stands for one block or, of larger matrices, for several: " " for none of them,
    "\u2591", "\u2592", "\u2593" for a share, "\u2588" for all.
    """
    size = min(keep.shape[0], rows), min(keep.shape[1], columns)
    share = torch.nn.functional.adaptive_avg_pool2d(keep.double()[None], size)[0]
    shade = (share * 3).ceil().long() + (share == 1)
    return "\n".join("".join(" \u2591\u2592\u2593\u2588"[i] for i in row) for row in shade.tolist())
