"""Tokens as the ranks hold them <-> the blocks that they own.

Ranks hold any tokens; a ring works on whole blocks. A block goes to the rank that holds most of it,
and tokens that stand elsewhere are sent there and their outputs back. Where every rank holds
exactly its blocks nothing moves, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..words import as_words, gather, scatter
from .placement import Placement, as_slice, take
from .team import Team, Traffic, start_messages


@dataclass(frozen=True)
class _Way:
    """What moves where, of one rank.

    Args:
        sends, receives: rows here that go to each rank, and places of the result that rows from
            each rank come to; of this rank itself too.
        own: for each place of the result a row here: the right one where it is here.
        holes: places of the result that no row comes to; None: there are none.
        length: of the result.
    """

    sends: list[Tensor | slice]
    receives: list[Tensor | slice]
    send_counts: list[int]
    receive_counts: list[int]
    own: Tensor | slice
    holes: Tensor | None
    length: int

    @classmethod
    def of(
        cls, sends: Sequence[Tensor], receives: Sequence[Tensor], rank: int, length: int,
        device: torch.device,
    ) -> _Way:  # fmt: skip
        own = torch.zeros(length, dtype=torch.int64)
        own[receives[rank]] = sends[rank]
        empty = torch.ones(length, dtype=torch.bool)
        for places in receives:
            empty[places] = False
        holes = empty.nonzero().flatten()
        return cls(
            [as_slice(x, device) for x in sends], [as_slice(x, device) for x in receives],
            [x.numel() for x in sends], [x.numel() for x in receives], as_slice(own, device),
            holes.to(device) if holes.numel() else None, length,
        )  # fmt: skip


@dataclass(frozen=True)
class _Ways:
    """Held tokens to the slots of this rank's blocks, and back."""

    to_slots: _Way
    to_tokens: _Way

    @property
    def tokens(self) -> list[Tensor | slice]:
        """Of mine, by the rank that owns their block."""
        return self.to_slots.sends

    @property
    def slots(self) -> list[Tensor | slice]:
        """Of my block buffer, by the rank that holds their token."""
        return self.to_slots.receives


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
                _Way.of(mine, theirs, rank, self.length, device),
                _Way.of(theirs, mine, rank, self.held, device),
            )

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
        counts = self.ways(copies).to_slots.send_counts
        return row_bytes * sum(n for p, n in enumerate(counts) if p != self.rank)

    def bytes_to_tokens(self, row_bytes: int, copies: bool = True) -> int:
        counts = self.ways(copies).to_tokens.send_counts
        return row_bytes * sum(n for p, n in enumerate(counts) if p != self.rank)


def _to_blocks(x: Tensor, route: Route, team: Team, copies: bool, traffic: Any) -> Tensor:
    """[B, H, held, D] -> [B, H, length, D]; with ``copies``, all copies of a token are summed."""
    ways = route.ways(copies)
    if not copies:
        return _move(x, ways.to_slots, route, team, traffic)
    batch, heads, _, channels = x.shape
    result = x.new_zeros(route.length, batch, heads, channels)
    swap = _Swap(x, ways.to_slots, route, team, traffic)
    for p, part in enumerate(swap.arrived()):
        if p == route.rank:
            part = take(x.permute(2, 0, 1, 3), ways.tokens[p], 0)
        result[ways.slots[p]] += part
    return result.permute(1, 2, 0, 3)


def _to_tokens(y: Tensor, route: Route, team: Team, copies: bool, traffic: Any) -> Tensor:
    """[B, H, length, D] -> [B, H, held, D]; without ``copies`` only first holders get any."""
    return _move(y, route.ways(copies).to_tokens, route, team, traffic)


class _Swap:
    """Rows [n, B, H, D] of a tensor [B, H, S, D] on their way to the other ranks."""

    def __init__(
        self, x: Tensor, way: _Way, route: Route, team: Team, traffic: Traffic | None
    ) -> None:
        batch, heads, _, channels = x.shape
        rows, me = x.permute(2, 0, 1, 3), route.rank
        send = [0 if p == me else n for p, n in enumerate(way.send_counts)]
        receive = [0 if p == me else n for p, n in enumerate(way.receive_counts)]
        sent = x.new_empty(sum(send), batch, heads, channels)
        parts = sent.split(send)
        for p, part in enumerate(parts):
            if p != me:
                gather(part, rows, way.sends[p], 0)
        self._parts = list(x.new_empty(sum(receive), batch, heads, channels).split(receive))
        self._pending = None
        if route.moves:
            self._pending = start_messages(parts, self._parts, team, "tokens <-> blocks", traffic)

    def arrived(self) -> list[Tensor]:
        """[n, B, H, D] from each rank; nothing from this one."""
        if self._pending is not None:
            self._pending.wait()
        return self._parts


def _move(x: Tensor, way: _Way, route: Route, team: Team, traffic: Traffic | None) -> Tensor:
    """Rows of ``x`` [B, H, S, D] to where they belong, own ones while the others travel."""
    swap = _Swap(x, way, route, team, traffic)
    batch, heads, held, channels = x.shape
    result = x.new_empty(way.length, batch, heads, channels)
    if held:
        gather(result, x.permute(2, 0, 1, 3), way.own, 0)
    for p, part in enumerate(swap.arrived()):
        if p != route.rank:
            scatter(result, part, way.receives[p], 0)
    if way.holes is not None:
        as_words(result)[0].index_fill_(0, way.holes, 0)
    return result.permute(1, 2, 0, 3)


class _Move(torch.autograd.Function):
    """Held tokens to the slots of owned blocks, or back; a gradient takes the other way.

    To blocks comes one copy of a token, and the gradient goes to that copy alone. Back, a token
    goes to every holder, and the gradients of all copies are summed: ``copies``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, to_blocks: bool, route: Route, team: Team, traffic: Traffic | None
    ) -> Tensor:
        ctx.arguments = not to_blocks, route, team, not to_blocks, traffic
        return _one_way(x, to_blocks, route, team, not to_blocks, traffic)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _one_way(grad, *ctx.arguments), None, None, None, None


def _one_way(x: Tensor, to_blocks: bool, *arguments: Any) -> Tensor:
    return (_to_blocks if to_blocks else _to_tokens)(x, *arguments)


def to_blocks(x: Tensor, route: Route, team: Team, traffic: Traffic | None) -> Tensor:
    return x if route.is_identity else _Move.apply(x, True, route, team, traffic)


def to_tokens(y: Tensor, route: Route, team: Team, traffic: Traffic | None) -> Tensor:
    return y if route.is_identity else _Move.apply(y, False, route, team, traffic)
