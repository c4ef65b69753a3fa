"""Where the tokens that the ranks hold stand in the sequence that a mask is over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..layout import LayoutKey, VideoLayout
from .shards import Shards

# Slots per token up to which padding travels, so that tokens arrive where they are attended to: to
# put them there afterwards is a pass over all of them.
MOST_PADDING = 1.25

# How tokens are ordered: as the mask has them (None), or a video whose mask is over padded tiles,
# with its tokens in raster order (False) or in packed tile order (True).
Order = tuple[LayoutKey, bool] | None


@dataclass(frozen=True, eq=False)
class Placement:
    """The slot of every token that each rank holds.

    Args:
        slots: for each rank int64 [held], the slot of each of its tokens; no slot twice.
        length: slots in all; some may be nobody's (padding).
    """

    slots: tuple[Tensor, ...]
    length: int

    def __post_init__(self) -> None:
        taken = torch.zeros(self.length, dtype=torch.bool)
        sources = []
        for own in self.slots:
            sources.append((~taken[own]).nonzero().flatten())
            taken[own] = True
        object.__setattr__(self, "_sources", tuple(sources))
        object.__setattr__(self, "_on_device", {})

    @property
    def lengths(self) -> list[int]:
        """Tokens that each rank holds."""
        return [own.numel() for own in self.slots]

    def sources(self, rank: int) -> Tensor:
        """int64: those of the tokens of ``rank`` that no rank before it holds."""
        return self._sources[rank]  # type: ignore[attr-defined]

    def source_slots(self, rank: int) -> Tensor:
        return self.slots[rank][self.sources(rank)]

    @property
    def source_lengths(self) -> list[int]:
        return [self.sources(r).numel() for r in range(len(self.slots))]

    @property
    def has_copies(self) -> bool:
        """Some token is held by more than one rank."""
        return self.source_lengths != self.lengths

    @property
    def has_holes(self) -> bool:
        """Some slot is nobody's."""
        return self.length > sum(self.source_lengths)

    def spans(self, copies: bool) -> tuple[tuple[int, int], ...] | None:
        """For each rank a run of slots (first, past the last) with all tokens that it sends and
        with no others; together they are all slots. None where there are none, where much of them
        would be padding, or where copies are sent too (``copies``).
        """
        if copies and self.has_copies:
            return None
        kept = self._on_device  # type: ignore[attr-defined]
        if "spans" not in kept:
            kept["spans"] = self._find_spans()
        return kept["spans"]

    def _find_spans(self) -> tuple[tuple[int, int], ...] | None:
        if self.length > MOST_PADDING * sum(self.source_lengths):
            return None
        ends = [
            (int(own.min()), int(own.max()), rank)
            for rank in range(len(self.slots))
            if (own := self.source_slots(rank)).numel()
        ]
        ends.sort()
        if any(a[1] > b[0] for a, b in pairwise(ends)):
            return None
        if not ends:
            return ((0, 0),) * len(self.slots)
        starts = [0, *(first for first, _, _ in ends[1:]), self.length]
        spans = [(0, 0)] * len(self.slots)
        for (start, stop), (_, _, rank) in zip(pairwise(starts), ends, strict=True):
            spans[rank] = start, stop
        return tuple(spans)

    def message_lengths(self, copies: bool) -> list[int]:
        """Rows that each rank sends, or gets, for each head."""
        spans = self.spans(copies)
        if spans is not None:
            return [stop - start for start, stop in spans]
        return self.lengths if copies else self.source_lengths

    def span_tokens(self, rank: int) -> Tensor:
        """int64: which of its tokens a rank sends for each slot of its span; any for padding."""
        spans = self.spans(False)
        assert spans is not None
        start, stop = spans[rank]
        tokens = torch.full((stop - start,), -1)
        tokens[self.source_slots(rank) - start] = self.sources(rank)
        return torch.where(tokens < 0, self.sources(rank)[:1], tokens)

    def span_places(self, rank: int) -> Tensor:
        """int64: for each token of a rank its place in the span."""
        spans = self.spans(False)
        assert spans is not None
        return self.slots[rank] - spans[rank][0]

    def holes(self, device: torch.device) -> Tensor:
        """int64: the slots that are nobody's."""
        kept = self._on_device  # type: ignore[attr-defined]
        if ("holes", device) not in kept:
            free = torch.ones(self.length, dtype=torch.bool)
            for own in self.slots:
                free[own] = False
            kept["holes", device] = free.nonzero().flatten().to(device)
        return kept["holes", device]

    def arrivals(self, device: torch.device) -> Tensor:
        """int64 [length]: for every slot its row in what all ranks send, one after another; for a
        slot that is nobody's the row after the last.
        """
        kept = self._on_device  # type: ignore[attr-defined]
        if ("arrivals", device) not in kept:
            slots = torch.cat([self.source_slots(r) for r in range(len(self.slots))])
            rows = torch.full((self.length,), slots.numel())
            rows[slots] = torch.arange(slots.numel())
            kept["arrivals", device] = rows.to(device)
        return kept["arrivals", device]

    def all_slots(self, name: str, device: torch.device) -> Tensor | slice:
        """``slots`` or ``source_slots`` of all ranks one after another, as a slice if they are."""
        kept = self._on_device  # type: ignore[attr-defined]
        if ("all", name, device) not in kept:
            ranks = range(len(self.slots))
            own = [self.slots[r] if name == "slots" else self.source_slots(r) for r in ranks]
            kept["all", name, device] = as_slice(torch.cat(own), device)
        return kept["all", name, device]

    def on_device(self, rank: int, name: str, device: torch.device) -> Tensor | slice:
        """``slots``, or what a method of this name gives; as a slice where they are one."""
        key = (name, rank, device)
        kept = self._on_device  # type: ignore[attr-defined]
        if key not in kept:
            index = self.slots[rank] if name == "slots" else getattr(self, name)(rank)
            kept[key] = as_slice(index, device)
        return kept[key]


def as_slice(index: Tensor, device: torch.device) -> Tensor | slice:
    """The positions as a slice if they are consecutive, otherwise on the device."""
    if index.numel() == 0:
        return slice(0, 0)
    first = int(index[0])
    if torch.equal(index, torch.arange(first, first + index.numel())):
        return slice(first, first + index.numel())
    return index.to(device)


def take(x: Tensor, index: Tensor | slice, dim: int) -> Tensor:
    """The tokens ``index`` of ``x`` on ``dim``: a view for a slice."""
    if isinstance(index, slice):
        return x.narrow(dim, index.start, index.stop - index.start)
    return x.index_select(dim, index)


@lru_cache(maxsize=64)
def placement_of(shards: Shards, order: Order, length: int) -> Placement:
    """The placement of ``shards`` in a mask over ``length`` slots; kept."""
    positions = [shards.positions(r) for r in range(shards.num_ranks)]
    if order is not None:
        slots = _slots_of_tokens(order)
        positions = [slots[p] for p in positions]
    return Placement(tuple(positions), length)


def _slots_of_tokens(order: tuple[LayoutKey, bool]) -> Tensor:
    key, is_packed = order
    layout = VideoLayout(*key)
    slots = layout.padded_slots("cpu")
    if is_packed:
        return slots
    of_raster = torch.empty_like(slots)
    of_raster[layout.tile_order("cpu")] = slots
    return of_raster
