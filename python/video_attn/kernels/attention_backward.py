"""Attention backward: dq over the query slots' lists, dk and dv over the key slots'. No atomics."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    Launch,
    Lists,
    Saved,
    Side,
    columns,
    dim_args,
    head_args,
    named_strides,
    packed,
    padded,
    problem_args,
    side_args,
    temporary,
    wide_rows,
)
from .launch_tables import LaunchRow
from .step_lists import plan_steps
from .tiles import (
    add_product,
    causal_key_steps,
    causal_query_steps,
    head_rows,
    listed_steps,
    load_tile,
    own_tile,
    product,
    program_tile,
    seen_keys,
    sized_jit,
    store_tile,
    tile_rows,
    walk,
)

_PREPARE_ROWS = 64
_LOG2_E = tl.constexpr(math.log2(math.e))


@sized_jit
def attention_bwd_kernel_prepare(
    grad_out, grad_lse, out, lse, pivot, delta,
    stride_grad_out_b, stride_grad_out_h, stride_grad_out_s,
    stride_out_b, stride_out_h, stride_out_s,
    stride_lse_b, stride_lse_h, stride_lse_s,
    stride_grad_lse_b, stride_grad_lse_h, stride_grad_lse_s,
    HQ, DV, q_len, n_tiles,
    BDV: tl.constexpr, BM: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta = sum_d out grad_out - grad_lse; pivot = lse in base 2, +inf where it is -inf.

    So 2^(scores - pivot) are the weights, and those of rows that saw nothing are 0.
    """
    i_tile, i_b, i_h = program_tile(n_tiles, HQ)
    start = i_tile.to(tl.int64) * BM
    o_m, o_dv = tile_rows(BM, WIDE), tl.arange(0, BDV)
    m_m = o_m < q_len - start
    p_out = head_rows(out, i_b, i_h, stride_out_b, stride_out_h, VEC)
    p_grad = head_rows(grad_out, i_b, i_h, stride_grad_out_b, stride_grad_out_h, VEC)
    b_out = load_tile(p_out, start, o_m, m_m, o_dv, stride_out_s, DV, VEC, True)  # [BM, BDV]
    b_grad = load_tile(  # [BM, BDV]
        p_grad, start, o_m, m_m, o_dv, stride_grad_out_s, DV, VEC, True
    )
    p_lse = lse + i_b * stride_lse_b + i_h * stride_lse_h
    b_lse = tl.load(p_lse + (start + o_m) * stride_lse_s, mask=m_m, other=0.0)  # [BM]
    m_seen = b_lse != float("-inf")
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    if grad_lse is not None:
        p_grad_lse = grad_lse + i_b * stride_grad_lse_b + i_h * stride_grad_lse_h
        p_grad_lse += (start + o_m) * stride_grad_lse_s
        b_delta -= tl.where(m_seen, tl.load(p_grad_lse, mask=m_m, other=0.0), 0.0)
    o_row = (i_b * HQ + i_h) * q_len + start + o_m
    tl.store(delta + o_row, b_delta, mask=m_m)
    tl.store(pivot + o_row, tl.where(m_seen, b_lse * _LOG2_E, float("inf")), mask=m_m)


@triton.jit
def _dq_step(b_dq, rows, given, OPTIONS: tl.constexpr, MASKED: tl.constexpr):
    """Adds a step of keys to dq, not yet scaled."""
    start_n, o_n, m_n = rows
    own, p_k, p_v, stride_k_s, stride_v_s, o_d, o_dv, D, DV, last_key, scale_log2 = given
    b_q, b_grad, b_pivot, b_delta = own
    VEC: tl.constexpr = OPTIONS[0]
    IS_CAUSAL: tl.constexpr = OPTIONS[1]
    PRODUCTS: tl.constexpr = OPTIONS[2]
    b_k = load_tile(p_k, start_n, o_n, m_n, o_d, stride_k_s, D, VEC, MASKED)  # [BN, BD]
    b_v = load_tile(p_v, start_n, o_n, m_n, o_dv, stride_v_s, DV, VEC, MASKED)  # [BN, BDV]
    b_p = tl.exp2(product(b_q, b_k, PRODUCTS) * scale_log2 - b_pivot[:, None])  # [BM, BN]
    if MASKED:
        b_p = tl.where(seen_keys(start_n, o_n, m_n, last_key, IS_CAUSAL), b_p, 0.0)
    b_ds = b_p * (product(b_grad, b_v, PRODUCTS) - b_delta[:, None])
    return add_product(b_dq, b_ds, b_k, PRODUCTS)


