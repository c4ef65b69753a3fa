"""Ulysses: every rank trades its part of the tokens for all tokens of its part of the heads.

After S. A. Jacobs et al., "DeepSpeed Ulysses", 2023. One exchange brings q, k and v together, one
takes the output back. Messages are [tokens, batch, channels of the receiver's heads], so what has
arrived is the whole sequence of a rank's heads and is attended to in place, through its strides.
What a rank has of its own heads does not travel: it is copied to where it is read.

Heads and tokens need not be divisible by the number of ranks: a rank may have fewer heads than
another, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .placement import Placement, take
from .team import Pending, Team, Traffic, current_traffic, start_messages
from .words import as_words, gather, scatter

Heads = tuple[int, int]  # first, past the last
MAX_CHUNKS = 4
CHUNK_BYTES = 16 * 2**20  # a chunk that brings less than this from the others is not worth a launch


def number_of_chunks(received: int) -> int:
    """Into how many chunks of heads a rank cuts its work when others send it so many bytes."""
    return max(1, min(MAX_CHUNKS, received // CHUNK_BYTES))


def cut_heads(heads: int, chunks: int) -> list[Heads]:
    """Even runs of heads, none empty but where there is no head."""
    chunks = max(1, min(chunks, heads))
    return [(heads * c // chunks, heads * (c + 1) // chunks) for c in range(chunks)]


@dataclass(frozen=True)
class HeadShare:
    """The query heads of one rank, and the key heads that they read."""

    q: Heads
    kv: Heads

    def key_head_of_query_heads(self, group: int) -> list[int] | None:
        """For each query head its key head among ``kv``; None where plain GQA says the same."""
        wanted = [h // group - self.kv[0] for h in range(*self.q)]
        q_heads, kv_heads = self.q[1] - self.q[0], self.kv[1] - self.kv[0]
        if q_heads % max(kv_heads, 1) == 0:
            plain = [h // (q_heads // kv_heads) for h in range(q_heads)] if q_heads else []
            if wanted == plain:
                return None
        return wanted


def share_heads(q_heads: int, kv_heads: int, ranks: int) -> list[HeadShare]:
    """Even shares: whole key heads where there are enough, otherwise query heads."""
    group = q_heads // kv_heads
    shares = []
    for r in range(ranks):
        if kv_heads >= ranks:
            kv = kv_heads * r // ranks, kv_heads * (r + 1) // ranks
            shares.append(HeadShare((kv[0] * group, kv[1] * group), kv))
        else:
            q = q_heads * r // ranks, q_heads * (r + 1) // ranks
            kv = (q[0] // group, -(-q[1] // group)) if q[0] < q[1] else (0, 0)
            shares.append(HeadShare(q, kv))
    return shares


def chunk_shares(shares: Sequence[HeadShare], chunks: int, group: int) -> list[list[HeadShare]]:
    """The shares of all ranks cut into ``chunks`` parts along whole key heads: [chunk][rank]."""
    parts = []
    for c in range(chunks):
        part = []
        for share in shares:
            first, heads = share.kv[0], share.kv[1] - share.kv[0]
            kv = first + heads * c // chunks, first + heads * (c + 1) // chunks
            part.append(HeadShare((kv[0] * group, kv[1] * group), kv))
        parts.append(part)
    return parts


@dataclass
class Travelling:
    """A started swap: what came from each rank [tokens, B, channels], and what was given to it."""

    pending: Pending
    given: Sequence[Tensor]
    parts: list[Tensor]
    whole: Tensor | None = None  # all parts, if they lie one after another in the order of slots


@dataclass(frozen=True)
class Swap:
    """One trade of tokens for heads among the ranks of a team.

    Args:
        heads: for each tensor that travels together, the heads that each rank gets.
        copies: True where every holder of a token takes part (outputs go to all copies, and the
            gradients of all copies are summed), False where only its first holder does.
    """

    team: Team
    placement: Placement
    heads: tuple[tuple[Heads, ...], ...]
    copies: bool
    label: str
    traffic: Traffic | None

    @property
    def gradient(self) -> Swap:
        """Of the way back of gradients."""
        label = f"{self.label}, gradient"
        return Swap(self.team, self.placement, self.heads, self.copies, label, self.traffic)

    @property
    def is_one_to_one(self) -> bool:
        """Every token and head that a rank holds is sent, and to one rank only."""
        pairs = [pair for heads in self.heads for pair in pairwise(heads)]
        return not self.placement.has_copies and all(a[1] <= b[0] for a, b in pairs)

    def _lengths(self) -> list[int]:
        return self.placement.lengths if self.copies else self.placement.source_lengths

    def _slots(self, rank: int, device: torch.device) -> Tensor | slice:
        return self.placement.on_device(rank, "slots" if self.copies else "source_slots", device)

    def _sources(self, device: torch.device) -> Tensor | slice:
        """The tokens of this rank that take part."""
        if self.copies:
            return slice(0, self.placement.lengths[self.team.rank])
        return self.placement.on_device(self.team.rank, "sources", device)

    def _counts(self, rank: int) -> list[int]:
        """Heads of ``rank``, tensor by tensor."""
        return [heads[rank][1] - heads[rank][0] for heads in self.heads]

    def _messages(
        self, like: Sequence[Tensor], lengths: Sequence[int], mine: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """(memory, in it a message for each rank [tokens, B, channels of its heads], or, with
        ``mine``, of this rank's).
        """
        me, x = self.team.rank, like[0]
        widths = [
            sum(n * y.shape[3] for n, y in zip(self._counts(me if mine else p), like, strict=True))
            for p in range(self.team.size)
        ]
        sizes = [n * x.shape[0] * w for n, w in zip(lengths, widths, strict=True)]
        flat = torch.empty(sum(sizes), dtype=x.dtype, device=x.device)
        return flat, [
            part.view(n, x.shape[0], w)
            for part, n, w in zip(flat.split(sizes), lengths, widths, strict=True)
        ]

    # -- tokens -> heads ---------------------------------------------------------------------------

    def start_to_heads(self, xs: Sequence[Tensor]) -> Travelling:
        """Sends the parts [B, H, held, D] of this rank; all have one dtype."""
        me, lengths = self.team.rank, self._lengths()
        in_place = self.placement.is_in_order() and not (self.copies and self.placement.has_copies)
        _, sends = self._messages(
            xs, [0 if p == me else lengths[me] for p in range(self.team.size)], mine=False
        )
        flat, parts = self._messages(
            xs, [n if in_place or p != me else 0 for p, n in enumerate(lengths)], mine=True
        )
        for p, part in enumerate(sends):
            if p != me:
                self._pack(part, xs, p)
        pending = start_messages(sends, parts, self.team, self.label, self.traffic)
        if not in_place:
            return Travelling(pending, xs, parts)
        self._pack(parts[me], xs, me)
        return Travelling(pending, xs, parts, flat.view(sum(lengths), *parts[me].shape[1:]))

    def _pack(self, rows: Tensor, xs: Sequence[Tensor], rank: int) -> None:
        sources = self._sources(xs[0].device)
        targets = _columns(rows, self._counts(rank), [x.shape[3] for x in xs])
        for target, x, heads in zip(targets, xs, self.heads, strict=True):
            first, last = heads[rank]
            gather(target, x[:, first:last].permute(2, 0, 1, 3), sources, 0)

    def finish_to_heads(self, travelling: Travelling) -> list[Tensor]:
        """[B, heads of this rank, slots, D] of each tensor; slots that are nobody's are 0."""
        travelling.pending.wait()
        channels = [x.shape[3] for x in travelling.given]
        whole = travelling.whole
        if whole is None:
            whole = self._in_order_of_slots(travelling)
        parts = _columns(whole, self._counts(self.team.rank), channels)
        return [part.permute(1, 2, 0, 3) for part in parts]

    def _in_order_of_slots(self, travelling: Travelling) -> Tensor:
        placement, me = self.placement, self.team.rank
        like, device = travelling.parts[me], travelling.parts[me].device
        shape = (placement.length, *like.shape[1:])
        if self.copies and placement.has_copies:
            parts = list(travelling.parts)
            parts[me] = like.new_empty(self._lengths()[me], *like.shape[1:])
            self._pack(parts[me], travelling.given, me)
            whole = like.new_zeros(shape)
            for p, part in enumerate(parts):
                whole[self._slots(p, device)] += part
            return whole
        whole = like.new_empty(shape)
        holes = placement.holes(device)
        if holes is not None:
            as_words(whole)[0].index_fill_(0, holes, 0)
        for p, part in enumerate(travelling.parts):
            if p != me:
                scatter(whole, part, self._slots(p, device), 0)
        channels = [x.shape[3] for x in travelling.given]
        own, sources = _columns(whole, self._counts(me), channels), self._sources(device)
        for target, x, heads in zip(own, travelling.given, self.heads, strict=True):
            mine = take(x[:, slice(*heads[me])].permute(2, 0, 1, 3), sources, 0)
            scatter(target, mine, self._slots(me, device), 0)
        return whole

    # -- heads -> tokens ---------------------------------------------------------------------------

    def start_to_tokens(self, ys: Sequence[Tensor]) -> Travelling:
        """Sends [B, heads of this rank, slots, D] of each tensor back to who holds the tokens."""
        me, lengths, device = self.team.rank, self._lengths(), ys[0].device
        _, sends = self._messages(
            ys, [0 if p == me else n for p, n in enumerate(lengths)], mine=True
        )
        _, parts = self._messages(
            ys, [0 if p == me else lengths[me] for p in range(self.team.size)], mine=False
        )
        channels = [y.shape[3] for y in ys]
        for p, rows in enumerate(sends):
            if p != me:
                targets = _columns(rows, self._counts(me), channels)
                for target, y in zip(targets, ys, strict=True):
                    gather(target, y.permute(2, 0, 1, 3), self._slots(p, device), 0)
        pending = start_messages(sends, parts, self.team, self.label, self.traffic)
        return Travelling(pending, ys, parts)

    def finish_to_tokens(self, travelling: Travelling, into: Sequence[Tensor], adds: bool) -> None:
        """Writes what arrived into tensors [B, H, held, D]; ``adds`` where heads come twice."""
        travelling.pending.wait()
        me, device = self.team.rank, into[0].device
        sources, channels = self._sources(device), [x.shape[3] for x in into]
        for p, part in enumerate(travelling.parts):
            if p == me:
                slots = self._slots(me, device)
                pieces = [take(y.permute(2, 0, 1, 3), slots, 0) for y in travelling.given]
            else:
                pieces = _columns(part, self._counts(p), channels)
            for x, heads, piece in zip(into, self.heads, pieces, strict=True):
                if piece.numel() == 0:
                    continue
                target = x[:, slice(*heads[p])].permute(2, 0, 1, 3)
                if adds:
                    target[sources] += piece
                else:
                    scatter(target, piece, sources, 0)


def _columns(rows: Tensor, counts: Sequence[int], channels: Sequence[int]) -> list[Tensor]:
    """Views [tokens, B, heads, D] of tensors whose channels lie side by side in rows."""
    widths = [n * d for n, d in zip(counts, channels, strict=True)]
    return [
        part.unflatten(-1, (n, d))
        for part, n, d in zip(rows.split(widths, -1), counts, channels, strict=True)
    ]


def swap_of(
    team: Team, placement: Placement, heads: Sequence[Sequence[Heads]], copies: bool, label: str
) -> Swap:
    return Swap(team, placement, tuple(tuple(h) for h in heads), copies, label, current_traffic())
