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


def versions_of(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """What a write in place changes; None for tensors of inference mode, which do not count."""
    if any(x is None or x.is_inference() for x in tensors):
        return None
    return tuple(x._version for x in tensors if x is not None)


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
