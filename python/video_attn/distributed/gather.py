"""The sparse ring: each rank gathers the keys that its queries list, and attends to them once.

Every rank sends each other the tokens that it lists, all in one exchange: there are no steps, no
partial results and nothing to merge. Heads go in chunks: while one is attended to, the keys of the
next travel. The backward pass gathers the keys again and sends their gradients home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calls import empty_like_heads, empty_lse
from ..words import as_words, copy
from .listed import GRADIENTS, KEYS, ListedKeys, Listing
from .merge import nothing_seen
from .piece import Options
from .ring_plan import RingWork
from .rows import Gathering, pack_all, room_for, split_message
from .team import Pending, Team, Traffic, start_messages
from .ulysses import Heads
from .wide_rows import WideForward, WideGradients


@dataclass(frozen=True)
class Chunk:
    """Some heads, and what a rank does for them."""

    q: Heads
    kv: Heads
    work: RingWork


@dataclass(frozen=True)
class GatherCall:
    """A call without its tensors: q [B, H, slots of its blocks, D], and k and v [B, Hkv, held, D].

    Args:
        q_slot: tokens of a query block.
    """

    team: Team
    chunks: Sequence[Chunk]
    q_slot: int
    options: Options
    traffic: Traffic | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        wide = WideForward(self, q)
        started = [_start(self, chunk, k, v) for chunk in self.chunks]
        several = len(self.chunks) > 1
        results = (empty_like_heads(q, v.shape[3]), empty_lse(q)) if several else None
        for chunk, keys in zip(self.chunks, started, strict=True):
            gathered, heads = keys.finish(), slice(*chunk.q)
            rows = q[:, heads]
            if chunk.work.mask is None:
                like = rows.new_empty(*rows.shape[:3], v.shape[3])
                part = nothing_seen(like, rows.shape[2], lse_dtype)
            else:
                part = self.options.attend(rows, *gathered, chunk.work.mask)
            if results is None:
                results = part
            else:
                copy(results[0][:, heads], part[0])
                results[1][:, heads] = part[1]
            wide.attend(chunk.work.wide, chunk.q, gathered)
        assert results is not None
        wide.finish(*results)
        return results

    def backward(
        self,
        grads: tuple[Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *results: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = results
        wide = WideGradients(self, (*grads, q, out, lse))
        started = [_start(self, chunk, k, v) for chunk in self.chunks]
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
        for chunk, keys in zip(self.chunks, started, strict=True):
            gathered, heads = keys.finish(), slice(*chunk.q)
            if chunk.work.mask is None:
                foreign = [torch.zeros_like(x) for x in gathered]
            else:
                dq[:, heads], *foreign = self.options.gradients(
                    (grads[0][:, heads], grads[1][:, heads].contiguous()), q[:, heads], *gathered,
                    (out[:, heads], lse[:, heads].contiguous()), chunk.work.mask,
                )  # fmt: skip
            for i, more in enumerate(wide.gradients(chunk.work.wide, chunk.q, gathered)):
                foreign[i].add_(more)
            keys.start_return(foreign)
        for chunk, keys in zip(self.chunks, started, strict=True):
            keys.finish_return([x[:, slice(*chunk.kv)] for x in (dk, dv)])
        wide.finish(dq)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _start(call: GatherCall, chunk: Chunk, k: Tensor, v: Tensor) -> _Keys | ListedKeys:
    gathering = chunk.work.gathering
    if isinstance(gathering, Listing):
        return ListedKeys(call, chunk, gathering, k, v)
    return _Keys(call, chunk, gathering, k, v)


class _Keys:
    """Keys and values of some heads on their way to who lists them, and their gradients."""

    def __init__(
        self, call: GatherCall, chunk: Chunk, gathering: Gathering, k: Tensor, v: Tensor
    ) -> None:
        self.call, self.plan = call, gathering
        self.held = [x[:, slice(*chunk.kv)] for x in (k, v)]
        self.pending: Pending | None = None
        if self.plan.moves:
            self.parts = room_for(self.plan.receives, self.held)
            sends = pack_all(self.plan.sends, self.held)
            self.pending = start_messages(sends, self.parts, call.team, KEYS, call.traffic)

    def finish(self) -> tuple[Tensor, Tensor]:
        """[k, v], each [B, heads, slots, D]; slots that get no token are 0, and what is listed for
        other heads alone holds anything.
        """
        gathered = [self._memory(x) for x in self.held]
        for x, target in zip(self.held, gathered, strict=True):
            self.plan.collect_own(target, x)
        if self.pending is not None:
            self.pending.wait()
            for rows, message in zip(self.plan.receives, self.parts, strict=True):
                if rows is not None:
                    parts = split_message(rows, message, self.held)
                    for target, part in zip(gathered, parts, strict=True):
                        rows.unpack(target, part)
            self.parts = []
        keys, values = gathered
        return keys, values

    def _memory(self, x: Tensor) -> Tensor:
        """[B, heads, slots, D] that lies as [slots, B, heads, D]."""
        # Quantizers look at all keys, also at those that no query lists.
        allocate = torch.empty if self.call.options.precision == "native" else torch.zeros
        rows = allocate(self.plan.slots, *x.shape[:2], x.shape[3], dtype=x.dtype, device=x.device)
        if self.plan.holes is not None:
            as_words(rows)[0].index_fill_(0, self.plan.holes, 0)
        return rows.permute(1, 2, 0, 3)

    def start_return(self, foreign: Sequence[Tensor]) -> None:
        self.foreign = foreign
        if self.plan.moves:
            self.parts = room_for(self.plan.sends, self.held)
            sends = pack_all(self.plan.receives, foreign)
            self.pending = start_messages(
                sends, self.parts, self.call.team, GRADIENTS, self.call.traffic
            )

    def finish_return(self, totals: Sequence[Tensor]) -> None:
        """Adds all gradients of the held keys and values, those of this rank first."""
        for total, grad in zip(totals, self.foreign, strict=True):
            self.plan.return_own(total, grad)
        if self.pending is None:
            return
        self.pending.wait()
        for rows, message in zip(self.plan.sends, self.parts, strict=True):
            if rows is not None:
                parts = split_message(rows, message, self.held)
                for total, part in zip(totals, parts, strict=True):
                    rows.add(total, part)
