"""What moves where in a sparse ring: block owners, keys to gather, bytes and balance.

A rank owns blocks of queries. It works with the key blocks that some block of its queries lists,
and every rank sends it the tokens of these that it holds. A few rows that list nearly everything,
such as text, would pull all keys to their owner: such *wide* rows travel to the keys instead, and
what each rank finds for them, among the key blocks that it owns, is merged at their owner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .placement import Placement
from .rows import Gathering, Rows
from .ulysses import Heads

if TYPE_CHECKING:
    from .listed import Listing

WIDE_SHARE = 0.5  # rows that list more than this share of all key blocks may be wide
WIDE_PARTS = 8  # that a rank's keys are cut into for wide rows: these few would keep few units busy
MOST_OWNED = 1.05  # times the tokens that any rank holds


def owners_of_blocks(placement: Placement, block_size: int) -> Tensor:
    """int64 [blocks]: the rank that owns each block.

    It is the rank that holds most of it, of equals the first; copies count for their first holder.
    Where that would give a rank many more tokens than any holds (tiles of a video in raster order,
    of which every rank holds a slice), the blocks are dealt in their order instead, to each rank as
    many tokens as it holds. Blocks of padding alone go to the owner of the block before them.
    """
    blocks = -(-placement.length // block_size)
    held = torch.zeros(len(placement.slots), blocks, dtype=torch.int64)
    for rank in range(len(placement.slots)):
        block = placement.source_slots(rank) // block_size
        held[rank].index_add_(0, block, torch.ones_like(block))
    tokens, lengths = held.sum(0), held.sum(1)
    owner = held.argmax(0)
    owned = torch.zeros_like(lengths).index_add_(0, owner, tokens)
    if int(owned.max()) > MOST_OWNED * int(lengths.max()):
        middles = tokens.cumsum(0) - tokens // 2
        owner = torch.searchsorted(lengths.cumsum(0), middles, right=True)
        owner = owner.clamp_(max=len(placement.slots) - 1)
    for empty in (tokens == 0).nonzero().flatten().tolist():
        owner[empty] = owner[empty - 1] if empty else 0
    return owner


@dataclass(frozen=True)
class WideRows:
    """Rows that travel to the keys: the blocks each rank owns, and the mask over this rank's keys.

    Args:
        counts: wide blocks of each rank.
        own: int64, the wide ones among this rank's query blocks.
        mask: of all wide blocks, in rank order, over the keys that this rank has gathered, where
            they list those of its own blocks, ``in_parts``; None: it has none.
    """

    counts: tuple[int, ...]
    own: Tensor
    mask: BlockMask | None


@dataclass(frozen=True)
class RingWork:
    """What one rank does for some heads: it gathers keys and attends to them, once.

    Args:
        mask: of its query blocks over the gathered keys; None: it lists nothing.
    """

    gathering: Gathering | Listing
    mask: BlockMask | None
    wide: WideRows | None = None


@dataclass(frozen=True, eq=False)
class BlockOwners:
    """Who owns which blocks, for queries and keys alike; CPU tensors."""

    q_owner: Tensor
    kv_owner: Tensor
    ranks: int

    def rows(self, rank: int) -> Tensor:
        return (self.q_owner == rank).nonzero().flatten()

    def columns(self, rank: int) -> Tensor:
        return (self.kv_owner == rank).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class RingPlan:
    """The cut of one mask for all ranks of a ring. Read on the host, once per mask.

    Args:
        kv_place: which key tokens the ranks hold.
        mask: of the whole sequence, on the CPU.
        keep: bool [B|1, H|1, Nq, Nk], its blocks, without the wide rows.
        wanted: bool [ranks, B|1, Hkv|1, Nk]: key blocks that the rows of each rank list, and with
            wide rows those that it owns.
        wide: int64, the wide query blocks, in the order of ranks.
    """

    owners: BlockOwners
    kv_place: Placement
    mask: BlockMask
    keep: Tensor
    wanted: Tensor
    wide: Tensor
    _work: dict[Any, RingWork] = field(default_factory=dict)

    def work_of(
        self, rank: int, device: torch.device, batch: int, kv_heads: Heads, group: int
    ) -> RingWork:
        """The work of a rank for some key heads and their groups of query heads; kept."""
        key = rank, device, *((batch, kv_heads) if self.wanted[0, :, :, 0].numel() > 1 else ())
        if key not in self._work:
            self._work[key] = self._build(rank, device, batch, kv_heads, group)
        return self._work[key]

    def _build(
        self, rank: int, device: torch.device, batch: int, kv_heads: Heads, group: int
    ) -> RingWork:
        heads = slice(kv_heads[0] * group, kv_heads[1] * group)
        keep = self.keep if self.keep.shape[1] == 1 else self.keep[:, heads]
        columns = self._columns(rank)
        rows = self.owners.rows(rank)
        mask = sub_mask(self.mask, keep[:, :, rows][..., columns], rows, columns, device)
        ranks = range(self.owners.ranks)
        sends = [self._message(rank, p, device, batch, kv_heads) for p in ranks]
        receives = [self._message(p, rank, device, batch, kv_heads) for p in ranks]
        own = sends[rank]
        nothing = Rows(slice(0, 0))
        slots = columns.numel() * self.mask.kv_block_size
        gathering = Gathering(
            slots, (nothing, nothing) if own is None else own,
            tuple(None if m is None or p == rank else m[0] for p, m in enumerate(sends)),
            tuple(None if m is None or p == rank else m[1] for p, m in enumerate(receives)),
            self._holes(rank, slots, device), self.most_rows > 0,
        )  # fmt: skip
        return RingWork(gathering, mask, self._wide_rows(rank, columns, heads, device))

    def _columns(self, rank: int) -> Tensor:
        """int64, ascending: the key blocks that a rank gathers."""
        return self.wanted[rank].flatten(0, 1).any(0).nonzero().flatten()

    def _slots_there(self, sender: int, receiver: int) -> tuple[Tensor, Tensor]:
        """Of the tokens that ``sender`` is the source of: their blocks, and where they belong in
        the memory of ``receiver`` (anything for those that it does not gather).
        """
        size, columns = self.mask.kv_block_size, self._columns(receiver)
        slots = self.kv_place.source_slots(sender)
        blocks = slots // size
        return blocks, torch.searchsorted(columns, blocks) * size + slots % size

    def _message(
        self, sender: int, receiver: int, device: torch.device, batch: int, kv_heads: Heads
    ) -> tuple[Rows, Rows] | None:
        """(rows at the sender, rows at the receiver); what a rank has itself: of all heads."""
        tokens = self.kv_place.sources(sender)
        blocks, there = self._slots_there(sender, receiver)
        wanted = self.wanted[receiver]
        wanted = wanted if wanted.shape[1] == 1 else wanted[:, slice(*kv_heads)]
        listed = wanted.flatten(0, 1).any(0)[blocks]
        if sender == receiver:  # nothing travels: as the memory is laid out
            listed = self.wanted[receiver].flatten(0, 1).any(0)[blocks]
        tokens, blocks, there = tokens[listed], blocks[listed], there[listed]
        if tokens.numel() == 0:
            return None
        chosen = wanted[..., blocks]
        if sender == receiver or bool(chosen.all()):
            return Rows.of_tokens(tokens, device), Rows.of_tokens(there, device)
        item, head, at = chosen.expand(batch, kv_heads[1] - kv_heads[0], -1).nonzero().T
        here, there = (torch.stack([item, head, x[at]]).to(device) for x in (tokens, there))
        return Rows.one_by_one(here), Rows.one_by_one(there)

    def _holes(self, rank: int, slots: int, device: torch.device) -> Tensor | None:
        empty = torch.ones(slots, dtype=torch.bool)
        gathered = torch.zeros(self.wanted.shape[-1], dtype=torch.bool)
        gathered[self._columns(rank)] = True
        for sender in range(self.owners.ranks):
            blocks, there = self._slots_there(sender, rank)
            empty[there[gathered[blocks]]] = False
        holes = empty.nonzero().flatten()
        return holes.to(device) if holes.numel() else None

    def _wide_rows(
        self, rank: int, columns: Tensor, heads: slice, device: torch.device
    ) -> WideRows | None:
        if self.wide.numel() == 0:
            return None
        owner = self.owners.q_owner[self.wide]
        counts = tuple(int((owner == r).sum()) for r in range(self.owners.ranks))
        own = torch.searchsorted(self.owners.rows(rank), self.wide[owner == rank])
        part = self.mask.to_dense()[:, :, self.wide][..., columns]
        part = part & (self.owners.kv_owner[columns] == rank)
        part = part if part.shape[1] == 1 else part[:, heads]
        rows = self.wide.repeat(WIDE_PARTS)
        mask = sub_mask(self.mask, in_parts(part), rows, columns, device)
        return WideRows(counts, own.to(device), mask)

    # -- numbers -----------------------------------------------------------------------------------

    def pairs(self) -> Tensor:
        """float64 [ranks]: pairs that each rank attends to, of the mask's batch and heads."""
        kv_lens = self.mask.kv_lens()[:, None, None].double()
        q_lens = self.mask.q_lens()[:, None].double()
        per_row = ((self.keep.double() * kv_lens).sum(-1) * q_lens).sum((0, 1))
        done = torch.zeros(self.owners.ranks, dtype=torch.float64)
        done.index_add_(0, self.owners.q_owner, per_row)
        if self.wide.numel():
            wide = self.mask.to_dense()[:, :, self.wide].double() * q_lens[..., self.wide, None]
            done.index_add_(0, self.owners.kv_owner, (wide * kv_lens).sum((0, 1, 2)))
        return done

    @property
    def imbalance(self) -> float:
        """The largest work of a rank over the mean: 1 is perfect, 2 wastes half of the ranks."""
        pairs = self.pairs()
        return float(pairs.max() / pairs.mean()) if float(pairs.sum()) else 1.0

    @cached_property
    def most_rows(self) -> int:
        """The most tokens that a rank is sent, for all heads together."""
        return int(self.rows_sent(1, 1).sum(0).max())

    def rows_sent(self, batch: int, kv_heads: int) -> Tensor:
        """int64 [ranks, ranks]: key rows, each of one batch item and head, from rank to rank."""
        size, blocks = self.mask.kv_block_size, self.wanted.shape[-1]
        wanted = self.wanted.expand(-1, batch, kv_heads, -1).sum((1, 2)) if (
            batch * kv_heads > 1
        ) else self.wanted.flatten(1, 2).any(1).long()  # fmt: skip
        held = torch.stack([
            torch.bincount(self.kv_place.source_slots(r) // size, minlength=blocks)
            for r in range(self.owners.ranks)
        ])  # fmt: skip
        return (held @ wanted.T).fill_diagonal_(0)


def make_ring_plan(
    mask: BlockMask, owners: BlockOwners, kv_place: Placement, group: int
) -> RingPlan:
    """The plan of ``mask`` for blocks owned as ``owners`` says. Reads the mask on the host."""
    mask = mask.to("cpu")
    dense = mask.to_dense()
    wanted = wanted_blocks(dense, owners, group)
    keep, wide = dense, _wide_candidates(dense, owners)
    if wide.numel():
        without = dense.clone()
        without[:, :, wide] = False
        fewer = wanted_blocks(without, owners, group)
        saved = _foreign_tokens(wanted, owners, mask) - _foreign_tokens(fewer, owners, mask)
        # Keys and values of a token weigh as much as a query and its output.
        cost = (owners.ranks - 1) * wide.numel() * mask.q_block_size * group
        keep, wanted, wide = (without, fewer, wide) if cost < saved else (dense, wanted, wide[:0])
    if wide.numel():
        for rank in range(owners.ranks):
            wanted[rank][..., owners.columns(rank)] = True
    return RingPlan(owners, kv_place, mask, keep, wanted, wide)


def wanted_blocks(keep: Tensor, owners: BlockOwners, group: int) -> Tensor:
    """bool [ranks, B|1, Hkv|1, Nk]: key blocks that any row of each rank lists."""
    of_rank = [keep[:, :, owners.rows(r)].any(2) for r in range(owners.ranks)]
    wanted = torch.stack(of_rank)
    return wanted if wanted.shape[2] == 1 else wanted.unflatten(2, (-1, group)).any(3)


def in_parts(keep: Tensor) -> Tensor:
    """bool [B, H, rows, blocks] -> [B, H, WIDE_PARTS * rows, blocks]: all rows again for each part,
    which lists an even share of their blocks.
    """
    before = keep.cumsum(-1) - 1
    part = before * WIDE_PARTS // keep.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([keep & (part == p) for p in range(WIDE_PARTS)], 2)


def sub_mask(
    mask: BlockMask, part: Tensor, rows: Tensor, columns: Tensor, device: torch.device
) -> BlockMask | None:
    """``part`` [B|1, H|1, rows, columns] over whole slots; None: it is empty.

    ``mask`` says the sizes and lengths of the blocks. All CPU tensors; the result on ``device``.
    """
    if not bool(part.any()):
        return None
    q_lens, kv_lens = mask.q_lens()[:, rows], mask.kv_lens()[:, columns]
    return (
        BlockMask.from_dense(
            part, mask.q_block_size, mask.kv_block_size,
            None if bool((q_lens == mask.q_block_size).all()) else q_lens.contiguous(),
            None if bool((kv_lens == mask.kv_block_size).all()) else kv_lens.contiguous(),
        ).compact().to(device)
    )  # fmt: skip


def _wide_candidates(dense: Tensor, owners: BlockOwners) -> Tensor:
    """Rows that list more than ``WIDE_SHARE`` of the keys, when they are few; in rank order."""
    share = dense.double().mean(-1).amax((0, 1))
    rows = (share > WIDE_SHARE).nonzero().flatten()
    if rows.numel() * 4 > dense.shape[2]:
        return rows[:0]
    return rows[torch.argsort(owners.q_owner[rows], stable=True)]


def _foreign_tokens(wanted: Tensor, owners: BlockOwners, mask: BlockMask) -> int:
    """Key tokens that travel, averaged over the heads and batches of ``wanted``."""
    foreign = wanted & (owners.kv_owner != torch.arange(owners.ranks)[:, None])[:, None, None]
    return int(foreign.double().mean((1, 2)).sum() * mask.kv_block_size)
