"""Rows of tensors [B, H, S, D] that travel: of all batch items and heads, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..words import as_words, gather, scatter
from .placement import as_slice, take


@dataclass(frozen=True)
class Rows:
    """Some rows of tensors [B, H, S, D].

    Args:
        index: tokens, int64 or a slice, of all batch items and heads.
        entries: instead, int64 [3, M]: batch item, head and token of each row; no row twice.
    """

    index: Tensor | slice
    entries: Tensor | None = None

    @classmethod
    def of_tokens(cls, index: Tensor, device: torch.device) -> Rows:
        return cls(as_slice(index, device))

    @classmethod
    def one_by_one(cls, entries: Tensor) -> Rows:
        return cls(slice(0, 0), entries)

    def count(self, batch: int, heads: int) -> int:
        """Rows of one batch item and one head."""
        if self.entries is not None:
            return self.entries.shape[1]
        index = self.index
        tokens = index.stop - index.start if isinstance(index, slice) else index.numel()
        return tokens * batch * heads

    def pack(self, target: Tensor, x: Tensor) -> None:
        """These rows of ``x`` one after another into the flat ``target``."""
        if self.entries is None:
            rows = x.permute(2, 0, 1, 3)
            gather(target.view(-1, *rows.shape[1:]), rows, self.index, 0)
            return
        target, x = as_words(target.view(-1, x.shape[3]), x)
        target.copy_(x[tuple(self.entries)])

    def unpack(self, x: Tensor, part: Tensor) -> None:
        """Writes what :meth:`pack` made to these rows of ``x``."""
        if self.entries is None:
            rows = x.permute(2, 0, 1, 3)
            scatter(rows, part.view(-1, *rows.shape[1:]), self.index, 0)
            return
        x, part = as_words(x, part.view(-1, x.shape[3]))
        x[tuple(self.entries)] = part

    def add(self, x: Tensor, part: Tensor) -> None:
        """Adds what :meth:`pack` made to these rows of ``x``."""
        if self.entries is None:
            rows = x.permute(2, 0, 1, 3)
            rows[self.index] += part.view(-1, *rows.shape[1:])
        else:
            x[tuple(self.entries)] += part.view(-1, x.shape[3])


@dataclass(frozen=True)
class Gathering:
    """Where the keys that a rank works on come from.

    Args:
        slots: of the memory they are gathered in.
        own: (rows here, rows there) of what this rank has itself.
        sends, receives: for each rank, what it is sent and where what it sends belongs; None:
            nothing.
        holes: int64, slots that get no token, or None.
        moves: whether any rank sends anything: otherwise there is no exchange.
    """

    slots: int
    own: tuple[Rows, Rows]
    sends: tuple[Rows | None, ...]
    receives: tuple[Rows | None, ...]
    holes: Tensor | None
    moves: bool

    def collect_own(self, target: Tensor, x: Tensor) -> None:
        here, there = self.own
        rows = take(x.permute(2, 0, 1, 3), here.index, 0)
        scatter(target.permute(2, 0, 1, 3), rows, there.index, 0)

    def return_own(self, total: Tensor, grad: Tensor) -> None:
        here, there = self.own
        rows = take(grad.permute(2, 0, 1, 3), there.index, 0)
        total.permute(2, 0, 1, 3)[here.index] += rows


def pack_all(rows: Sequence[Rows | None], xs: Sequence[Tensor]) -> list[Tensor]:
    """For each rank its rows of all ``xs``, in flat messages."""
    messages = room_for(rows, xs)
    for one, message in zip(rows, messages, strict=True):
        if one is not None:
            for part, x in zip(split_message(one, message, xs), xs, strict=True):
                one.pack(part, x)
    return messages


def room_for(rows: Sequence[Rows | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Flat memory for the message of each rank."""
    batch, heads = like[0].shape[:2]
    channels = sum(x.shape[3] for x in like)
    sizes = [0 if one is None else one.count(batch, heads) * channels for one in rows]
    flat = torch.empty(sum(sizes), dtype=like[0].dtype, device=like[0].device)
    return list(flat.split(sizes))


def split_message(rows: Rows, message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    batch, heads = like[0].shape[:2]
    count = rows.count(batch, heads)
    return list(message.split([count * x.shape[3] for x in like]))
