"""The ring: queries stay, keys and values travel, step by step, while the last are attended to.

After H. Liu et al., "Ring Attention with Blockwise Transformers", 2023; but keys come straight
from the rank that owns them, and only the blocks that the receiver lists. Partial results are
merged by their log-sum-exps. The backward pass needs no partial results: it sends the keys again,
takes every step's gradients from the final output and log-sum-exp, and sends those of foreign keys
home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..block_mask import BlockMask, mask_arguments
from ..quantize import QuantizationOptions
from .merge import Accumulator, nothing_seen
from .ring_plan import Parcel, RingWork, Step, WideRows
from .team import Pending, Team, Traffic, as_bytes, start_exchange


@dataclass(frozen=True)
class Options:
    """How a piece of attention is computed: the arguments of :func:`video_attn.attention`."""

    scale: float
    precision: str = "native"
    backend: str | None = None
    deterministic: bool = False
    quantization: QuantizationOptions | None = None


@dataclass(frozen=True)
class RingCall:
    """All of a call but its tensors.

    Args:
        q_slot: tokens of a query block.
        kv_slots: tokens of a key block on each rank: the block size, or for dense attention all
            tokens of the rank, which are then one block.
        is_dense: no masks: a step sees all keys that it receives.
        is_causal: dense, and the local part is causal.
    """

    team: Team
    work: RingWork
    q_slot: int
    kv_slots: tuple[int, ...]
    is_dense: bool
    is_causal: bool
    options: Options
    traffic: Traffic | None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        o = self.options
        return attention(
            q, k, v, mask, scale=o.scale, precision=o.precision, backend=o.backend,
            quantization=o.quantization, is_causal=is_causal, return_lse=True,
        )  # fmt: skip

    def gradients(
        self,
        grads: tuple[Tensor, Tensor | None],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        results: tuple[Tensor, Tensor],
        mask: BlockMask | None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of one step, from the final out and lse of its rows."""
        o = self.options
        lists = mask_arguments(mask, transposed=True)
        return torch.ops.video_attn.attention_backward(
            *grads, q, k, v, *results, *lists, o.scale, is_causal, o.deterministic, o.backend
        )

    def rows(self, step: Step, x: Tensor) -> Tensor:
        """The rows of ``x`` [B, H, S, ...] that list something in this step."""
        first, last = step.rows
        return x[:, :, first * self.q_slot : last * self.q_slot]

    def has_work(self, step: Step) -> bool:
        return step.receives is not None and step.rows[0] < step.rows[1]


