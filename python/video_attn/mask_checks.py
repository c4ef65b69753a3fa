"""What the tensors of a BlockMask must be. Their values are not read: they may be on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import broadcasts

if TYPE_CHECKING:
    from .block_mask import BlockMask


def check_mask(mask: BlockMask) -> None:
    """Raises TypeError or ValueError unless the tensors of ``mask`` fit together and its sizes."""
    _check_lists(mask)
    batch = mask.kv_num_blocks.shape[0]
    for name, blocks in (
        ("q_block_lens", mask.num_q_blocks),
        ("kv_block_lens", mask.num_kv_blocks),
    ):
        lens = getattr(mask, name)
        if lens is None:
            continue
        check_list_tensor(name, lens, 2, mask.kv_num_blocks)
        if lens.shape[1] != blocks:
            raise ValueError(f"{name} must be [B|1, {blocks}], got {tuple(lens.shape)}")
        if lens.shape[0] == 1:
            continue
        if not broadcasts(batch, lens.shape[0]):
            raise ValueError(
                f"{name} has batch {lens.shape[0]}, but the rest of the mask has {batch}"
            )
        batch = lens.shape[0]


def _check_lists(mask: BlockMask) -> None:
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    check_list_tensor("kv_num_blocks", counts, 3, counts)
    check_list_tensor("kv_indices", indices, 4, counts)
    if counts.shape[2] != mask.num_q_blocks:
        raise ValueError(
            f"kv_num_blocks has {counts.shape[2]} query blocks, but q_len "
            f"{mask.q_len} in blocks of {mask.q_block_size} makes {mask.num_q_blocks}"
        )
    # One by one: of a constant tensor torch.compile knows sizes, but no shape.
    if any(indices.shape[i] != counts.shape[i] for i in range(3)):
        raise ValueError(
            f"kv_indices must be [B|1, H|1, Nq, Kmax] with the leading shape of kv_num_blocks "
            f"{tuple(counts.shape)}, got {tuple(indices.shape)}"
        )


def check_list_tensor(name: str, value: object, dims: int, like: object) -> None:
    """Raises TypeError or ValueError unless ``value`` is an int32 tensor of so many dimensions, on
    the device of ``like`` (of any, where that is no tensor).
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {value.dtype}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")
    if isinstance(like, Tensor) and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but kv_num_blocks is on {like.device}")
