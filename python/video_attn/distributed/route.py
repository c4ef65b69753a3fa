"""Tokens as the ranks hold them <-> the blocks that they own.

Ranks hold any tokens; a ring works on whole blocks. A block goes to the rank that holds most of it,
and tokens that stand elsewhere are sent there and their outputs back. Where every rank holds
exactly its blocks nothing moves, nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .placement import Placement, as_slice
from .team import Team, Traffic, as_bytes, start_exchange


@dataclass(frozen=True)
class _Ways:
    """For each other end: tokens here, and slots of the block buffers they have there or here."""

    tokens: list[Tensor | slice]  # of mine, by the rank that owns their block
    slots: list[Tensor | slice]  # of my block buffer, by the rank that holds their token
    token_counts: list[int]
    slot_counts: list[int]


class Route:
    """The ways of all tokens of one rank, for one placement and ownership of its blocks."""

    def __init__(
        self, placement: Placement, owner: Tensor, block_size: int, rank: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.rank = rank
        self.held = placement.lengths[rank]
        self.length = int((owner == rank).sum()) * block_size
        ranks = len(placement.slots)
        place = torch.zeros(owner.numel(), dtype=torch.int64)  # of a block among its owner's
        for r in range(ranks):
            own = owner == r
            place[own] = torch.arange(int(own.sum()))

        def ways(copies: bool) -> _Ways:
            def tokens_of(r: int) -> Tensor:
                return torch.arange(placement.lengths[r]) if copies else placement.sources(r)

            def owned_by(r: int, by: int) -> Tensor:
                tokens = tokens_of(r)
                return tokens[owner[placement.slots[r][tokens] // block_size] == by]

            def slots_of(r: int) -> Tensor:
                slots = placement.slots[r][owned_by(r, rank)]
                return place[slots // block_size] * block_size + slots % block_size

            mine = [owned_by(rank, p) for p in range(ranks)]
            theirs = [slots_of(p) for p in range(ranks)]
            return _Ways(
                [as_slice(x, device) for x in mine], [as_slice(x, device) for x in theirs],
                [x.numel() for x in mine], [x.numel() for x in theirs],
            )  # fmt: skip

        self._of_sources, self._of_copies = ways(False), ways(True)
        # All ranks must know whether any of them has something to send.
        self.moves = (
            any(bool((owner[placement.slots[r] // block_size] != r).any()) for r in range(ranks))
            or placement.has_copies
        )
        self.is_identity = not self.moves and self._of_copies.slots[rank] == slice(0, self.length)

    def ways(self, copies: bool) -> _Ways:
        return self._of_copies if copies else self._of_sources

    def bytes_to_blocks(self, row_bytes: int, copies: bool = False) -> int:
        """Bytes that this rank sends to others, of tokens of ``row_bytes``."""
        counts = self.ways(copies).token_counts
        return row_bytes * sum(n for p, n in enumerate(counts) if p != self.rank)

    def bytes_to_tokens(self, row_bytes: int, copies: bool = True) -> int:
        counts = self.ways(copies).slot_counts
        return row_bytes * sum(n for p, n in enumerate(counts) if p != self.rank)


def _to_blocks(x: Tensor, route: Route, team: Team, copies: bool, traffic: Any) -> Tensor:
    """[B, H, held, D] -> [B, H, length, D]; with ``copies``, all copies of a token are summed."""
    ways = route.ways(copies)
    result = _rows(x, route.length)
    arrived = _swap(x, ways.tokens, ways.token_counts, ways.slot_counts, route, team, traffic)
    for slots, part in zip(ways.slots, arrived, strict=True):
        if copies:
            result[:, :, slots] += part
        else:
            result[:, :, slots] = part
    return result


def _to_tokens(y: Tensor, route: Route, team: Team, copies: bool, traffic: Any) -> Tensor:
    """[B, H, length, D] -> [B, H, held, D]; without ``copies`` only first holders get any."""
    ways = route.ways(copies)
    result = _rows(y, route.held)
    arrived = _swap(y, ways.slots, ways.slot_counts, ways.token_counts, route, team, traffic)
    for tokens, part in zip(ways.tokens, arrived, strict=True):
        result[:, :, tokens] = part
    return result


def _swap(
    x: Tensor,
    index: list[Tensor | slice],
    send: list[int],
    receive: list[int],
    route: Route,
    team: Team,
    traffic: Traffic | None,
) -> list[Tensor]:
    """x[:, :, index[p]] to each rank p; what comes from each, [B, H, receive[p], D]."""
    batch, heads, _, channels = x.shape
    if not route.moves:
        return [x[:, :, i] for i in index]
    row = batch * heads * channels
    sent = torch.empty(sum(send) * row, dtype=x.dtype, device=x.device)
    for i, part in zip(index, sent.split([n * row for n in send]), strict=True):
        if part.numel():
            part.view(batch, heads, -1, channels).copy_(x[:, :, i])
    unit = row * x.element_size()
    arrived = start_exchange(
        as_bytes(sent), [n * unit for n in send], [n * unit for n in receive], team,
        "tokens <-> blocks", traffic,
    ).wait().view(x.dtype)  # fmt: skip
    return [
        part.view(batch, heads, n, channels)
        for part, n in zip(arrived.split([n * row for n in receive]), receive, strict=True)
    ]


def _rows(x: Tensor, length: int) -> Tensor:
    """Zeros [B, H, length, D] in the memory order [B, length, H, D]."""
    batch, heads, _, channels = x.shape
    return x.new_zeros(batch, length, heads, channels).transpose(1, 2)


class ToBlocks(torch.autograd.Function):
    """Held tokens to the slots of owned blocks. The gradient goes to the copy that was used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, team: Team, traffic: Any) -> Tensor:
        ctx.arguments = route, team
        ctx.traffic = traffic
        return _to_blocks(x, route, team, False, traffic)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        route, team = ctx.arguments
        return _to_tokens(grad, route, team, False, ctx.traffic), None, None, None


class ToTokens(torch.autograd.Function):
    """Slots of owned blocks to every holder of a token. Gradients of all copies are summed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, route: Route, team: Team, traffic: Any) -> Tensor:
        ctx.arguments = route, team
        ctx.traffic = traffic
        return _to_tokens(y, route, team, True, traffic)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        route, team = ctx.arguments
        return _to_blocks(grad, route, team, True, ctx.traffic), None, None, None


def to_blocks(x: Tensor, route: Route, team: Team, traffic: Traffic | None) -> Tensor:
    return x if route.is_identity else ToBlocks.apply(x, route, team, traffic)


def to_tokens(y: Tensor, route: Route, team: Team, traffic: Traffic | None) -> Tensor:
    return y if route.is_identity else ToTokens.apply(y, route, team, traffic)
