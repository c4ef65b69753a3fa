"""Ulysses: every rank trades its part of the tokens for all tokens of its part of the heads.

After S. A. Jacobs et al., "DeepSpeed Ulysses", 2023. One all-to-all brings q, k and v together, one
takes the output back. Messages are [tokens, batch, channels of the receiver's heads], so what has
arrived is the whole sequence of a rank's heads and is attended to in place, through its strides.

Heads and tokens need not be divisible by the number of ranks: a rank may have fewer heads than
another, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .placement import Placement, take
from .team import Pending, Team, Traffic, as_bytes, current_traffic, start_exchange

Heads = tuple[int, int]  # first, past the last


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

    def adjoint(self, label: str) -> Swap:
        return Swap(self.team, self.placement, self.heads, self.copies, label, self.traffic)

    def _lengths(self) -> list[int]:
        return self.placement.lengths if self.copies else self.placement.source_lengths

    def _slots(self, rank: int, device: torch.device) -> Tensor | slice:
        return self.placement.on_device(rank, "slots" if self.copies else "source_slots", device)

    def _widths(self, channels: Sequence[int], rank: int) -> list[int]:
        """Channels of the heads of ``rank``, tensor by tensor."""
        counts = (heads[rank][1] - heads[rank][0] for heads in self.heads)
        return [n * d for n, d in zip(counts, channels, strict=True)]

    # -- tokens -> heads ---------------------------------------------------------------------------

    def start_to_heads(self, xs: Sequence[Tensor]) -> Pending:
        """Sends the parts [B, H, held, D] of this rank; all have one dtype."""
        x, me = xs[0], self.team.rank
        batch, channels = x.shape[0], [y.shape[3] for y in xs]
        if not self.copies:
            sources = self.placement.on_device(me, "sources", x.device)
            xs = [take(y, sources, 2) for y in xs]
        tokens = xs[0].shape[2]
        rows = [sum(self._widths(channels, p)) for p in range(self.team.size)]
        buffer = torch.empty(tokens * batch * sum(rows), dtype=x.dtype, device=x.device)
        start = 0
        for p, row in enumerate(rows):
            part = buffer[start : start + tokens * batch * row].view(tokens, batch, row)
            start += part.numel()
            offset = 0
            for y, heads in zip(xs, self.heads, strict=True):
                first, last = heads[p]
                width = (last - first) * y.shape[3]
                if width:
                    target = part[..., offset : offset + width].unflatten(-1, (last - first, -1))
                    target.copy_(y[:, first:last].permute(2, 0, 1, 3))
                offset += width
        unit, mine = batch * x.element_size(), rows[me]
        return start_exchange(
            as_bytes(buffer), [tokens * row * unit for row in rows],
            [n * mine * unit for n in self._lengths()], self.team, self.label, self.traffic,
        )  # fmt: skip

    def finish_to_heads(
        self, pending: Pending, batch: int, channels: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """[B, heads of this rank, slots, D] of each tensor; slots that are nobody's are 0."""
        widths = self._widths(channels, self.team.rank)
        received = pending.wait().view(dtype)
        rows = received.view(sum(self._lengths()), batch, sum(widths))
        rows = self._in_order_of_slots(rows)
        parts = rows.split(widths, -1)
        return [
            part.unflatten(-1, (width // d, d)).permute(1, 2, 0, 3)
            for part, width, d in zip(parts, widths, channels, strict=True)
        ]

    def _in_order_of_slots(self, rows: Tensor) -> Tensor:
        placement = self.placement
        if self.copies and placement.has_copies:
            whole = rows.new_zeros(placement.length, *rows.shape[1:])
            for p, part in enumerate(rows.split(placement.lengths)):
                slots = self._slots(p, rows.device)
                whole[slots] += part
            return whole
        arrivals = placement.arrivals(rows.device)
        if arrivals is None:
            return rows
        whole = rows.new_zeros(placement.length, *rows.shape[1:])
        return whole.index_copy_(0, arrivals, rows)

    # -- heads -> tokens ---------------------------------------------------------------------------

    def start_to_tokens(self, ys: Sequence[Tensor]) -> Pending:
        """Sends [B, heads of this rank, slots, D] of each tensor back to who holds the tokens."""
        y = ys[0]
        batch, row = y.shape[0], sum(z.shape[1] * z.shape[3] for z in ys)
        lengths = self._lengths()
        buffer = torch.empty(sum(lengths) * batch * row, dtype=y.dtype, device=y.device)
        rows = buffer.view(sum(lengths), batch, row)
        for p, part in enumerate(rows.split(lengths)):
            slots, offset = self._slots(p, y.device), 0
            for z in ys:
                width = z.shape[1] * z.shape[3]
                if width and part.shape[0]:
                    target = part[..., offset : offset + width].unflatten(-1, z.shape[1::2])
                    target.copy_(take(z, slots, 2).permute(2, 0, 1, 3))
                offset += width
        unit, channels = batch * y.element_size(), [z.shape[3] for z in ys]
        mine = lengths[self.team.rank]
        widths = [sum(self._widths(channels, p)) for p in range(self.team.size)]
        return start_exchange(
            as_bytes(buffer), [n * row * unit for n in lengths],
            [mine * width * unit for width in widths], self.team, self.label, self.traffic,
        )  # fmt: skip

    def finish_to_tokens(
        self, pending: Pending, into: Sequence[Tensor], sums: bool = False
    ) -> None:
        """Writes what arrived into tensors [B, H, held, D], or adds where heads were sent twice."""
        batch, me = into[0].shape[0], self.team.rank
        tokens, channels = self._lengths()[me], [x.shape[3] for x in into]
        received, start = pending.wait().view(into[0].dtype), 0
        index: Tensor | slice = slice(0, into[0].shape[2])
        if not self.copies:
            index = self.placement.on_device(me, "sources", into[0].device)
        for p in range(self.team.size):
            widths = self._widths(channels, p)
            count = tokens * batch * sum(widths)
            part = received[start : start + count].view(tokens, batch, sum(widths))
            start += count
            for x, heads, piece in zip(into, self.heads, part.split(widths, -1), strict=True):
                first, last = heads[p]
                if first == last or tokens == 0:
                    continue
                piece = piece.unflatten(-1, (last - first, -1)).permute(1, 2, 0, 3)
                if sums:
                    x[:, first:last, index] += piece
                else:
                    x[:, first:last, index] = piece


class ToHeads(torch.autograd.Function):
    """Completes a swap of tokens for heads that was started before; its backward swaps back."""

    @staticmethod
    def forward(ctx: Any, swap: Swap, pending: Pending, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, ctx.shapes, ctx.dtype = swap, [x.shape for x in xs], xs[0].dtype
        channels = [x.shape[3] for x in xs]
        return tuple(swap.finish_to_heads(pending, xs[0].shape[0], channels, xs[0].dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        swap = ctx.swap.adjoint(f"{ctx.swap.label}, gradient")
        pending = swap.start_to_tokens(grads)
        sums = [_tokens(shape, ctx.dtype, grads[0].device).zero_() for shape in ctx.shapes]
        swap.finish_to_tokens(pending, sums, sums=True)
        return None, None, *sums


class ToTokens(torch.autograd.Function):
    """Completes the swaps back of several chunks of heads of one output; backward swaps again."""

    @staticmethod
    def forward(
        ctx: Any, swaps: list[Swap], pending: list[Pending], heads: int, *ys: Tensor
    ) -> Tensor:
        ctx.swaps = swaps
        shape = (ys[0].shape[0], heads, swaps[0].placement.lengths[swaps[0].team.rank])
        result = _tokens((*shape, ys[0].shape[3]), ys[0].dtype, ys[0].device)
        for swap, one in zip(swaps, pending, strict=True):
            swap.finish_to_tokens(one, [result])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        swaps = [s.adjoint(f"{s.label}, gradient") for s in ctx.swaps]
        pending = [s.start_to_heads([grad]) for s in swaps]
        grads = [
            s.finish_to_heads(one, grad.shape[0], [grad.shape[3]], grad.dtype)[0]
            for s, one in zip(swaps, pending, strict=True)
        ]
        return None, None, None, *grads


def _tokens(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, H, S, D] that lies in memory as [B, S, H, D], as the layers around attention want it."""
    batch, heads, tokens, channels = shape
    return torch.empty(batch, tokens, heads, channels, dtype=dtype, device=device).transpose(1, 2)


def swap_of(
    team: Team, placement: Placement, heads: Sequence[Sequence[Heads]], copies: bool, label: str
) -> Swap:
    return Swap(team, placement, tuple(tuple(h) for h in heads), copies, label, current_traffic())
