"""Lists of blocks and lengths of blocks, as plain tensors: what a BlockMask is made of."""

from __future__ import annotations

import torch
from torch import Tensor


def lists_from_dense(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a boolean matrix [..., R, C] as (counts int32 [..., R], columns int32 [..., R, C]).

    Columns ascend and are padded with 0. Static shapes on the device of ``keep``: no host sync.
    """
    kept = keep.cumsum(-1, dtype=torch.int32)
    counts = kept[..., -1:]
    column = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device)
    # A stable partition, several times faster than a sort: kept columns move to the front.
    target = torch.where(keep, kept - 1, counts + column - kept).long()
    columns = torch.zeros_like(kept).scatter_(-1, target, torch.where(keep, column, 0))
    return counts.squeeze(-1).contiguous(), columns


def dense_from_lists(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """The boolean matrix [..., R, columns] of row lists; entries past a count are not looked at."""
    position = torch.arange(indices.shape[-1], device=indices.device)
    # An extra column takes what lies past the count, whatever it holds.
    target = torch.where(position < counts[..., None], indices, columns).long()
    keep = target.new_zeros(*target.shape[:-1], columns + 1, dtype=torch.bool)
    return keep.scatter_(-1, target, True)[..., :columns]


def draw_blocks(keep: Tensor, rows: int = 24, columns: int = 64) -> str:
    """A block matrix [Nq, Nk] as lines of text, of at most ``rows`` x ``columns`` characters.

    A character stands for one block or, of larger matrices, for several: " " for none of them,
    "\u2591", "\u2592", "\u2593" for a share, "\u2588" for all.
    """
    size = min(keep.shape[0], rows), min(keep.shape[1], columns)
    share = torch.nn.functional.adaptive_avg_pool2d(keep.double()[None], size)[0]
    shade = (share * 3).ceil().long() + (share == 1)
    return "\n".join("".join(" \u2591\u2592\u2593\u2588"[i] for i in row) for row in shade.tolist())


def versions_of(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """What a write in place changes; None for tensors of inference mode, which do not count."""
    if any(x is None or x.is_inference() for x in tensors):
        return None
    return tuple(x._version for x in tensors if x is not None)


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


def covered_lens(lens: Tensor | None, size: int, length: int, device: torch.device) -> Tensor:
    """int32 [B|1, blocks]: valid tokens of each block, of what the sequence's end leaves of it."""
    blocks = -(-length // size)
    starts = torch.arange(blocks, dtype=torch.int32, device=device) * size
    cover = (length - starts).clamp_(max=size)[None]
    return cover if lens is None else torch.minimum(lens, cover)


def split_lens(lens: Tensor | None, size: int, factor: int, blocks: int) -> Tensor | None:
    """Lengths of blocks that are cut into ``factor`` parts of ``size`` tokens."""
    if lens is None or factor == 1:
        return lens
    starts = torch.arange(factor, dtype=torch.int32, device=lens.device) * size
    return (lens[..., None] - starts).clamp_(0, size).flatten(1)[:, :blocks].contiguous()


def valid_tokens(lens: Tensor, size: int, length: int) -> Tensor:
    """bool [B|1, length]: whether a token is one of the first ``lens`` of its block."""
    position = torch.arange(size, device=lens.device)
    return (position < lens[..., None]).flatten(1)[:, :length]


def pairs_of_lists(
    counts: Tensor, indices: Tensor, q_lens: Tensor, kv_lens: Tensor, batch: int
) -> Tensor:
    """Token pairs that row lists keep, int64 [B|1, H|1].

    Args:
        counts, indices: as :func:`lists_from_dense` gives them, [B|1, H|1, Nq(, K)].
        q_lens, kv_lens: valid tokens of the blocks, [B|1, N]. batch: what the result is for.
    """
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    blocks = torch.where(listed, indices, 0).long().expand(batch, -1, -1, -1)
    keys = kv_lens.long().expand(batch, -1).gather(1, blocks.flatten(1)).view_as(blocks)
    return ((keys * listed).sum(-1) * q_lens.long()[:, None, :]).sum(-1)
