"""Attention backward: dq over the query slots' lists, dk and dv over the key slots'. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    Launch,
    Lists,
    Saved,
    Side,
    head_args,
    named_strides,
    padded,
    problem_args,
    side_args,
    wide_rows,
)
from .launch_tables import LaunchRow
from .step_lists import plan_steps
from .tiles import (
    causal_steps,
    head_rows,
    listed_steps,
    load_tile,
    own_tile,
    program_tile,
    step_at,
    step_rows,
    store_tile,
    tile_rows,
)

_PREPARE_ROWS = 64


@triton.jit
def attention_bwd_kernel_prepare(
    grad_out, grad_lse, out, lse, pivot, delta,
    stride_grad_out_b, stride_grad_out_h, stride_grad_out_s,
    stride_out_b, stride_out_h, stride_out_s,
    stride_grad_lse_b, stride_grad_lse_h, stride_grad_lse_s,
    HQ, q_len, n_tiles,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta = sum_d out grad_out - grad_lse; and lse, but +inf where it is -inf: weights 0."""
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
    o_row = (i_b * HQ + i_h) * q_len + start + o_m
    b_lse = tl.load(lse + o_row, mask=m_m, other=0.0)  # [BM]
    m_seen = b_lse != float("-inf")
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    if grad_lse is not None:
        p_lse = grad_lse + i_b * stride_grad_lse_b + i_h * stride_grad_lse_h
        b_grad_lse = tl.load(p_lse + (start + o_m) * stride_grad_lse_s, mask=m_m, other=0.0)  # [BM]
        b_delta -= tl.where(m_seen, b_grad_lse, 0.0)
    tl.store(delta + o_row, b_delta, mask=m_m)
    tl.store(pivot + o_row, tl.where(m_seen, b_lse, float("inf")), mask=m_m)


@triton.jit
def _product(b_a, b_b):
    """a b^T, fp32."""
    return tl.dot(b_a, tl.trans(b_b), input_precision="ieee")


@triton.jit
def _add_product(b_acc, b_w, b_x):
    """acc + w x, fp32."""
    return tl.dot(b_w.to(b_x.dtype), b_x, b_acc, input_precision="ieee")


