"""Device functions that the attention kernels share: tiles, and the steps over the other side."""

import triton
import triton.language as tl


@triton.jit
def program_tile(n_tiles, H):
    """The tile, batch and head (64-bit) of this program.

    The tiles of a head run together, so that they find its rows of the other side in the L2 cache;
    last tiles first, because those that see the most (causal, text) stand at the end.
    """
    pid = tl.program_id(0)
    i_tile = n_tiles - 1 - pid % n_tiles
    i_h = (pid // n_tiles % H).to(tl.int64)
    i_b = (pid // n_tiles // H).to(tl.int64)
    return i_tile, i_b, i_h


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
    p_head, start, o_row, m_row, o_col, stride,
    COLS: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows ``start + o_row``; zero past the COLS columns and in masked rows, which are not read."""
    p_tile = p_head + start * stride * VEC + (o_row[:, None] * stride * VEC + o_col[None, :])
    EXACT: tl.constexpr = o_col.shape[0] == COLS
    if MASKED:
        if EXACT:
            b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
        else:
            b_tile = tl.load(p_tile, mask=m_row[:, None] & (o_col < COLS)[None, :], other=0.0)
    else:
        if EXACT:
            b_tile = tl.load(p_tile)
        else:
            b_tile = tl.load(p_tile, mask=(o_col < COLS)[None, :], other=0.0)
    return b_tile


@triton.jit
def store_tile(
    p_head, start, b_tile, o_row, m_row, o_col, stride, COLS: tl.constexpr, VEC: tl.constexpr
):
    """Writes the rows ``start + o_row`` that are not masked."""
    p_tile = p_head + start * stride * VEC + (o_row[:, None] * stride * VEC + o_col[None, :])
    m_tile = m_row[:, None] & (o_col < COLS)[None, :]
    tl.store(p_tile, b_tile.to(p_head.dtype.element_ty), mask=m_tile)


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
def causal_steps(start, n_rows, q_len, kv_len, BN: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Key steps of dense attention for a query tile: seen by all its rows, seen by any of them."""
    n_seen_by_all = kv_len
    n_seen = kv_len
    if IS_CAUSAL:  # aligned at the bottom right: the last query sees every key
        n_first_row = start.to(tl.int32) + (kv_len - q_len) + 1
        n_seen_by_all = tl.minimum(tl.maximum(n_first_row, 0), kv_len)
        n_seen = tl.minimum(tl.maximum(n_first_row + n_rows - 1, 0), kv_len)
    return n_seen_by_all // BN, (n_seen + BN - 1) // BN


@triton.jit
def listed_steps(
    full, counts, lists, i_b, i_h, i_slot, length, p_lens,
    stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
    SLOT: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """List of an own slot: pointer, listed rows (gather only), number of full and of all steps."""
    i_list = i_b * stride_counts_b + i_h * stride_counts_h + i_slot
    p_list = lists + i_b * stride_lists_b + i_h * stride_lists_h
    p_list += i_slot.to(tl.int64) * stride_lists_r
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
    return p_list, n_listed, n_full, n_steps


@triton.jit
def step_at(
    i, n, p_list, i_first, i_full, n_full, length, p_lens,
    SLOT: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The step that comes as number ``i`` of ``n``, and how many of its rows are valid.

    Times BN it gives the first row. Dense steps start at ``i_first``; the ``n_full`` full ones from
    ``i_full`` come before the rest. A kernel asks one step ahead, so that loads need not wait.
    """
    i_step = i
    if MODE == "steps":
        i_step = tl.load(p_list + i, mask=i < n, other=0)
    if MODE == "dense":
        i_rest = i - n_full
        i_step = tl.where(i_rest < i_full - i_first, i_first + i_rest, i_first + i)
        i_step = tl.where(i_rest < 0, i_full + i, i_step)
    n_valid = BN
    if MASKED and MODE != "gather":
        n_valid = tl.minimum(length - i_step.to(tl.int64) * BN, BN).to(tl.int32)
        if p_lens is not None:
            PARTS: tl.constexpr = SLOT // BN
            n_slot = tl.load(p_lens + i_step // PARTS, mask=i < n, other=0)
            n_valid = tl.minimum(n_valid, n_slot - (i_step % PARTS) * BN)
    return i_step, n_valid


@triton.jit
def step_rows(
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