class Ring(torch.autograd.Function):
    """(out, lse) of this rank's query blocks from the blocks of all ranks."""

    @staticmethod
    def forward(ctx: Any, call: RingCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _forward(call, q, k, v)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_backward(ctx.call, grad_out, grad_lse, *ctx.saved_tensors)


def _forward(call: RingCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    work, steps, rows = call.work, call.work.steps, q.shape[2]
    wide = None if work.wide is None else _start_wide_queries(call, work.wide, q)
    pending = _start_keys(call, steps[0], k, v) if steps else None
    found = Accumulator()
    if _has_local_work(call, q, k):
        found.add(*call.attend(q, k, v, work.local, call.is_causal), 0, rows)
    for index, step in enumerate(steps):
        assert pending is not None
        received = pending.wait()
        if index + 1 < len(steps):  # the next keys travel while these are attended to
            pending = _start_keys(call, steps[index + 1], k, v)
        if call.has_work(step):
            keys, values = _unpack_keys(call, step, received, k, v)
            part = call.attend(call.rows(step, q), keys, values, step.mask)
            found.add(*part, step.rows[0] * call.q_slot, rows)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if found.out is None or found.lse is None:
        found.out, found.lse = nothing_seen(q.new_empty(*q.shape[:3], v.shape[3]), rows, lse_dtype)
    if wide is not None and work.wide is not None:
        _finish_wide(call, work.wide, wide, k, v, found)
    return found.out.to(q.dtype), found.lse


def _backward(
    call: RingCall,
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    work, steps = call.work, call.work.steps
    pending = _start_keys(call, steps[0], k, v) if steps else None
    dq, dk, dv = (_zeros_like(x, lse.dtype) for x in (q, k, v))
    if _has_local_work(call, q, k):
        grads = call.gradients(
            (grad_out, grad_lse), q, k, v, (out, lse), work.local, call.is_causal
        )
        for total, grad in zip((dq, dk, dv), grads, strict=True):
            total.add_(grad)
    returns: list[Pending] = []
    for index, step in enumerate(steps):
        assert pending is not None
        received = pending.wait()
        if index + 1 < len(steps):
            pending = _start_keys(call, steps[index + 1], k, v)
        foreign: tuple[Tensor, ...] = ()
        if step.receives is not None:
            keys, values = _unpack_keys(call, step, received, k, v)
            foreign = torch.zeros_like(keys), torch.zeros_like(values)
            if call.has_work(step):
                part_q, *foreign_list = call.gradients(
                    (call.rows(step, grad_out), call.rows(step, grad_lse)),
                    call.rows(step, q), keys, values,
                    (call.rows(step, out), call.rows(step, lse)), step.mask,
                )  # fmt: skip
                call.rows(step, dq).add_(part_q)
                foreign = tuple(foreign_list)
        returns.append(_start_return(call, step, foreign, k, v))
    for step, one in zip(steps, returns, strict=True):  # always in the same order
        _add_returned(call, step, one.wait(), k, v, dk, dv)
    if work.wide is not None:
        _wide_gradients(call, work.wide, (grad_out, grad_lse, q, k, v, out, lse), (dq, dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _has_local_work(call: RingCall, q: Tensor, k: Tensor) -> bool:
    if q.shape[2] == 0 or k.shape[2] == 0:
        return False
    return call.is_dense or call.work.local is not None


def _zeros_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(x, dtype=dtype)


# -- keys and values on their way ------------------------------------------------------------------


def _start_keys(call: RingCall, step: Step, k: Tensor, v: Tensor) -> Pending:
    me, ranks = call.team.rank, call.team.size
    target, source = (me - step.shift) % ranks, (me + step.shift) % ranks
    slot = call.kv_slots[me]
    parts = []
    if step.sends is not None:
        parts = [_blocks_of(x.unflatten(2, (-1, slot)), step.sends) for x in (k, v)]
    send, receive = [0] * ranks, [0] * ranks
    send[target] = _parcel_bytes(step.sends, slot, k, v)
    receive[source] = _parcel_bytes(step.receives, call.kv_slots[source], k, v)
    return start_exchange(
        _joined(parts, k), send, receive, call.team, f"ring step {step.shift}: keys", call.traffic
    )


def _unpack_keys(
    call: RingCall, step: Step, received: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """[B, Hkv, received columns * slot, D]; blocks that were not listed hold anything."""
    assert step.receives is not None
    slot = call.kv_slots[(call.team.rank + step.shift) % call.team.size]
    parts = _split(received, step.receives, slot, k, v)
    keys, values = (
        _spread(part, step.receives, slot, x, call.options.precision)
        for part, x in zip(parts, (k, v), strict=True)
    )
    return keys, values


def _start_return(
    call: RingCall, step: Step, foreign: Sequence[Tensor], k: Tensor, v: Tensor
) -> Pending:
    """Sends the gradients of received keys and values back to their owner."""
    me, ranks = call.team.rank, call.team.size
    owner, debtor = (me + step.shift) % ranks, (me - step.shift) % ranks
    slot = call.kv_slots[owner]
    parts = []
    if step.receives is not None:
        parts = [_received_of(x.unflatten(2, (-1, slot)), step.receives) for x in foreign]
    send, receive = [0] * ranks, [0] * ranks
    send[owner] = _parcel_bytes(step.receives, slot, k, v)
    receive[debtor] = _parcel_bytes(step.sends, call.kv_slots[me], k, v)
    return start_exchange(
        _joined(parts, k), send, receive, call.team, f"ring step {step.shift}: gradients",
        call.traffic,
    )  # fmt: skip


def _add_returned(
    call: RingCall, step: Step, received: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor
) -> None:
    if step.sends is None:
        return
    slot = call.kv_slots[call.team.rank]
    parcel = step.sends
    for total, part in zip((dk, dv), _split(received, parcel, slot, k, v), strict=True):
        blocks = total.unflatten(2, (-1, slot))
        if parcel.entries is None:
            blocks[:, :, parcel.columns] += part
        else:
            batch, head, place = parcel.entries
            blocks[batch, head, parcel.columns[place]] += part


def _parcel_bytes(parcel: Parcel | None, slot: int, k: Tensor, v: Tensor) -> int:
    if parcel is None:
        return 0
    channels = k.shape[3] + v.shape[3]
    return parcel.blocks(k.shape[0], k.shape[1]) * slot * channels * k.element_size()


def _blocks_of(blocks: Tensor, parcel: Parcel) -> Tensor:
    """What a parcel takes of its owner's [B, H, N, slot, D]: [B, H, U, slot, D] or [M, slot, D]."""
    if parcel.entries is None:
        whole = parcel.columns.numel() == blocks.shape[2]
        return blocks if whole else blocks.index_select(2, parcel.columns)
    batch, head, place = parcel.entries
    return blocks[batch, head, parcel.columns[place]]


def _received_of(blocks: Tensor, parcel: Parcel) -> Tensor:
    """The same of the receiver's [B, H, U, slot, D], where unlisted blocks lie between."""
    return blocks if parcel.entries is None else blocks[tuple(parcel.entries)]


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The tensors one after another as bytes."""
    flat = torch.empty(sum(x.numel() for x in parts), dtype=like.dtype, device=like.device)
    for target, x in zip(flat.split([x.numel() for x in parts]), parts, strict=True):
        target.view(x.shape).copy_(x)
    return as_bytes(flat)


def _split(received: Tensor, parcel: Parcel, slot: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values of a parcel, as ``_blocks_of`` made them."""
    batch, heads = k.shape[:2]
    count = parcel.blocks(batch, heads) * slot
    flat = received.view(k.dtype)
    parts = flat.split([count * k.shape[3], count * v.shape[3]])
    lead = (batch, heads, parcel.columns.numel()) if parcel.entries is None else (-1,)
    return [part.view(*lead, slot, x.shape[3]) for part, x in zip(parts, (k, v), strict=True)]


def _spread(part: Tensor, parcel: Parcel, slot: int, like: Tensor, precision: str) -> Tensor:
    """[B, Hkv, U * slot, D] from what a parcel held."""
    if parcel.entries is None:
        return part.flatten(2, 3)
    batch, heads, _, channels = like.shape
    columns = parcel.columns.numel()
    # Unlisted blocks are never read, but quantizers look at all keys.
    allocate = torch.empty if precision == "native" else torch.zeros
    blocks = allocate(batch, heads, columns, slot, channels, dtype=part.dtype, device=part.device)
    blocks[tuple(parcel.entries)] = part
    return blocks.flatten(2, 3)


# -- wide rows: queries travel ---------------------------------------------------------------------


def _start_wide_queries(call: RingCall, wide: WideRows, q: Tensor) -> Pending:
    return _start_to_all(call, wide, q, "wide rows: queries")


def _finish_wide(
    call: RingCall, wide: WideRows, pending: Pending, k: Tensor, v: Tensor, found: Accumulator
) -> None:
    """Attends to this rank's keys for all wide rows; merges what all ranks found for its own."""
    assert found.out is not None and found.lse is not None
    batch, heads, _, channels = found.out.shape
    q = _arrived_from_all(wide, pending, batch, heads, k.shape[3], k.dtype)
    if wide.mask is None:
        part, lse = nothing_seen(q.new_empty(*q.shape[:3], channels), q.shape[2], found.lse.dtype)
    else:
        part, lse = call.attend(q, k, v, wide.mask)
    parts = _to_owners(call, wide, part, "wide rows: outputs")
    lses = _to_owners(call, wide, lse[..., None], "wide rows: lse")
    if wide.own.numel() == 0:
        return
    merged = Accumulator()
    for one, one_lse in zip(parts, lses, strict=True):
        merged.add(one, one_lse[..., 0], 0, one.shape[2])
    assert merged.out is not None and merged.lse is not None
    shape = (wide.own.numel(), call.q_slot)
    out = found.out.unflatten(2, (-1, call.q_slot))
    out[:, :, wide.own] = merged.out.to(out.dtype).unflatten(2, shape)
    found.lse.unflatten(2, (-1, call.q_slot))[:, :, wide.own] = merged.lse.unflatten(2, shape)


def _wide_gradients(
    call: RingCall, wide: WideRows, tensors: Sequence[Tensor], totals: Sequence[Tensor]
) -> None:
    grad_out, grad_lse, q, k, v, out, lse = tensors
    batch, heads, _, head_dim = q.shape
    together = torch.cat([q, out, grad_out.to(q.dtype)], -1)
    rows = _start_to_all(call, wide, together, "wide rows: queries and gradients")
    numbers = _start_to_all(
        call, wide, torch.stack([lse, grad_lse], -1), "wide rows: lse and gradients"
    )
    arrived = _arrived_from_all(wide, rows, batch, heads, together.shape[3], q.dtype)
    all_q, all_out, all_grad = arrived.split([head_dim, out.shape[3], out.shape[3]], -1)
    all_lse, all_grad_lse = _arrived_from_all(wide, numbers, batch, heads, 2, lse.dtype).unbind(-1)
    part = torch.zeros_like(all_q)
    if wide.mask is not None:
        part, dk, dv = call.gradients(
            (all_grad, all_grad_lse), all_q, k, v, (all_out, all_lse), wide.mask
        )
        totals[1].add_(dk)
        totals[2].add_(dv)
    parts = _to_owners(call, wide, part, "wide rows: gradients of queries")
    if wide.own.numel():
        own = totals[0].unflatten(2, (-1, call.q_slot))
        for one in parts:
            own[:, :, wide.own] += one.unflatten(2, (wide.own.numel(), call.q_slot))


def _start_to_all(call: RingCall, wide: WideRows, x: Tensor, label: str) -> Pending:
    """This rank's wide blocks of ``x`` [B, H, S, C] to every rank."""
    me, ranks = call.team.rank, call.team.size
    batch, heads, _, channels = x.shape
    own = x.unflatten(2, (-1, call.q_slot)) if x.shape[2] else x.new_empty(
        batch, heads, 0, call.q_slot, channels
    )  # fmt: skip
    blocks = own[:, :, wide.own].contiguous()
    sent = as_bytes(blocks).repeat(ranks)
    unit = batch * heads * call.q_slot * channels * x.element_size()
    receive = [count * unit for count in wide.counts]
    return start_exchange(sent, [receive[me]] * ranks, receive, call.team, label, call.traffic)


def _arrived_from_all(
    wide: WideRows, pending: Pending, batch: int, heads: int, channels: int, dtype: torch.dtype
) -> Tensor:
    """[B, H, all wide tokens, C], in rank order."""
    flat, slot = pending.wait().view(dtype), 0
    slot = flat.numel() // (batch * heads * channels * sum(wide.counts))
    sizes = [count * slot * batch * heads * channels for count in wide.counts]
    parts = [part.view(batch, heads, -1, channels) for part in flat.split(sizes) if part.numel()]
    return torch.cat(parts, 2)


def _to_owners(call: RingCall, wide: WideRows, part: Tensor, label: str) -> list[Tensor]:
    """``part`` [B, H, all wide tokens, C] back to the owners of its rows: what each rank found for
    the rows of this one.
    """
    batch, heads, _, channels = part.shape
    lengths = [count * call.q_slot for count in wide.counts]
    pieces = [piece.contiguous() for piece in part.split(lengths, 2)]
    unit = batch * heads * channels * part.element_size()
    mine = lengths[call.team.rank] * unit
    received = start_exchange(
        torch.cat([as_bytes(piece) for piece in pieces]), [n * unit for n in lengths],
        [mine] * call.team.size, call.team, label, call.traffic,
    ).wait()  # fmt: skip
    if mine == 0:
        return []
    return [one.view(part.dtype).view(batch, heads, -1, channels) for one in received.split(mine)]
