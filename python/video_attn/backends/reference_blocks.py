"""Block means and exact top-k in plain torch, on every device; a part of backend ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import BlockOps, Side

_CHUNK = 1 << 22  # scores that are looked at in one go


def _block_mean(x: Tensor, mean: Tensor, side: Side) -> None:
    if side.lens is None and side.length % side.slot == 0:  # nothing to leave out: one reduction
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean.copy_(x.unflatten(2, (-1, side.slot)).mean(3, dtype=wide))
        return
    valid, count = _valid_rows(side, x)
    for b in range(x.shape[0]):  # one head at a time bounds the copies
        at = min(b, valid.shape[0] - 1)
        for h in range(x.shape[1]):
            rows = torch.where(valid[at], _blocks(x[b, h], side), 0)
            mean[b, h] = (rows.sum(1, dtype=count.dtype) / count[at]).to(x.dtype)


def _block_mean_backward(grad: Tensor, dx: Tensor, side: Side) -> None:
    valid, count = _valid_rows(side, grad)
    for b in range(grad.shape[0]):
        at = min(b, valid.shape[0] - 1)
        for h in range(grad.shape[1]):
            share = (grad[b, h] / count[at]).to(grad.dtype)
            rows = torch.where(valid[at], share[:, None], 0).flatten(0, 1)
            dx[b, h] = rows[: side.length]


def _blocks(rows: Tensor, side: Side) -> Tensor:
    """[S, D] as [N, block_size, D]; rows past the end are zero."""
    missing = -rows.shape[0] % side.slot
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(0, (-1, side.slot))


def _valid_rows(side: Side, x: Tensor) -> tuple[Tensor, Tensor]:
    """Valid rows of the blocks, bool [B|1, N, V, 1], and how many (at least 1), [B|1, N, 1]."""
    starts = torch.arange(0, side.length, side.slot, device=x.device)
    lens = (side.length - starts).clamp(max=side.slot)[None]
    if side.lens is not None:
        lens = torch.minimum(lens, side.lens)
    valid = torch.arange(side.slot, device=x.device) < lens[..., None]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return valid[..., None], lens.clamp(min=1)[..., None].to(wide)


def _select_top_k(scores: Tensor, indices: Tensor, top_k: int, key_lens: Tensor | None) -> None:
    empty = None if key_lens is None else key_lens <= 0
    rows = max(1, _CHUNK // max(1, scores.shape[1] * scores.shape[3]))
    for b in range(scores.shape[0]):
        hidden = None if empty is None else empty[min(b, empty.shape[0] - 1)]
        for start in range(0, scores.shape[2], rows):
            part = scores[b, :, start : start + rows]
            indices[b, :, start : start + rows] = _top_k_of_rows(part, top_k, hidden)


def _top_k_of_rows(scores: Tensor, top_k: int, hidden: Tensor | None) -> Tensor:
    low = scores.isnan() if hidden is None else scores.isnan() | hidden
    scores = scores.masked_fill(low, -torch.inf)
    kth = scores.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tie = scores > kth, scores == kth
    ties = top_k - above.sum(-1, keepdim=True)
    take = above | (tie & (tie.cumsum(-1) <= ties))
    # Every taken index goes to its rank, all others to a column too many.
    rank = torch.where(take, take.cumsum(-1) - 1, top_k)
    index = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    result = index.new_empty(*scores.shape[:-1], top_k + 1)
    return result.scatter_(-1, rank, index.expand_as(rank))[..., :top_k]


def _refusal(device_type: str, arch: str) -> None:
    return None


BLOCK_OPS = BlockOps(_refusal, _block_mean, _block_mean_backward, _select_top_k)
