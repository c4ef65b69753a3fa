"""Where the tokens that the ranks hold stand in the sequence that a mask is over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import LayoutKey, VideoLayout
from .shards import Shards

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

    def is_in_order(self) -> bool:
        """What all ranks send, one after another, lies as the slots do."""
        kept = self._on_device  # type: ignore[attr-defined]
        if "in order" not in kept:
            slots = torch.cat([self.source_slots(r) for r in range(len(self.slots))])
            kept["in order"] = torch.equal(slots, torch.arange(self.length))
        return kept["in order"]

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
        """``slots``, ``sources`` or ``source_slots`` of a rank, as a slice where they are one."""
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
