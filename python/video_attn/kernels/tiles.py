"""Device functions that the attention kernels share: tiles, and the steps over the other side."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Kernel arguments that are numbers, besides strides: see ``sized_jit``. Lengths are not among them:
# ptxas takes some 40 registers more if 16 is not known to divide the length of the own side.
_SIZES = {
    *("B", "H", "HQ", "CHUNK", "D", "DV", "DV_OUT", "N", "R"),
    *("n_tiles", "n_programs", "n_chunks", "n_groups", "n_q_groups", "n_k_groups", "n_k_chunks"),
    "n_q_tiles",
    *("n_keys", "top_k"),
}


def sized_jit(function: Callable[..., Any]) -> Any:
    """``triton.jit`` of a kernel whose strides and sizes select no code: one compile serves all.

    What they could tell the compiler, alignment, is said by VEC.
    """
    sizes = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name.startswith("stride_") or name in _SIZES
        if "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(do_not_specialize=sizes)(function)


@triton.jit
def program_part(n_parts, H):
    """The part, batch and head (64-bit) of this program; the parts of a head run together.

    Divisions are of 32-bit numbers: those of 64 bits take a hundred instructions each.
    """
    pid = tl.program_id(0)
    i_h = (pid // n_parts % H).to(tl.int64)
    i_b = (pid // n_parts // H).to(tl.int64)
    return pid % n_parts, i_b, i_h


@triton.jit
def program_tile(n_tiles, H):
    """The tile, batch and head (64-bit) of this program.

    The tiles of a head run together, so that they find its rows of the other side in the L2 cache;
    last tiles first, because those that see the most (causal, text) stand at the end.
    """
    i_part, i_b, i_h = program_part(n_tiles, H)
    return n_tiles - 1 - i_part, i_b, i_h


@triton.jit
def tile_rows(ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Row numbers inside a tile; 64-bit where a row stride is too large for 32-bit offsets."""
    o_row = tl.arange(0, ROWS)
    if WIDE:
        o_row = o_row.to(tl.int64)
    return o_row


@triton.jit
def head_rows(p, i_b, i_h, stride_b, stride_h, VEC: tl.constexpr):
    """Pointer to the rows of a head. Strides count VEC numbers, so that loads can be vectors."""
    return p + (i_b * stride_b + i_h * stride_h) * VEC


@triton.jit
def load_tile(
    p_head, start, o_row, m_row, o_col, stride, COLS, VEC: tl.constexpr, MASKED: tl.constexpr
):
    """Rows ``start + o_row``; zero past the columns and in masked rows, which are not read.

    COLS: columns that exist, in VEC numbers; None where all do.
    """
    p_tile = p_head + start * stride * VEC + (o_row[:, None] * stride * VEC + o_col[None, :])
    if MASKED:
        if COLS is None:
            b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
        else:
            m_col = (o_col < COLS * VEC)[None, :]
            b_tile = tl.load(p_tile, mask=m_row[:, None] & m_col, other=0.0)
    else:
        if COLS is None:
            b_tile = tl.load(p_tile)
        else:
            b_tile = tl.load(p_tile, mask=(o_col < COLS * VEC)[None, :], other=0.0)
    return b_tile


@triton.jit
def store_tile(p_head, start, b_tile, o_row, m_row, o_col, stride, COLS, VEC: tl.constexpr):
    """Writes the rows ``start + o_row`` that are not masked."""
    p_tile = p_head + start * stride * VEC + (o_row[:, None] * stride * VEC + o_col[None, :])
    m_tile = m_row[:, None]
    if COLS is not None:
        m_tile = m_tile & (o_col < COLS * VEC)[None, :]
    tl.store(p_tile, b_tile.to(p_head.dtype.element_ty), mask=m_tile)


@triton.jit
def product(b_a, b_b, PRODUCTS: tl.constexpr):
    """a b^T, fp32. PRODUCTS: how fp32 numbers are multiplied, as ``tl.dot`` calls it."""
    return tl.dot(b_a, tl.trans(b_b), input_precision=PRODUCTS)


