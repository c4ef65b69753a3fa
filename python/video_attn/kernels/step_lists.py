"""From lists of slots to lists of steps, where slots are cut into steps or only partly valid.

A slot of 384 tokens is three steps of 128; with 200 valid tokens it is one full step and one of 72
rows. Each row of the result holds first all full steps, then the others, so that the attention
kernels mask only where they must; empty steps are not in it at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Lists, Side, lens_args, named_strides, temporary, wide_rows
from .launch_tables import LaunchRow
from .tiles import sized_jit

_CHUNK = 128


@sized_jit
def step_lists_kernel(
    counts, indices, lens, full, n_steps, steps,
    stride_counts_b, stride_counts_h,
    stride_indices_b, stride_indices_h, stride_indices_r,
    stride_lens_b, stride_steps,
    H, R, length,
    SLOT: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """steps[row] = full steps of the listed slots, then the partial ones; one program per row."""
    PARTS: tl.constexpr = SLOT // BN
    i_row = tl.program_id(0).to(tl.int64)
    i_r, i_h, i_b = i_row % R, (i_row // R) % H, i_row // R // H
    n_slots = tl.load(counts + i_b * stride_counts_b + i_h * stride_counts_h + i_r)
    p_list = indices + i_b * stride_indices_b + i_h * stride_indices_h + i_r * stride_indices_r
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    o = tl.arange(0, CHUNK)

    n_full = 0
    for i in range(0, n_slots, CHUNK):
        b_slot, b_valid = _slots(p_list, i + o, n_slots, p_lens, length, SLOT)
        n_full += tl.sum(b_valid // BN)

    p_steps = steps + i_row * stride_steps
    i_full = 0
    i_partial = n_full
    for i in range(0, n_slots, CHUNK):
        b_slot, b_valid = _slots(p_list, i + o, n_slots, p_lens, length, SLOT)
        b_full = b_valid // BN
        b_partial = (b_valid % BN != 0).to(tl.int32)
        o_full = i_full + tl.cumsum(b_full) - b_full
        o_partial = i_partial + tl.cumsum(b_partial) - b_partial
        for part in tl.static_range(PARTS):
            tl.store(p_steps + o_full + part, b_slot * PARTS + part, mask=part < b_full)
        tl.store(p_steps + o_partial, b_slot * PARTS + b_full, mask=b_partial != 0)
        i_full += tl.sum(b_full)
        i_partial += tl.sum(b_partial)
    tl.store(full + i_row, n_full)
    tl.store(n_steps + i_row, i_partial)


@triton.jit
def _slots(p_list, o, n_slots, p_lens, length, SLOT: tl.constexpr):
    """Listed slots and their valid tokens; none past the list."""
    m = o < n_slots
    b_slot = tl.load(p_list + o, mask=m, other=0)
    b_valid = tl.minimum(length - b_slot.to(tl.int64) * SLOT, SLOT).to(tl.int32)
    if p_lens is not None:
        b_valid = tl.minimum(b_valid, tl.load(p_lens + b_slot, mask=m, other=0))
    return b_slot, tl.where(m, tl.maximum(b_valid, 0), 0)


class Steps(NamedTuple):
    """How programs that own tiles of one side walk over the other.

    Args:
        row: launch options fitted to the slots. own, other: the sides.
        args: kernel arguments that say where the steps are. before: the launch that makes them.
    """

    row: LaunchRow
    own: Side
    other: Side
    args: dict[str, Any]
    before: list[Launch]

    def launches(self, kernel: Any, heads: int, args: Mapping[str, Any]) -> list[Launch]:
        """``kernel`` for ``heads`` (batch times heads), after what it needs."""
        n_tiles = self.own.tiles(self.row.own)
        wide = wide_rows(max(self.row.own, self.row.step), args)
        sizes = {"n_tiles": n_tiles, "BM": self.row.own, "BN": self.row.step, "WIDE": wide}
        sizes |= {"PRODUCTS": self.row.products, "PACKED": self.row.packed and args["PACKED"]}
        options = self.row.options()
        return [
            *self.before,
            Launch(kernel, n_tiles * heads, {**args, **self.args, **sizes}, options),
        ]


def plan_steps(
    lists: Lists | None, own: Side, other: Side, is_causal: bool, row: LaunchRow
) -> Steps:
    """Fits a launch row to a problem; without lists a tile and a step are a slot."""
    if lists is None:
        row = row.fitted(own.length)
        own, other = own._replace(slot=row.own), other._replace(slot=row.step)
        has_partial = is_causal or other.length % row.step != 0
        return Steps(row, own, other, _list_args("dense", None, None, None, has_partial), [])
    row = row.fitted(own.slot, other.slot)
    counts = lists.counts if lists.counts.stride(2) == 1 else lists.counts.contiguous()
    indices = lists.indices if lists.indices.stride(3) == 1 else lists.indices.contiguous()
    if other.slot % row.step != 0:  # one address for each row that is gathered: no long steps
        row = row._replace(step=min(row.step, 64))
        return Steps(row, own, other, _list_args("gather", None, counts, indices, True), [])
    if other.slot == row.step and other.lens is None and other.length % other.slot == 0:
        args = _list_args("steps", counts, counts, indices, False)
        return Steps(row, own, other, args, [])
    args, launch = split_slots(counts, indices, other, row.step)
    return Steps(row, own, other, args, [launch])


def split_slots(
    counts: Tensor, indices: Tensor, other: Side, step: int
) -> tuple[dict[str, Any], Launch]:
    """Kernel arguments of lists of steps, and the launch that makes these lists."""
    batch = max(counts.shape[0], 1 if other.lens is None else other.lens.shape[0])
    shape = (batch, *counts.shape[1:])
    longest = indices.shape[3] * (other.slot // step)
    full, n_steps, steps = (
        temporary(*size, dtype=torch.int32, device=counts.device)
        for size in (shape, shape, (*shape, longest))
    )
    args = {"full": full, "n_steps": n_steps, "steps": steps, "stride_steps": longest}
    args |= {"H": shape[1], "R": shape[2], "length": other.length}
    args |= named_strides("counts", counts, "bh") | named_strides("indices", indices, "bhr")
    args |= lens_args("lens", other.lens)
    args |= {"SLOT": other.slot, "BN": step, "CHUNK": _CHUNK}
    launch = Launch(step_lists_kernel, full.numel(), args, {"num_warps": 1, "num_stages": 1})
    has_partial = other.lens is not None or other.length % step != 0
    return _list_args("steps", full, n_steps, steps, has_partial), launch


def _list_args(
    mode: str, full: Tensor | None, counts: Tensor | None, lists: Tensor | None, has_partial: bool
) -> dict[str, Any]:
    args: dict[str, Any] = {"full": full, "MODE": mode, "HAS_PARTIAL": has_partial}
    return args | named_strides("counts", counts, "bh") | named_strides("lists", lists, "bhr")
