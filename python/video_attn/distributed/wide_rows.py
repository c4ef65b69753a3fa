"""Rows that list nearly everything: queries travel to the keys, and what is found comes home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .merge import Accumulator, merge_all, nothing_seen
from .ring_plan import WIDE_PARTS, WideRows
from .team import Pending, as_bytes, start_exchange
from .ulysses import Heads

if TYPE_CHECKING:
    from .gather import GatherCall


def _for_parts(x: Tensor) -> Tensor:
    """[B, H, rows, ...]: once for every part of the keys."""
    return torch.cat([x] * WIDE_PARTS, 2)


class _Wide:
    """The wide rows of all ranks, in a call that may have none."""

    def __init__(self, call: GatherCall) -> None:
        self.call = call
        self.rows: WideRows | None = call.chunks[0].work.wide  # alike for all but their masks

    def send(self, x: Tensor, label: str) -> Pending:
        """This rank's wide blocks of ``x`` [B, H, S, C] to every rank."""
        assert self.rows is not None
        call, me = self.call, self.call.team.rank
        batch, heads, _, channels = x.shape
        own = x.unflatten(2, (-1, call.q_slot)) if x.shape[2] else x.new_empty(
            batch, heads, 0, call.q_slot, channels
        )  # fmt: skip
        sent = as_bytes(own[:, :, self.rows.own].contiguous()).repeat(call.team.size)
        unit = batch * heads * call.q_slot * channels * x.element_size()
        receive = [count * unit for count in self.rows.counts]
        return start_exchange(
            sent, [receive[me]] * call.team.size, receive, call.team, label, call.traffic
        )

    def arrived(self, pending: Pending, like: Tensor, channels: int) -> Tensor:
        """[B, H, all wide tokens, C], in rank order."""
        assert self.rows is not None
        batch, heads = like.shape[:2]
        flat = pending.wait().view(like.dtype)
        sizes = [n * self.call.q_slot * batch * heads * channels for n in self.rows.counts]
        parts = [part.view(batch, heads, -1, channels) for part in flat.split(sizes) if len(part)]
        return torch.cat(parts, 2)

    def to_owners(self, part: Tensor, label: str) -> list[Tensor]:
        """``part`` [B, H, all wide tokens, C] back to the owners of its rows: what each rank found
        for the rows of this one.
        """
        assert self.rows is not None
        call, (batch, heads, _, channels) = self.call, part.shape
        lengths = [count * call.q_slot for count in self.rows.counts]
        pieces = [piece.contiguous() for piece in part.split(lengths, 2)]
        unit = batch * heads * channels * part.element_size()
        mine = lengths[call.team.rank] * unit
        received = start_exchange(
            torch.cat([as_bytes(piece) for piece in pieces]), [n * unit for n in lengths],
            [mine] * call.team.size, call.team, label, call.traffic,
        ).wait()  # fmt: skip
        if mine == 0:
            return []
        messages = received.split(mine)
        return [one.view(part.dtype).view(batch, heads, -1, channels) for one in messages]

    def own_of(self, x: Tensor) -> Tensor:
        """[B, H, own blocks, slot, ...] of this rank's rows."""
        return x.unflatten(2, (-1, self.call.q_slot))


class WideForward(_Wide):
    """Their outputs: from this rank's keys, heads by heads, then of all ranks for its own rows."""

    def __init__(self, call: GatherCall, q: Tensor) -> None:
        super().__init__(call)
        self._like = q
        self._queries: Tensor | None = None
        self._found: list[tuple[Tensor, Tensor]] = []
        self._pending = None if self.rows is None else self.send(q, "wide rows: queries")

    def attend(self, rows: WideRows | None, heads: Heads, gathered: tuple[Tensor, Tensor]) -> None:
        if rows is None or self._pending is None:
            return
        if self._queries is None:
            self._queries = self.arrived(self._pending, self._like, self._like.shape[3])
        q, (k, v) = self._queries[:, slice(*heads)], gathered
        if rows.mask is None:
            lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            like = q.new_empty(*q.shape[:3], v.shape[3])
            self._found.append(nothing_seen(like, q.shape[2], lse_dtype))
        else:
            parts = self.call.options.attend(_for_parts(q), k, v, rows.mask)
            out, lse = (x.unflatten(2, (WIDE_PARTS, -1)) for x in parts)
            self._found.append(merge_all(out, lse))

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """Writes what all ranks found for this rank's wide rows."""
        if self.rows is None:
            return
        part, part_lse = (torch.cat(x, 1) for x in zip(*self._found, strict=True))
        parts = self.to_owners(part, "wide rows: outputs")
        lses = self.to_owners(part_lse[..., None], "wide rows: lse")
        own = self.rows.own
        if own.numel() == 0:
            return
        merged = Accumulator()
        for one, one_lse in zip(parts, lses, strict=True):
            merged.add(one, one_lse[..., 0])
        assert merged.out is not None and merged.lse is not None
        shape = own.numel(), self.call.q_slot
        self.own_of(out)[:, :, own] = merged.out.to(out.dtype).unflatten(2, shape)
        self.own_of(lse)[:, :, own] = merged.lse.unflatten(2, shape)


class WideGradients(_Wide):
    """Their gradients; ``tensors`` are grad_out, grad_lse, q, out, lse of this rank."""

    def __init__(self, call: GatherCall, tensors: Sequence[Tensor]) -> None:
        super().__init__(call)
        self._found: list[Tensor] = []
        if self.rows is None:
            return
        grad_out, grad_lse, q, out, lse = tensors
        together = torch.cat([q, out, grad_out.to(q.dtype)], -1)
        rows = self.send(together, "wide rows: queries and gradients")
        pair = torch.stack([lse, grad_lse], -1)
        numbers = self.send(pair, "wide rows: lse and gradients")
        arrived = self.arrived(rows, together, together.shape[3])
        sizes = [q.shape[3], out.shape[3], out.shape[3]]
        self._q, self._out, self._grad = arrived.split(sizes, -1)
        self._lse, self._grad_lse = self.arrived(numbers, pair, 2).unbind(-1)

    def gradients(
        self, rows: WideRows | None, heads: Heads, gathered: tuple[Tensor, Tensor]
    ) -> Sequence[Tensor]:
        """(dk, dv) of the gathered keys, from the wide rows; nothing where they see none."""
        if rows is None:
            return ()
        chosen = slice(*heads)
        q = self._q[:, chosen]
        if rows.mask is None:
            self._found.append(torch.zeros_like(q))
            return ()
        q, grad, grad_lse, out, lse = (
            _for_parts(x[:, chosen])
            for x in (self._q, self._grad, self._grad_lse, self._out, self._lse)
        )
        dq, *others = self.call.options.gradients(
            (grad, grad_lse), q, *gathered, (out, lse), rows.mask
        )
        self._found.append(dq.unflatten(2, (WIDE_PARTS, -1)).sum(2))
        return others

    def finish(self, dq: Tensor) -> None:
        """Adds what all ranks found for this rank's wide rows."""
        if self.rows is None:
            return
        parts = self.to_owners(torch.cat(self._found, 1), "wide rows: gradients of queries")
        if self.rows.own.numel():
            total = sum(part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
            assert isinstance(total, Tensor)
            rows = total.to(dq.dtype).unflatten(2, (self.rows.own.numel(), self.call.q_slot))
            self.own_of(dq)[:, :, self.rows.own] += rows