@triton.jit
def add_product(b_acc, b_w, b_x, PRODUCTS: tl.constexpr):
    """acc + w x, fp32; w is rounded to the type of x."""
    return tl.dot(b_w.to(b_x.dtype), b_x, b_acc, input_precision=PRODUCTS)


@triton.jit
def own_tile(i_tile, length, p_lens, SLOT: tl.constexpr, BM: tl.constexpr):
    """Tile ``i_tile`` of a side: slot, first row (64-bit), rows that exist, rows that are valid.

    A tile lies in one slot. Either number of rows may exceed BM or be negative.
    """
    TILES: tl.constexpr = (SLOT + BM - 1) // BM
    i_slot = i_tile // TILES
    i_in = (i_tile % TILES) * BM
    start = i_slot.to(tl.int64) * SLOT + i_in
    n_rows = tl.minimum(SLOT - i_in, length - start).to(tl.int32)
    n_valid = n_rows
    if p_lens is not None:
        n_valid = tl.minimum(n_rows, tl.load(p_lens + i_slot) - i_in)
    return i_slot, start, n_rows, n_valid


@triton.jit
def causal_key_steps(start, n_rows, q_len, kv_len, BN: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Key steps of dense attention for a query tile, as ``walk`` takes them."""
    n_seen_by_all = kv_len
    n_seen = kv_len
    if IS_CAUSAL:  # aligned at the bottom right: the last query sees every key
        n_first_row = start.to(tl.int32) + (kv_len - q_len) + 1
        n_seen_by_all = tl.minimum(tl.maximum(n_first_row, 0), kv_len)
        n_seen = tl.minimum(tl.maximum(n_first_row + n_rows - 1, 0), kv_len)
    return 0, 0, n_seen_by_all // BN, (n_seen + BN - 1) // BN, 0


@triton.jit
def causal_query_steps(start, n_rows, q_len, kv_len, BN: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Query steps of dense attention for a key tile, as ``walk`` takes them."""
    i_first = 0
    i_full = 0
    if IS_CAUSAL:  # key j is seen by queries from j - (kv_len - q_len)
        first_query = start.to(tl.int32) - (kv_len - q_len)
        i_first = tl.minimum(tl.maximum(first_query, 0), q_len) // BN
        i_full = (tl.minimum(tl.maximum(first_query + n_rows - 1, 0), q_len) + BN - 1) // BN
    n_full = tl.maximum(q_len // BN - i_full, 0)
    return i_first, i_full, n_full, (q_len + BN - 1) // BN - i_first, 0


@triton.jit
def listed_steps(
    full, counts, i_list, length, p_lens, SLOT: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr
):
    """Steps of a list, as ``walk`` takes them; ``i_list``: where its counts stand."""
    n_steps = tl.load(counts + i_list)
    n_listed = 0
    if MODE == "steps":
        n_full = tl.load(full + i_list)
    else:
        n_listed = n_steps * SLOT
        n_steps = (n_listed + BN - 1) // BN
        n_full = 0
        if p_lens is None:
            # The sequence may end inside the slot that stands last in the list.
            n_cut = tl.where(length % SLOT == 0, 0, SLOT)
            n_full = tl.maximum(n_listed - n_cut, 0) // BN
    return 0, 0, n_full, n_steps, n_listed


@triton.jit
def seen_keys(start_n, o_n, m_n, last_key, IS_CAUSAL: tl.constexpr):
    """Mask of the pairs of a masked step of keys: [1, BN], or [BM, BN] if causal."""
    m_s = m_n[None, :]
    if IS_CAUSAL:
        m_s = m_s & ((start_n + o_n).to(tl.int32)[None, :] <= last_key[:, None])
    return m_s


@triton.jit
def walk(
    STEP: tl.constexpr, state, given, OPTIONS: tl.constexpr, steps, n_own, p_list, length, p_lens,
    SLOT: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``state`` after all steps of a program, each of which makes it anew:

    state = STEP(state, rows, given, OPTIONS, MASKED).

    Args:
        rows: of a step: a common first row (64-bit), offsets from it [BN], which are valid [BN].
        given, OPTIONS: whatever STEP needs besides. MASKED: some rows of the step may be invalid.
        steps: (first, first full, number of full, number of all, listed rows). The full steps come
            first; dense steps start at the first one. Listed rows: for "gather" only.
        n_own: valid rows of the own tile; without any there is no step.
        p_list: the list; dense steps have none. length, p_lens: of the side that is walked over.
    """
    i_first, i_full, n_full, n_steps, n_listed = steps
    if n_own <= 0:
        n_full = 0
        n_steps = 0
    for MASKED in tl.static_range(1 + HAS_PARTIAL):
        i_begin, i_end = 0, n_full
        if MASKED:
            i_begin, i_end = n_full, n_steps
        i_step, n_valid = _step_at(
            i_begin, i_end, p_list, i_first, i_full, n_full, length, p_lens, SLOT, BN, MODE, MASKED
        )
        for i in range(i_begin, i_end):
            rows = _step_rows(
                i_step, n_valid, p_list, n_listed, length, p_lens, SLOT, BN, MODE, WIDE, MASKED
            )
            # One step ahead, so that the loads of the next step need not wait for its number.
            i_step, n_valid = _step_at(
                i + 1, i_end, p_list, i_first, i_full, n_full, length, p_lens,
                SLOT, BN, MODE, MASKED,
            )  # fmt: skip
            state = STEP(state, rows, given, OPTIONS, MASKED)
    return state


@triton.jit
def _step_at(
    i, n, p_list, i_first, i_full, n_full, length, p_lens,
    SLOT: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The step that comes as number ``i`` of ``n``, and how many of its rows are valid.

    Times BN it gives the first row.
    """
    i_step = i
    if MODE == "steps":
        i_step = tl.load(p_list + i, mask=i < n, other=0)
    if MODE == "dense":
        i_step = i_full + i
        if MASKED:  # before the full ones, then after them
            i_rest = i - n_full
            i_step = tl.where(i_rest < i_full - i_first, i_first + i_rest, i_first + i)
    n_valid = BN
    if MASKED and MODE != "gather":
        n_valid = tl.minimum(length - i_step.to(tl.int64) * BN, BN).to(tl.int32)
        if p_lens is not None:
            PARTS: tl.constexpr = SLOT // BN
            n_slot = tl.load(p_lens + i_step // PARTS, mask=i < n, other=0)
            n_valid = tl.minimum(n_valid, n_slot - (i_step % PARTS) * BN)
    return i_step, n_valid


@triton.jit
def _step_rows(
    i_step, n_valid, p_list, n_listed, length, p_lens,
    SLOT: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of a step: a common first row (64-bit), offsets from it [BN], which are valid [BN]."""
    if MODE == "gather":
        o_listed = i_step * BN + tl.arange(0, BN)
        m_row = o_listed < n_listed
        start = tl.zeros((), dtype=tl.int64)
        if MASKED:
            i_slot = tl.load(p_list + o_listed // SLOT, mask=m_row, other=0)
        else:
            i_slot = tl.load(p_list + o_listed // SLOT)
        o_row = i_slot.to(tl.int64) * SLOT + o_listed % SLOT
        if MASKED:
            m_row = m_row & (o_row < length)
            if p_lens is not None:
                n_slot = tl.load(p_lens + i_slot, mask=m_row, other=0)
                m_row = m_row & (o_listed % SLOT < n_slot)
    else:
        start = i_step.to(tl.int64) * BN
        o_row = tile_rows(BN, WIDE)
        m_row = o_row < n_valid
    return start, o_row, m_row