@sized_jit
def attention_bwd_kernel_dq(
    q, k, v, grad_out, pivot, delta, dq, full, counts, lists, q_lens, kv_lens,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_grad_out_b, stride_grad_out_h, stride_grad_out_s,
    stride_dq_b, stride_dq_h, stride_dq_s,
    stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
    stride_q_lens_b, stride_kv_lens_b,
    HQ, D, DV, q_len, kv_len, n_tiles, scale, scale_log2,
    G: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    Q_SLOT: tl.constexpr, KV_SLOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, HAS_PARTIAL: tl.constexpr, IS_CAUSAL: tl.constexpr, PRODUCTS: tl.constexpr,
    VEC: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j p_ij (grad_i . v_j - delta_i) k_j; one program per query tile."""
    i_tile, i_b, i_h = program_tile(n_tiles, HQ)
    p_q_lens = q_lens if q_lens is None else q_lens + i_b * stride_q_lens_b
    p_kv_lens = kv_lens if kv_lens is None else kv_lens + i_b * stride_kv_lens_b
    i_slot, start, n_rows, n_valid = own_tile(i_tile, q_len, p_q_lens, Q_SLOT, BM)
    p_list = lists
    if MODE == "dense":
        steps = causal_key_steps(start, n_rows, q_len, kv_len, BN, IS_CAUSAL)
    else:
        i_list = i_b * stride_counts_b + i_h * stride_counts_h + i_slot
        p_list += i_b * stride_lists_b + i_h * stride_lists_h
        p_list += i_slot.to(tl.int64) * stride_lists_r
        steps = listed_steps(full, counts, i_list, kv_len, p_kv_lens, KV_SLOT, BN, MODE)

    o_m = tile_rows(BM, WIDE)
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_m = o_m < n_valid
    p_q = head_rows(q, i_b, i_h, stride_q_b, stride_q_h, VEC)
    p_grad = head_rows(grad_out, i_b, i_h, stride_grad_out_b, stride_grad_out_h, VEC)
    p_dq = head_rows(dq, i_b, i_h, stride_dq_b, stride_dq_h, VEC)
    p_k = head_rows(k, i_b, i_h // G, stride_k_b, stride_k_h, VEC)
    p_v = head_rows(v, i_b, i_h // G, stride_v_b, stride_v_h, VEC)
    o_row = (i_b * HQ + i_h) * q_len + start + o_m
    last_key = (start + o_m).to(tl.int32) + (kv_len - q_len)  # that a causal row sees
    b_q = load_tile(p_q, start, o_m, m_m, o_d, stride_q_s, D, VEC, True)  # [BM, BD]
    b_grad = load_tile(  # [BM, BDV]
        p_grad, start, o_m, m_m, o_dv, stride_grad_out_s, DV, VEC, True
    )
    b_pivot = tl.load(pivot + o_row, mask=m_m, other=float("inf"))  # [BM]
    b_delta = tl.load(delta + o_row, mask=m_m, other=0.0)  # [BM]
    if PACKED:  # strides that the compiler knows
        stride_k_s = BD // VEC
        stride_v_s = BDV // VEC
    given = (
        (b_q, b_grad, b_pivot, b_delta),
        p_k, p_v, stride_k_s, stride_v_s, o_d, o_dv, D, DV, last_key, scale_log2,
    )  # fmt: skip
    b_dq = walk(
        _dq_step, tl.zeros([BM, BD], tl.float32), given, (VEC, IS_CAUSAL, PRODUCTS),
        steps, n_valid, p_list, kv_len, p_kv_lens, KV_SLOT, BN, MODE, HAS_PARTIAL, WIDE,
    )  # fmt: skip

    b_dq = tl.where(m_m[:, None], b_dq * scale, 0.0)
    store_tile(p_dq, start, b_dq, o_m, o_m < n_rows, o_d, stride_dq_s, D, VEC)


@triton.jit
def _dkv_step(state, rows, given, OPTIONS: tl.constexpr, MASKED: tl.constexpr):
    """Adds a step of queries to (dk, dv), dk not yet scaled; scores stand as keys x queries."""
    b_dk, b_dv = state
    start_n, o_n, m_n = rows
    b_k, b_v, others, strides, o_d, o_dv, D, DV, first_query, scale_log2 = given
    stride_q_s, stride_grad_out_s = strides
    p_q, p_grad, p_pivot, p_delta = others
    VEC: tl.constexpr = OPTIONS[0]
    IS_CAUSAL: tl.constexpr = OPTIONS[1]
    PRODUCTS: tl.constexpr = OPTIONS[2]
    b_q = load_tile(p_q, start_n, o_n, m_n, o_d, stride_q_s, D, VEC, MASKED)  # [BN, BD]
    b_grad = load_tile(  # [BN, BDV]
        p_grad, start_n, o_n, m_n, o_dv, stride_grad_out_s, DV, VEC, MASKED
    )
    p_pivot += start_n
    p_delta += start_n
    if MASKED:
        b_pivot = tl.load(p_pivot + o_n, mask=m_n, other=float("inf"))  # [BN]
        b_delta = tl.load(p_delta + o_n, mask=m_n, other=0.0)  # [BN]
    else:
        b_pivot = tl.load(p_pivot + o_n)  # [BN]
        b_delta = tl.load(p_delta + o_n)  # [BN]
    b_p = tl.exp2(product(b_k, b_q, PRODUCTS) * scale_log2 - b_pivot[None, :])  # [BM, BN]
    if MASKED and IS_CAUSAL:
        m_p = (start_n + o_n).to(tl.int32)[None, :] >= first_query[:, None]
        b_p = tl.where(m_p, b_p, 0.0)
    b_dv = add_product(b_dv, b_p, b_grad, PRODUCTS)
    b_ds = b_p * (product(b_v, b_grad, PRODUCTS) - b_delta[None, :])
    return add_product(b_dk, b_ds, b_q, PRODUCTS), b_dv


@sized_jit
def attention_bwd_kernel_dkv(
    q, k, v, grad_out, pivot, delta, dk, dv, full, counts, lists, q_lens, kv_lens,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_grad_out_b, stride_grad_out_h, stride_grad_out_s,
    stride_dk_b, stride_dk_h, stride_dk_s, stride_dv_b, stride_dv_h, stride_dv_s,
    stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
    stride_q_lens_b, stride_kv_lens_b,
    H, D, DV, q_len, kv_len, n_tiles, scale, scale_log2,
    G: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    Q_SLOT: tl.constexpr, KV_SLOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, HAS_PARTIAL: tl.constexpr, IS_CAUSAL: tl.constexpr, PRODUCTS: tl.constexpr,
    VEC: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dv_j = sum_i p_ij grad_i, dk_j = scale sum_i p_ij (grad_i . v_j - delta_i) q_i.

    One program per key tile. The query heads that share the key head follow one another, each with
    its own lists. Query rows that are not valid get pivot +inf and
    so weight 0; own rows that are not valid gather what they like and are not stored.
    """
    i_tile, i_b, i_h = program_tile(n_tiles, H)
    p_q_lens = q_lens if q_lens is None else q_lens + i_b * stride_q_lens_b
    p_kv_lens = kv_lens if kv_lens is None else kv_lens + i_b * stride_kv_lens_b
    i_slot, start, n_rows, n_valid = own_tile(i_tile, kv_len, p_kv_lens, KV_SLOT, BM)

    o_m = tile_rows(BM, WIDE)
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_m = o_m < n_valid
    p_k = head_rows(k, i_b, i_h, stride_k_b, stride_k_h, VEC)
    p_v = head_rows(v, i_b, i_h, stride_v_b, stride_v_h, VEC)
    p_dk = head_rows(dk, i_b, i_h, stride_dk_b, stride_dk_h, VEC)
    p_dv = head_rows(dv, i_b, i_h, stride_dv_b, stride_dv_h, VEC)
    first_query = (start + o_m).to(tl.int32) - (kv_len - q_len)  # that sees a causal key
    b_k = load_tile(p_k, start, o_m, m_m, o_d, stride_k_s, D, VEC, True)  # [BM, BD]
    b_v = load_tile(p_v, start, o_m, m_m, o_dv, stride_v_s, DV, VEC, True)  # [BM, BDV]
    if PACKED:  # strides that the compiler knows
        stride_q_s = BD // VEC
        stride_grad_out_s = BDV // VEC
    b_dk = tl.zeros([BM, BD], tl.float32)
    b_dv = tl.zeros([BM, BDV], tl.float32)

    for i_g in range(0, G):
        i_hq = i_h * G + i_g
        p_list = lists
        if MODE == "dense":
            steps = causal_query_steps(start, n_rows, q_len, kv_len, BN, IS_CAUSAL)
        else:
            i_list = i_b * stride_counts_b + i_hq * stride_counts_h + i_slot
            p_list += i_b * stride_lists_b + i_hq * stride_lists_h
            p_list += i_slot.to(tl.int64) * stride_lists_r
            steps = listed_steps(full, counts, i_list, q_len, p_q_lens, Q_SLOT, BN, MODE)
        i_row = (i_b * H * G + i_hq) * q_len
        others = (
            head_rows(q, i_b, i_hq, stride_q_b, stride_q_h, VEC),
            head_rows(grad_out, i_b, i_hq, stride_grad_out_b, stride_grad_out_h, VEC),
            pivot + i_row,
            delta + i_row,
        )
        given = (
            b_k, b_v, others, (stride_q_s, stride_grad_out_s), o_d, o_dv, D, DV, first_query,
            scale_log2,
        )  # fmt: skip
        b_dk, b_dv = walk(
            _dkv_step, (b_dk, b_dv), given, (VEC, IS_CAUSAL, PRODUCTS),
            steps, n_valid, p_list, q_len, p_q_lens, Q_SLOT, BN, MODE, HAS_PARTIAL, WIDE,
        )  # fmt: skip

    b_dk = tl.where(m_m[:, None], b_dk * scale, 0.0)
    b_dv = tl.where(m_m[:, None], b_dv, 0.0)
    store_tile(p_dk, start, b_dk, o_m, o_m < n_rows, o_d, stride_dk_s, D, VEC)
    store_tile(p_dv, start, b_dv, o_m, o_m < n_rows, o_dv, stride_dv_s, DV, VEC)


def attention_backward(
    x: Saved,
    grads: tuple[Tensor, Tensor, Tensor],
    lists: Lists | None,
    transposed: Lists | None,
    q_side: Side,
    kv_side: Side,
    *,
    scale: float,
    is_causal: bool,
    dq_row: LaunchRow,
    dkv_row: LaunchRow,
) -> list[Launch]:
    """The launches that fill ``grads`` = (dq, dk, dv).

    ``lists`` holds, per query slot, the key slots it sees; ``transposed``, per key slot, the query
    slots that see it; both are None for dense attention.
    """
    dq, dk, dv = grads
    pivot, delta = (
        temporary(*x.lse.shape, dtype=x.lse.dtype, device=x.lse.device) for _ in range(2)
    )
    inputs = {"q": x.q, "k": x.k, "v": x.v, "grad_out": x.grad_out}
    shared = {"pivot": pivot, "delta": delta} | problem_args(x.q, x.k, scale, is_causal)

    steps = plan_steps(lists, q_side, kv_side, is_causal, dq_row)
    args = shared | head_args(**inputs, dq=dq) | {"HQ": x.q.shape[1], "PACKED": packed(x.k, x.v)}
    args |= dim_args(x.q.shape[3], x.v.shape[3], args["VEC"])
    args |= side_args("q", steps.own) | side_args("kv", steps.other)
    launches = [_prepare(x, pivot, delta)]
    launches += steps.launches(attention_bwd_kernel_dq, x.q.shape[0] * x.q.shape[1], args)

    steps = plan_steps(transposed, kv_side, q_side, is_causal, dkv_row)
    args = shared | head_args(**inputs, dk=dk, dv=dv)
    args |= {"H": x.k.shape[1], "PACKED": packed(x.q, x.grad_out)}
    args |= dim_args(x.q.shape[3], x.v.shape[3], args["VEC"])
    args |= side_args("kv", steps.own) | side_args("q", steps.other)
    launches += steps.launches(attention_bwd_kernel_dkv, x.k.shape[0] * x.k.shape[1], args)
    return launches


def _prepare(x: Saved, pivot: Tensor, delta: Tensor) -> Launch:
    batch, heads, length, head_dim = x.out.shape
    args = head_args(grad_out=x.grad_out, out=x.out) | named_strides("grad_lse", x.grad_lse, "bhs")
    args |= named_strides("lse", x.lse, "bhs")
    args |= {"pivot": pivot, "delta": delta, "HQ": heads, "q_len": length}
    dim = padded(head_dim)
    args |= {"DV": columns(head_dim, dim, args["VEC"]), "BDV": dim, "BM": _PREPARE_ROWS}
    args |= {"n_tiles": -(-length // _PREPARE_ROWS), "WIDE": wide_rows(_PREPARE_ROWS, args)}
    grid = args["n_tiles"] * batch * heads
    return Launch(attention_bwd_kernel_prepare, grid, args, {"num_warps": 4, "num_stages": 1})
