"""What moves where in a ring: block owners, the steps of every rank, bytes and balance.

A rank owns blocks of queries and blocks of keys. In step s rank r works with key blocks of rank
r + s, and these are only the blocks that some block of its queries lists. A few rows that list
nearly everything, such as text, would pull all keys to their owner: such *wide* rows travel to the
keys instead, and what each rank finds for them is merged at their owner.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .placement import Placement

WIDE_SHARE = 0.5  # rows that list more than this share of all key blocks may be wide
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
class Parcel:
    """Key blocks that go from one rank to another: which blocks, and of which batches and heads.

    Args:
        columns: int64 [U], the blocks on the rank that owns them, counted among its own, ascending.
        entries: None: all batches and heads. Otherwise int64 [3, M]: batch, key head and place in
            ``columns`` of each block that is sent.
    """

    columns: Tensor
    entries: Tensor | None

    @classmethod
    def of(cls, wanted: Tensor, batch: int, kv_heads: int) -> Parcel | None:
        """From bool [B|1, Hkv|1, blocks of the owner] on the CPU; None where nothing is wanted."""
        columns = wanted.flatten(0, 1).any(0).nonzero().flatten()
        if columns.numel() == 0:
            return None
        chosen = wanted[..., columns].expand(batch, kv_heads, -1)
        return cls(columns, None if bool(chosen.all()) else chosen.nonzero().T.contiguous())

    def to(self, device: torch.device) -> Parcel:
        entries = None if self.entries is None else self.entries.to(device, non_blocking=True)
        return Parcel(self.columns.to(device, non_blocking=True), entries)

    def blocks(self, batch: int, kv_heads: int) -> int:
        """Blocks sent, each of one batch item and one head."""
        if self.entries is None:
            return batch * kv_heads * self.columns.numel()
        return self.entries.shape[1]


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Args:
        shift: keys come from rank + shift, and go to rank - shift.
        sends, receives: what travels, or None.
        rows: (first, past the last) own query blocks that list something in this step.
        mask: of these query blocks over the received columns; None when nothing is computed, or
            for dense attention.
    """

    shift: int
    sends: Parcel | None
    receives: Parcel | None
    rows: tuple[int, int] = (0, 0)
    mask: BlockMask | None = None


@dataclass(frozen=True)
class WideRows:
    """Rows that travel to the keys: the blocks each rank owns, and the mask over this rank's keys.

    Args:
        counts: wide blocks of each rank.
        own: int64, the wide ones among this rank's query blocks.
        mask: of all wide blocks, in rank order, over this rank's keys; None: it has none.
    """

    counts: tuple[int, ...]
    own: Tensor
    mask: BlockMask | None


