"""Keys of tiles that were selected by data: what travels is known only on the GPU.

Every rank tells the others which of their blocks it lists, for each batch item and head. How many
rows that makes is read on the host, once for a call; which rows they are stays on the device. A
message holds the tokens of listed blocks, keys and values side by side, one batch item and head
after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..words import copy, gather
from .ring_plan import BlockOwners
from .rows import Rows
from .team import Pending, Team, Traffic, start_exchange, start_messages
from .ulysses import Heads

if TYPE_CHECKING:
    from .gather import Chunk, GatherCall

KEYS, GRADIENTS = "ring: keys", "ring: gradients"


@dataclass(frozen=True)
class Columns:
    """Who owns the key blocks, on the device.

    Args:
        owner: int64 [blocks].
        of_ranks: int64 [blocks], the blocks of all ranks, one rank after another.
        in_order: int64 [blocks], where in ``of_ranks`` each block stands.
        own: for each rank int64, its blocks.
        counts: of each rank.
    """

    owner: Tensor
    of_ranks: Tensor
    in_order: Tensor
    own: tuple[Tensor, ...]
    counts: tuple[int, ...]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x`` [..., blocks]: the blocks of each rank."""
        return x.index_select(-1, self.of_ranks).split(self.counts, -1)


@lru_cache(maxsize=64)
def columns_of(owners: BlockOwners, device: torch.device) -> Columns:
    """Kept, like the owners."""
    columns = [owners.columns(r) for r in range(owners.ranks)]
    of_ranks = torch.cat(columns)
    return Columns(
        owners.kv_owner.to(device), of_ranks.to(device), of_ranks.argsort().to(device),
        tuple(c.to(device) for c in columns), tuple(c.numel() for c in columns),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Listing:
    """The rows that this rank sends and gets, of all heads.

    Args:
        rows: int64 [B, Hkv, blocks], rows that come of each block; of own blocks: all of its slot.
        asked: int64 [ranks, B, Hkv, own blocks], rows that each rank wants of own blocks.
        received, sent: the same for each rank and head [ranks][Hkv], on the host.
        size: slot of a block.
    """

    columns: Columns
    rows: Tensor
    asked: Tensor
    received: Sequence[Sequence[int]]
    sent: Sequence[Sequence[int]]
    size: int
    rank: int

    def counts_received(self, heads: Heads) -> list[int]:
        """Rows from each rank, own ones among them."""
        return [sum(of_rank[slice(*heads)]) for of_rank in self.received]

    def counts_sent(self, heads: Heads) -> list[int]:
        return [sum(of_rank[slice(*heads)]) for of_rank in self.sent]

    def source_of_slots(self, heads: Heads) -> Tensor:
        """int64 [B * heads * slots]: for each slot the row that belongs there, counted over what
        comes from all ranks, after one row of zeros for slots that get none.
        """
        rows = self.rows[:, slice(*heads)]
        parts = self.columns.split(rows)
        counts = torch.cat([part.reshape(-1) for part in parts])
        starts = (counts.cumsum(0) - counts + 1).split([part.numel() for part in parts])
        of_blocks = torch.cat([x.view(p.shape) for x, p in zip(starts, parts, strict=True)], -1)
        first = of_blocks.index_select(-1, self.columns.in_order)[..., None]
        row = torch.arange(self.size, device=rows.device)
        return torch.where(row < rows[..., None], first + row, 0).flatten()

    def sent_rows(self, heads: Heads) -> Tensor:
        """int64: what is sent to all ranks, as rows of own slots [B, heads, own blocks, size]."""
        counts = self.asked[:, :, slice(*heads)]
        first = torch.arange(0, counts[0].numel() * self.size, self.size, device=counts.device)
        total = sum(self.counts_sent(heads))
        return _consecutive(counts.reshape(-1), first.repeat(counts.shape[0]), total)

    def received_rows(self, heads: Heads) -> Tensor:
        """int64: what comes from the others, as rows of all slots [B, heads, blocks, size]."""
        rows = self.rows[:, slice(*heads)]
        foreign = rows.masked_fill(self.columns.owner == self.rank, 0)
        first = torch.arange(0, rows.numel() * self.size, self.size, device=rows.device)
        counts, firsts = (
            torch.cat([part.reshape(-1) for part in self.columns.split(x)])
            for x in (foreign, first.view(rows.shape))
        )
        counted = self.counts_received(heads)
        return _consecutive(counts, firsts, sum(counted) - counted[self.rank])


def _consecutive(counts: Tensor, first: Tensor, total: int) -> Tensor:
    """first[i], first[i] + 1, ... ``counts[i]`` of them, one i after another."""
    of = torch.repeat_interleave(counts, output_size=total)
    before = first - (counts.cumsum(0) - counts)
    return before[of] + torch.arange(total, device=counts.device)


def make_listing(
    wanted: Tensor,
    lens: Tensor | None,
    owners: BlockOwners,
    size: int,
    team: Team,
    traffic: Traffic | None,
) -> Listing:
    """Exchanges what is listed, bool ``wanted`` [B, Hkv, blocks]; the host waits once.

    Args:
        lens: int32 [B|1, blocks], valid tokens of each block; None: all are full.
        size: slot of a block.
    """
    columns = columns_of(owners, wanted.device)
    is_own = columns.owner == team.rank
    listed = wanted & ~is_own
    batch, heads = wanted.shape[:2]
    mine = columns.counts[team.rank]
    unit = batch * heads
    asked = start_exchange(
        torch.cat([x.reshape(-1) for x in columns.split(listed)]).view(torch.uint8),
        [n * unit for n in columns.counts], [mine * unit] * team.size, team, "listed blocks",
        traffic,
    ).wait().view(team.size, batch, heads, mine).long()  # fmt: skip
    rows = listed.long()
    if lens is None:
        rows, asked = rows * size, asked * size
    else:
        own_lens = lens.index_select(1, columns.own[team.rank])
        rows, asked = rows * lens[:, None], asked * own_lens[:, None]
    rows = rows.masked_fill(is_own, size)
    received = rows.new_zeros(team.size, heads).index_add_(0, columns.owner, rows.sum(0).T)
    counts = torch.cat([received, asked.sum((1, 3))]).tolist()
    return Listing(
        columns, rows, asked, counts[: team.size], counts[team.size :], size, team.rank
    )  # fmt: skip


class ListedKeys:
    """Keys and values of some heads on their way to who lists them, and their gradients."""

    def __init__(
        self, call: GatherCall, chunk: Chunk, listing: Listing, k: Tensor, v: Tensor
    ) -> None:
        self.call, self.listing, self.heads = call, listing, chunk.kv
        self.held = [x[:, slice(*chunk.kv)] for x in (k, v)]
        self.channels = [x.shape[3] for x in self.held]
        counts = listing.counts_received(chunk.kv)
        self._memory = k.new_empty(1 + sum(counts), sum(self.channels))
        self._memory[:1].zero_()
        parts = list(self._memory[1:].split(counts))
        own = parts[call.team.rank]
        slots = own.view(*self.held[0].shape[:3], own.shape[1]).split(self.channels, -1)
        for target, x in zip(slots, self.held, strict=True):
            copy(target, x)
        message = self._room(sum(listing.counts_sent(chunk.kv)))
        gather(message, own, listing.sent_rows(chunk.kv), 0)
        sends = message.split(listing.counts_sent(chunk.kv))
        self.pending: Pending = start_messages(sends, parts, call.team, KEYS, call.traffic)

    def _room(self, rows: int) -> Tensor:
        return self._memory.new_empty(rows, sum(self.channels))

    def finish(self) -> tuple[Tensor, Tensor]:
        """[k, v], each [B, heads, slots, D]; what is not listed for a head is 0."""
        self.pending.wait()
        source = self.listing.source_of_slots(self.heads)
        gathered = self._room(source.numel())
        gather(gathered, self._memory, source, 0)
        self._memory = self._memory.new_empty(0)
        batch, heads = self.held[0].shape[:2]
        slots = self.listing.rows.shape[2] * self.listing.size
        k, v = gathered.view(batch, heads, slots, -1).split(self.channels, -1)
        return k, v

    def start_return(self, foreign: Sequence[Tensor]) -> None:
        """Sends the gradients of the gathered keys and values home."""
        listing, me = self.listing, self.call.team.rank
        self.foreign = foreign
        grads = torch.cat(list(foreign), -1).flatten(0, 2)
        counts = listing.counts_received(self.heads)
        counts[me] = 0
        message = self._room(sum(counts))
        gather(message, grads, listing.received_rows(self.heads), 0)
        self._returned = list(
            self._room(sum(listing.counts_sent(self.heads))).split(listing.counts_sent(self.heads))
        )
        self.pending = start_messages(
            message.split(counts), self._returned, self.call.team, GRADIENTS, self.call.traffic
        )

    def finish_return(self, totals: Sequence[Tensor]) -> None:
        """Adds all gradients of the held keys and values, those of this rank first."""
        listing = self.listing
        own = listing.columns.own[self.call.team.rank]
        for total, grad in zip(totals, self.foreign, strict=True):
            mine = grad.unflatten(2, (-1, listing.size)).index_select(2, own)
            total += mine.flatten(2, 3)
        self.pending.wait()
        heads, slots = totals[0].shape[1:3]
        if slots == 0:
            return
        row = listing.sent_rows(self.heads)
        lead = torch.div(row, slots, rounding_mode="floor")
        item = torch.div(lead, heads, rounding_mode="floor")
        places = torch.stack([item, lead - item * heads, row - lead * slots])
        for entries, part in zip(
            places.split([len(x) for x in self._returned], 1), self._returned, strict=True
        ):
            if len(part):
                for total, grad in zip(totals, part.split(self.channels, -1), strict=True):
                    Rows.one_by_one(entries).add(total, grad)
