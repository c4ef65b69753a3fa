"""Ulysses attention of one rank: all heads of its tokens to all tokens of its heads, and back.

Heads travel in chunks: while one chunk is attended to, the next arrives and the last goes home.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .placement import Placement
from .team import Pending, Team
from .ulysses import (
    Heads,
    HeadShare,
    Swap,
    ToHeads,
    ToTokens,
    chunk_shares,
    share_heads,
    swap_of,
)

MAX_CHUNKS = 4
CHUNK_BYTES = 16 * 2**20  # a chunk that brings less than this from the others is not worth a launch

# (tensors of some heads over the whole sequence, those heads) -> (out, lse if there is one)
Core = Callable[[Sequence[Tensor], Heads], tuple[Tensor, Tensor | None]]


def ulysses_attention(
    tensors: Sequence[Tensor],
    team: Team,
    placements: tuple[Placement, Placement],
    core: Core,
    *,
    head_dim_v: int,
    return_lse: bool,
    chunks: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the tokens of this rank.

    Args:
        tensors: q, k, v [B, H, held, D], and what else travels with the query heads.
        core: attends to whole sequences of a rank's heads.
        chunks: into how many the heads of a rank are cut; None: by their size.
    """
    q, k = tensors[0], tensors[1]
    group = q.shape[1] // k.shape[1]
    shares = share_heads(q.shape[1], k.shape[1], team.size)
    chunks = _number_of_chunks(tensors, placements, shares, team.size, chunks)
    parts = chunk_shares(shares, chunks, group) if chunks > 1 else [shares]
    started = [_start(tensors, part, team, placements) for part in parts]
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    swaps_back: list[Swap] = []
    pending_back: list[Pending] = []
    for part, swaps_in in zip(parts, started, strict=True):
        mine = part[team.rank]
        whole = [
            x
            for swap, pending, xs in swaps_in
            for x in ToHeads.apply(swap, pending, *xs)
        ]  # fmt: skip
        out, lse = _attend(core, whole, mine, group, head_dim_v)
        back = swap_of(team, placements[0], [[s.q for s in part]], True, "ulysses: out")
        with torch.no_grad():
            pending_back.append(back.start_to_tokens([out]))
        swaps_back.append(back)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    result = ToTokens.apply(swaps_back, pending_back, q.shape[1], *outs)
    return result, _lse_home(lses, swaps_back, q.shape[1]) if return_lse else None


def _start(
    tensors: Sequence[Tensor],
    part: Sequence[HeadShare],
    team: Team,
    placements: tuple[Placement, Placement],
) -> list[tuple[Swap, Pending, Sequence[Tensor]]]:
    """The swaps of one chunk: all tensors in one message where queries and keys lie alike."""
    q_heads, kv_heads = [s.q for s in part], [s.kv for s in part]
    heads = [q_heads, kv_heads, kv_heads, *[q_heads] * (len(tensors) - 3)]
    together = [([0], placements[0]), ([1, 2], placements[1])]
    if placements[0] is placements[1]:
        together = [(list(range(len(tensors))), placements[0])]
    started: list[tuple[Swap, Pending, Sequence[Tensor]]] = []
    for indices, placement in together:
        xs = [tensors[i] for i in indices]
        swap = swap_of(team, placement, [heads[i] for i in indices], False, "ulysses: q, k, v")
        with torch.no_grad():
            started.append((swap, swap.start_to_heads(xs), xs))
    return started


def _attend(
    core: Core, whole: Sequence[Tensor], share: HeadShare, group: int, head_dim_v: int
) -> tuple[Tensor, Tensor | None]:
    q, k, v = whole[:3]
    if q.shape[1] == 0:  # fewer heads than ranks: nothing to do, but part of the backward pass
        link = torch.stack([x.sum() for x in whole]).sum()
        shape = (q.shape[0], 0, q.shape[2])
        out = q.new_zeros(*shape, head_dim_v) + link
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return out, q.new_zeros(shape, dtype=lse_dtype) + link.to(lse_dtype)
    index = share.key_head_of_query_heads(group)
    if index is not None:
        chosen = torch.tensor(index, device=q.device)
        k, v = k.index_select(1, chosen), v.index_select(1, chosen)
    return core([q, k, v, *whole[3:]], share.q)


def _lse_home(lses: list[Tensor], swaps: list[Swap], heads: int) -> Tensor:
    rows = [lse[..., None] for lse in lses]
    with torch.no_grad():
        pending = [swap.start_to_tokens([x]) for swap, x in zip(swaps, rows, strict=True)]
    return ToTokens.apply(swaps, pending, heads, *rows)[..., 0]


def _number_of_chunks(
    tensors: Sequence[Tensor],
    placements: tuple[Placement, Placement],
    shares: Sequence[HeadShare],
    ranks: int,
    chunks: int | None,
) -> int:
    """The same on all ranks: it follows from what they agreed on."""
    q, k = tensors[:2]
    most = max(s.kv[1] - s.kv[0] for s in shares)
    if ranks == 1 or k.shape[1] < ranks:
        return 1
    if chunks is not None:
        return min(chunks, most)
    tokens = sum(placements[0].source_lengths) // ranks
    token_bytes = sum(x.shape[1] * x.shape[3] for x in tensors) * q.element_size()
    received = q.shape[0] * tokens * token_bytes * (ranks - 1) // ranks
    return max(1, min(MAX_CHUNKS, most, received // CHUNK_BYTES))