@dataclass(frozen=True)
class RingWork:
    """What one rank does in one call: its keys first, then step by step those of others."""

    local: BlockMask | None
    steps: tuple[Step, ...]
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
        mask: of the whole sequence, on the CPU.
        keep: bool [B|1, H|1, Nq, Nk], its blocks, without the wide rows.
        wanted: bool [ranks, B|1, Hkv|1, Nk]: key blocks that the rows of each rank list.
        wide: int64, the wide query blocks, in the order of ranks.
    """

    owners: BlockOwners
    mask: BlockMask
    keep: Tensor
    wanted: Tensor
    wide: Tensor
    batch: int
    kv_heads: int
    _work: dict[tuple[int, torch.device], RingWork] = field(default_factory=dict)

    def parcel(self, sender: int, receiver: int) -> Parcel | None:
        return Parcel.of(
            self.wanted[receiver][..., self.owners.columns(sender)], self.batch, self.kv_heads
        )

    def work_of(self, rank: int, device: torch.device) -> RingWork:
        """The steps of a rank, with index tensors and masks on ``device``; kept."""
        if (rank, device) not in self._work:
            self._work[rank, device] = self._build(rank, device)
        return self._work[rank, device]

    def _build(self, rank: int, device: torch.device) -> RingWork:
        owners, ranks = self.owners, self.owners.ranks
        rows, columns = owners.rows(rank), owners.columns(rank)
        local = sub_mask(self.mask, self.keep, rows, columns, device)
        steps = []
        for shift in range(1, ranks):
            if not self.is_active(shift):
                continue
            source, target = (rank + shift) % ranks, (rank - shift) % ranks
            sends, receives = self.parcel(rank, target), self.parcel(source, rank)
            first, mask = (0, 0), None
            if receives is not None:
                seen = owners.columns(source)[receives.columns]
                first = _span(self.keep[:, :, rows][..., seen])
                mask = sub_mask(self.mask, self.keep, rows[slice(*first)], seen, device)
            steps.append(
                Step(shift, sends and sends.to(device), receives and receives.to(device), first,
                     mask)
            )  # fmt: skip
        return RingWork(local, tuple(steps), self._wide_rows(rank, device))

    def is_active(self, shift: int) -> bool:
        """Whether any rank lists a block of the rank ``shift`` places on: otherwise nobody acts."""
        ranks = self.owners.ranks
        return any(
            bool(self.wanted[r][..., self.owners.columns((r + shift) % ranks)].any())
            for r in range(ranks)
        )

    def _wide_rows(self, rank: int, device: torch.device) -> WideRows | None:
        if self.wide.numel() == 0:
            return None
        owner = self.owners.q_owner[self.wide]
        counts = tuple(int((owner == r).sum()) for r in range(self.owners.ranks))
        own = torch.searchsorted(self.owners.rows(rank), self.wide[owner == rank])
        columns = self.owners.columns(rank)
        mask = sub_mask(self.mask, self.mask.to_dense(), self.wide, columns, device)
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

    def blocks_sent(self) -> Tensor:
        """int64 [ranks, ranks - 1]: key blocks that a rank sends in each step, of one batch item
        and head each.
        """
        ranks = self.owners.ranks
        sent = torch.zeros(ranks, max(ranks - 1, 0), dtype=torch.int64)
        wanted = self.wanted.expand(-1, self.batch, self.kv_heads, -1)
        for rank in range(ranks):
            own = wanted[..., self.owners.columns(rank)].sum((1, 2, 3))
            for shift in range(1, ranks):
                sent[rank, shift - 1] = own[(rank - shift) % ranks]
        return sent


def make_ring_plan(
    mask: BlockMask, owners: BlockOwners, batch: int, q_heads: int, kv_heads: int
) -> RingPlan:
    """The plan of ``mask`` for blocks owned as ``owners`` says. Reads the mask on the host."""
    mask = mask.to("cpu")
    dense = mask.to_dense()
    group = q_heads // kv_heads
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
    return RingPlan(owners, mask, keep, wanted, wide, batch, kv_heads)


def wanted_blocks(keep: Tensor, owners: BlockOwners, group: int) -> Tensor:
    """bool [ranks, B|1, Hkv|1, Nk]: key blocks that any row of each rank lists."""
    of_rank = [keep[:, :, owners.rows(r)].any(2) for r in range(owners.ranks)]
    wanted = torch.stack(of_rank)
    return wanted if wanted.shape[2] == 1 else wanted.unflatten(2, (-1, group)).any(3)


def sub_mask(
    mask: BlockMask, keep: Tensor, rows: Tensor, columns: Tensor, device: torch.device
) -> BlockMask | None:
    """``keep`` [B|1, H|1, Nq, Nk] at ``rows`` and ``columns`` over whole slots; None: it is empty.

    ``mask`` says the sizes and lengths of the blocks. All CPU tensors; the result on ``device``.
    """
    part = keep[:, :, rows][..., columns]
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


def _span(part: Tensor) -> tuple[int, int]:
    """First and past the last row of [B|1, H|1, rows, columns] with anything in it."""
    found = part.any(-1).flatten(0, 1).any(0).nonzero().flatten()
    return (int(found[0]), int(found[-1]) + 1) if found.numel() else (0, 0)


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
