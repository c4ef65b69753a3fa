"""Ulysses attention of one rank: all heads of its tokens to all tokens of its heads, and back.

Heads travel in chunks: while one chunk is attended to, the next arrives and the last goes home.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .placement import Placement
from .team import Team
from .trade import Arrive, Depart, Home, Leave, Trade
from .ulysses import (
    Heads,
    HeadShare,
    Swap,
    chunk_shares,
    number_of_chunks,
    share_heads,
    swap_of,
)

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
    there = Trade([_way_in(part, len(tensors), team, placements) for part in parts])
    back = there.gradient()
    ties = Depart.apply(there, back, *tensors)
    homeward = _Homeward(parts, team, placements[0])
    for chunk, part in enumerate(parts):
        whole = Arrive.apply(there, back, chunk, ties[chunk])
        homeward.send(chunk, *_attend(core, whole, part[team.rank], group, head_dim_v))
    held = placements[0].lengths[team.rank]
    return homeward.results((q.shape[0], q.shape[1], held), head_dim_v, return_lse)


def _way_in(
    part: Sequence[HeadShare], tensors: int, team: Team, placements: tuple[Placement, Placement]
) -> list[tuple[Swap, list[int]]]:
    """The swaps of one chunk: all tensors in one message where queries and keys lie alike."""
    q_heads, kv_heads = [s.q for s in part], [s.kv for s in part]
    heads = [q_heads, kv_heads, kv_heads, *[q_heads] * (tensors - 3)]
    together = [(placements[0], [0]), (placements[1], [1, 2])]
    if placements[0] is placements[1]:
        together = [(placements[0], list(range(tensors)))]
    return [
        (swap_of(team, placement, [heads[i] for i in places], False, "ulysses: q, k, v"), places)
        for placement, places in together
    ]


class _Homeward:
    """The way of the outputs, and of their log-sum-exps if they are wanted."""

    def __init__(
        self, parts: Sequence[Sequence[HeadShare]], team: Team, placement: Placement
    ) -> None:
        swaps = [
            [(swap_of(team, placement, [[s.q for s in part]], True, "ulysses: out"), [0])]
            for part in parts
        ]
        self.out, self.lse = Trade(swaps), Trade(swaps)
        self.out_back, self.lse_back = self.out.gradient(), self.lse.gradient()
        self.ties: list[Tensor] = []
        self.lses: list[Tensor] = []

    def send(self, chunk: int, out: Tensor, lse: Tensor | None) -> None:
        self.ties.append(Leave.apply(self.out, self.out_back, chunk, out))
        if lse is not None:
            self.lses.append(lse)

    def results(
        self, shape: tuple[int, int, int], head_dim_v: int, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        lse = None
        if return_lse:
            ties = [
                Leave.apply(self.lse, self.lse_back, chunk, one[..., None])
                for chunk, one in enumerate(self.lses)
            ]
            lse = Home.apply(self.lse, self.lse_back, (*shape, 1), *ties)[..., 0]
        return Home.apply(self.out, self.out_back, (*shape, head_dim_v), *self.ties), lse


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
    fewest = 2 if q.shape[1] == k.shape[1] else 1  # a launch of one head leaves a GPU half idle
    return max(1, min(number_of_chunks(received), most // fewest))