@triton.jit
def attention_bwd_kernel_dq(
    q, k, v, grad_out, pivot, delta, dq, full, counts, lists, q_lens, kv_lens,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_grad_out_b, stride_grad_out_h, stride_grad_out_s,
    stride_dq_b, stride_dq_h, stride_dq_s,
    stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
    stride_q_lens_b, stride_kv_lens_b,
    HQ, q_len, kv_len, n_tiles, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    Q_SLOT: tl.constexpr, KV_SLOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, HAS_PARTIAL: tl.constexpr, IS_CAUSAL: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_j p_ij (grad_i . v_j - delta_i) k_j; one program per query tile."""
    i_tile, i_b, i_h = program_tile(n_tiles, HQ)
    p_q_lens = q_lens if q_lens is None else q_lens + i_b * stride_q_lens_b
    p_kv_lens = kv_lens if kv_lens is None else kv_lens + i_b * stride_kv_lens_b
    i_slot, start, n_rows, n_valid = own_tile(i_tile, q_len, p_q_lens, Q_SLOT, BM)
    p_list = lists
    n_listed = 0
    if MODE == "dense":
        n_full, n_steps = causal_steps(start, n_rows, q_len, kv_len, BN, IS_CAUSAL)
    else:
        p_list, n_listed, n_full, n_steps = listed_steps(
            full, counts, lists, i_b, i_h, i_slot, kv_len, p_kv_lens,
            stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
            KV_SLOT, BN, MODE,
        )  # fmt: skip
    if n_valid <= 0:
        n_full = 0
        n_steps = 0

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
    b_dq = tl.zeros([BM, BD], tl.float32)

    for MASKED in tl.static_range(1 + HAS_PARTIAL):  # the full steps, then the others
        i_begin, i_end = 0, n_full
        if MASKED:
            i_begin, i_end = n_full, n_steps
        i_step, n_valid_n = step_at(
            i_begin, i_end, p_list, 0, 0, n_full, kv_len, p_kv_lens, KV_SLOT, BN, MODE, MASKED
        )
        for i in range(i_begin, i_end):
            start_n, o_n, m_n = step_rows(
                i_step, n_valid_n, p_list, n_listed, kv_len, p_kv_lens,
                KV_SLOT, BN, MODE, WIDE, MASKED,
            )  # fmt: skip
            i_step, n_valid_n = step_at(
                i + 1, i_end, p_list, 0, 0, n_full, kv_len, p_kv_lens, KV_SLOT, BN, MODE, MASKED
            )
            b_k = load_tile(  # [BN, BD]
                p_k, start_n, o_n, m_n, o_d, stride_k_s, D, VEC, MASKED
            )
            b_v = load_tile(  # [BN, BDV]
                p_v, start_n, o_n, m_n, o_dv, stride_v_s, DV, VEC, MASKED
            )
            b_p = tl.exp(_product(b_q, b_k) * scale - b_pivot[:, None])  # [BM, BN]
            if MASKED:
                m_p = m_n[None, :]
                if IS_CAUSAL:
                    m_p = m_p & ((start_n + o_n).to(tl.int32)[None, :] <= last_key[:, None])
                b_p = tl.where(m_p, b_p, 0.0)
            b_ds = b_p * (_product(b_grad, b_v) - b_delta[:, None])
            b_dq = _add_product(b_dq, b_ds, b_k)

    b_dq = tl.where(m_m[:, None], b_dq * scale, 0.0)
    store_tile(p_dq, start, b_dq, o_m, o_m < n_rows, o_d, stride_dq_s, D, VEC)


@triton.jit
def _causal_query_steps(start, n_rows, q_len, kv_len, BN: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Query steps of dense attention for a key tile: first, first full, how many full, how many."""
    i_first = 0
    i_full = 0
    if IS_CAUSAL:  # key j is seen by queries from j - (kv_len - q_len)
        first_query = start.to(tl.int32) - (kv_len - q_len)
        i_first = tl.minimum(tl.maximum(first_query, 0), q_len) // BN
        i_full = (tl.minimum(tl.maximum(first_query + n_rows - 1, 0), q_len) + BN - 1) // BN
    n_full = tl.maximum(q_len // BN - i_full, 0)
    n_steps = (q_len + BN - 1) // BN - i_first
    return i_first, i_full, n_full, n_steps


@triton.jit
def attention_bwd_kernel_dkv(
    q, k, v, grad_out, pivot, delta, dk, dv, full, counts, lists, q_lens, kv_lens,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_grad_out_b, stride_grad_out_h, stride_grad_out_s,
    stride_dk_b, stride_dk_h, stride_dk_s, stride_dv_b, stride_dv_h, stride_dv_s,
    stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
    stride_q_lens_b, stride_kv_lens_b,
    H, q_len, kv_len, n_tiles, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    Q_SLOT: tl.constexpr, KV_SLOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, HAS_PARTIAL: tl.constexpr, IS_CAUSAL: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dv_j = sum_i p_ij grad_i, dk_j = scale sum_i p_ij (grad_i . v_j - delta_i) q_i.

    One program per key tile. The query heads that share the key head follow one another, each with
    its own lists; scores stand as keys x queries. Query rows that are not valid get pivot +inf and
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
    b_dk = tl.zeros([BM, BD], tl.float32)
    b_dv = tl.zeros([BM, BDV], tl.float32)

    for i_g in range(0, G):
        i_hq = i_h * G + i_g
        p_list = lists
        n_listed = 0
        i_first = 0
        i_full = 0
        if MODE == "dense":
            i_first, i_full, n_full, n_steps = _causal_query_steps(
                start, n_rows, q_len, kv_len, BN, IS_CAUSAL
            )
        else:
            p_list, n_listed, n_full, n_steps = listed_steps(
                full, counts, lists, i_b, i_hq, i_slot, q_len, p_q_lens,
                stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
                Q_SLOT, BN, MODE,
            )  # fmt: skip
        if n_valid <= 0:
            n_full = 0
            n_steps = 0
        p_q = head_rows(q, i_b, i_hq, stride_q_b, stride_q_h, VEC)
        p_grad = head_rows(grad_out, i_b, i_hq, stride_grad_out_b, stride_grad_out_h, VEC)
        p_pivot = pivot + (i_b * H * G + i_hq) * q_len
        p_delta = delta + (i_b * H * G + i_hq) * q_len

        for MASKED in tl.static_range(1 + HAS_PARTIAL):  # the full steps, then the others
            i_begin, i_end = 0, n_full
            if MASKED:
                i_begin, i_end = n_full, n_steps
            i_step, n_valid_n = step_at(
                i_begin, i_end, p_list, i_first, i_full, n_full, q_len, p_q_lens,
                Q_SLOT, BN, MODE, MASKED,
            )  # fmt: skip
            for i in range(i_begin, i_end):
                start_n, o_n, m_n = step_rows(
                    i_step, n_valid_n, p_list, n_listed, q_len, p_q_lens,
                    Q_SLOT, BN, MODE, WIDE, MASKED,
                )  # fmt: skip
                i_step, n_valid_n = step_at(
                    i + 1, i_end, p_list, i_first, i_full, n_full, q_len, p_q_lens,
                    Q_SLOT, BN, MODE, MASKED,
                )  # fmt: skip
                b_q = load_tile(  # [BN, BD]
                    p_q, start_n, o_n, m_n, o_d, stride_q_s, D, VEC, MASKED
                )
                b_grad = load_tile(  # [BN, BDV]
                    p_grad, start_n, o_n, m_n, o_dv, stride_grad_out_s, DV, VEC, MASKED
                )
                if MASKED:
                    b_pivot = tl.load(
                        p_pivot + (start_n + o_n), mask=m_n, other=float("inf")
                    )  # [BN]
                    b_delta = tl.load(p_delta + (start_n + o_n), mask=m_n, other=0.0)  # [BN]
                else:
                    b_pivot = tl.load(p_pivot + (start_n + o_n))  # [BN]
                    b_delta = tl.load(p_delta + (start_n + o_n))  # [BN]
                b_p = tl.exp(_product(b_k, b_q) * scale - b_pivot[None, :])  # [BM, BN]
                if MASKED and IS_CAUSAL:
                    m_p = (start_n + o_n).to(tl.int32)[None, :] >= first_query[:, None]
                    b_p = tl.where(m_p, b_p, 0.0)
                b_dv = _add_product(b_dv, b_p, b_grad)
                b_ds = b_p * (_product(b_v, b_grad) - b_delta[None, :])
                b_dk = _add_product(b_dk, b_ds, b_q)

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
    pivot, delta = torch.empty_like(x.lse), torch.empty_like(x.lse)
    inputs = {"q": x.q, "k": x.k, "v": x.v, "grad_out": x.grad_out}
    shared = {"pivot": pivot, "delta": delta} | problem_args(x.q, x.k, x.v, scale, is_causal)

    steps = plan_steps(lists, q_side, kv_side, is_causal, dq_row)
    args = shared | head_args(**inputs, dq=dq) | {"HQ": x.q.shape[1]}
    args |= side_args("q", steps.own) | side_args("kv", steps.other)
    launches = [_prepare(x, pivot, delta)]
    launches += steps.launches(attention_bwd_kernel_dq, x.q.shape[0] * x.q.shape[1], args)

    steps = plan_steps(transposed, kv_side, q_side, is_causal, dkv_row)
    args = shared | head_args(**inputs, dk=dk, dv=dv) | {"H": x.k.shape[1]}
    args |= side_args("kv", steps.own) | side_args("q", steps.other)
    launches += steps.launches(attention_bwd_kernel_dkv, x.k.shape[0] * x.k.shape[1], args)
    return launches


def _prepare(x: Saved, pivot: Tensor, delta: Tensor) -> Launch:
    batch, heads, length, head_dim = x.out.shape
    args = head_args(grad_out=x.grad_out, out=x.out) | named_strides("grad_lse", x.grad_lse, "bhs")
    args |= {"lse": x.lse, "pivot": pivot, "delta": delta, "HQ": heads, "q_len": length}
    args |= {"DV": head_dim, "BDV": padded(head_dim), "BM": _PREPARE_ROWS}
    args |= {"n_tiles": -(-length // _PREPARE_ROWS), "WIDE": wide_rows(_PREPARE_ROWS, args)}
    grid = args["n_tiles"] * batch * heads
    return Launch(attention_bwd_kernel_prepare, grid, args, {"num_warps": 4, "num_stages": 1})
