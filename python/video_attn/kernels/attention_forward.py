"""Attention forward: softmax(scale * q k^T) v over the listed keys, and its log-sum-exp."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..quantize import TILE
from .codes import Codes, code_args
from .launch import (
    Launch,
    Lists,
    Side,
    columns,
    dim_args,
    head_args,
    packed,
    problem_args,
    side_args,
)
from .launch_tables import LaunchRow
from .quantize_parts import scale_group
from .quantized_step import quantized_step, query_factors
from .step_lists import plan_steps
from .tiles import (
    add_product,
    causal_key_steps,
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


@triton.jit
def _online_softmax(b_s, b_m, b_l, scale_log2, MASKED: tl.constexpr):
    """Folds the scores of a step in: weights, new maximum, new sum, factor for earlier sums.

    Maxima are of unscaled scores, so they are exact; one multiply-add per score does the rest.
    """
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_pivot = b_m_new
    if MASKED:  # rows that have seen no key yet: any finite pivot gives weights 0
        b_pivot = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s * scale_log2 - (b_pivot * scale_log2)[:, None])
    b_alpha = tl.exp2((b_m - b_pivot) * scale_log2)
    return b_p, b_m_new, b_l * b_alpha + tl.sum(b_p, 1), b_alpha


@triton.jit
def _step(state, rows, given, OPTIONS: tl.constexpr, MASKED: tl.constexpr):
    """Folds a step of keys into (maximum, sum, acc)."""
    b_m, b_l, b_acc = state
    start_n, o_n, m_n = rows
    b_q, p_k, p_v, stride_k_s, stride_v_s, o_d, o_dv, D, DV, last_key, scale_log2 = given
    VEC: tl.constexpr = OPTIONS[0]
    IS_CAUSAL: tl.constexpr = OPTIONS[1]
    PRODUCTS: tl.constexpr = OPTIONS[2]
    b_k = load_tile(p_k, start_n, o_n, m_n, o_d, stride_k_s, D, VEC, MASKED)  # [BN, BD]
    b_s = product(b_q, b_k, PRODUCTS)  # [BM, BN], not yet scaled
    if MASKED:
        b_s = tl.where(seen_keys(start_n, o_n, m_n, last_key, IS_CAUSAL), b_s, float("-inf"))
    b_p, b_m, b_l, b_alpha = _online_softmax(b_s, b_m, b_l, scale_log2, MASKED)
    b_v = load_tile(p_v, start_n, o_n, m_n, o_dv, stride_v_s, DV, VEC, MASKED)  # [BN, BDV]
    return b_m, b_l, add_product(b_acc * b_alpha[:, None], b_p, b_v, PRODUCTS)


@sized_jit
def attention_fwd_kernel(
    q, k, v, out, lse, full, counts, lists, q_lens, kv_lens,
    q_scale, k_scale, v_scale, v_mean, lse_shift, score_shift,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_out_b, stride_out_h, stride_out_s,
    stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
    stride_q_lens_b, stride_kv_lens_b,
    HQ, D, DV, DV_OUT, q_len, kv_len, n_tiles, n_q_tiles, n_q_groups, n_k_groups,
    scale, scale_log2,
    G: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    Q_SLOT: tl.constexpr, KV_SLOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, HAS_PARTIAL: tl.constexpr, IS_CAUSAL: tl.constexpr, PRODUCTS: tl.constexpr,
    QUANTIZED: tl.constexpr, Q_GROUPS: tl.constexpr, K_GROUPS: tl.constexpr,
    Q_SCALE_SLOT: tl.constexpr, K_SCALE_SLOT: tl.constexpr,
    P_EXPONENT: tl.constexpr, FP16_SUMS: tl.constexpr,
    VEC: tl.constexpr, VEC_V: tl.constexpr, VEC_OUT: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j exp(s_ij - lse_i) v_j, lse_i = log sum_j exp(s_ij), s = scale q k^T.

    One program per query tile; online softmax in base 2. QUANTIZED: q, k, v are codes with scales,
    see ``codes.py``, of padded dims; the weights are rounded as v is.
    """
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
    p_k = head_rows(k, i_b, i_h // G, stride_k_b, stride_k_h, VEC)
    p_v = head_rows(v, i_b, i_h // G, stride_v_b, stride_v_h, VEC_V)
    p_out = head_rows(out, i_b, i_h, stride_out_b, stride_out_h, VEC_OUT)
    last_key = (start + o_m).to(tl.int32) + (kv_len - q_len)  # that a causal row sees
    b_q = load_tile(p_q, start, o_m, m_m, o_d, stride_q_s, D, VEC, True)  # [BM, BD]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    if PACKED:  # strides that the compiler knows
        stride_k_s = BD // VEC
        stride_v_s = BDV // VEC
    state = (b_m, b_l, b_acc)
    given = (b_q, p_k, p_v, stride_k_s, stride_v_s, o_d, o_dv, D, DV, last_key, scale_log2)
    if QUANTIZED:
        i_head = i_b * (HQ // G) + i_h // G
        b_factor = query_factors(
            q_scale + (i_b * HQ + i_h) * n_q_groups, start, o_m, m_m, scale_log2,
            Q_SCALE_SLOT, Q_GROUPS,
        )  # fmt: skip
        p_k_scale = k_scale + i_head * n_k_groups
        SHIFTED: tl.constexpr = score_shift is not None
        p_shift = p_k_scale  # not read: compiled code has no None among the values of a tuple
        if SHIFTED:  # own rows are of one tile
            i_q_tile = scale_group(start, Q_SCALE_SLOT, (1, 1, 1))
            p_shift = score_shift + ((i_b * HQ + i_h) * n_q_tiles + i_q_tile) * kv_len
        b_m, b_l, b_acc = walk(
            quantized_step, state, (given, b_factor, p_k_scale, p_shift),
            (VEC_V, IS_CAUSAL, K_SCALE_SLOT, K_GROUPS, MODE, P_EXPONENT, FP16_SUMS, SHIFTED),
            steps, n_valid, p_list, kv_len, p_kv_lens, KV_SLOT, BN, MODE, HAS_PARTIAL, WIDE,
        )  # fmt: skip
    else:
        b_m, b_l, b_acc = walk(
            _step, state, given, (VEC, IS_CAUSAL, PRODUCTS),
            steps, n_valid, p_list, kv_len, p_kv_lens, KV_SLOT, BN, MODE, HAS_PARTIAL, WIDE,
        )  # fmt: skip

    # A row that saw nothing, or is not valid, has sum 0. NaN is not 0 and stays.
    m_seen = m_m & (b_l != 0.0)
    b_l = tl.where(m_seen, b_l, 1.0)
    b_out = b_acc / b_l[:, None]
    if QUANTIZED:
        b_out *= tl.load(v_scale + i_head * BDV + o_dv)[None, :]
        if v_mean is not None:
            b_out += tl.load(v_mean + i_head * BDV + o_dv)[None, :]
        b_lse = (b_m + tl.log2(b_l) - P_EXPONENT) * (scale / scale_log2)
        if lse_shift is not None:
            p_shift = lse_shift + (i_b * HQ + i_h) * q_len + start
            b_lse += tl.load(p_shift + o_m, mask=m_m, other=0.0)
    else:
        b_lse = b_m * scale + tl.log(b_l)
    b_out = tl.where(m_seen[:, None], b_out, 0.0)
    b_lse = tl.where(m_seen, b_lse, float("-inf"))
    store_tile(p_out, start, b_out, o_m, o_m < n_rows, o_dv, stride_out_s, DV_OUT, VEC_OUT)
    tl.store(lse + (i_b * HQ + i_h) * q_len + start + o_m, b_lse, mask=o_m < n_rows)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists | None,
    q_side: Side,
    kv_side: Side,
    *,
    scale: float,
    is_causal: bool,
    row: LaunchRow,
) -> list[Launch]:
    """The launches that fill ``out`` [B, HQ, Sq, DV] and ``lse`` fp32 [B, HQ, Sq], contiguous.

    ``lists`` holds, per query slot, the key slots it sees; None for dense attention.
    """
    args = head_args(q=q, k=k, v=v, out=out) | problem_args(q, k, scale, is_causal)
    args |= dim_args(q.shape[3], v.shape[3], args["VEC"])
    args |= {"VEC_V": args["VEC"], "VEC_OUT": args["VEC"], "DV_OUT": args["DV"]}
    args |= {"PACKED": packed(k, v), **code_args(None, q_side, kv_side)}
    return _launches(args, out, lse, lists, q_side, kv_side, row)


def quantized_attention_forward(
    codes: Codes,
    out: Tensor,
    lse: Tensor,
    lists: Lists | None,
    q_side: Side,
    kv_side: Side,
    *,
    scale: float,
    is_causal: bool,
    row: LaunchRow,
) -> list[Launch]:
    """The same from codes, which other launches must have filled."""
    if codes.options.pv_accumulation != "fp32" and row.step > TILE:
        row = row._replace(step=TILE)  # sums of more products could exceed fp16
    if codes.score_shift is not None and row.own > TILE:  # a program has one row of the shift
        row = row._replace(own=TILE, num_warps=max(4, row.num_warps * TILE // row.own))
    args = head_args(out=out)
    dim, dim_v = codes.q.shape[3], codes.v_scale.shape[2]
    args |= {"VEC_OUT": args["VEC"], "DV_OUT": columns(out.shape[3], dim_v, args["VEC"])}
    args |= head_args(v=codes.v)
    args["VEC_V"] = args["VEC"]
    args |= head_args(q=codes.q, k=codes.k) | dim_args(dim, dim_v, args["VEC"])
    args |= problem_args(codes.q, codes.k, scale, is_causal)
    args |= {"PACKED": False, **code_args(codes, q_side, kv_side)}
    return _launches(args, out, lse, lists, q_side, kv_side, row)


def _launches(
    args: dict[str, Any],
    out: Tensor,
    lse: Tensor,
    lists: Lists | None,
    q_side: Side,
    kv_side: Side,
    row: LaunchRow,
) -> list[Launch]:
    steps = plan_steps(lists, q_side, kv_side, args["IS_CAUSAL"], row)
    args |= {"lse": lse, "HQ": out.shape[1]}
    args |= side_args("q", steps.own) | side_args("kv", steps.other)
    return steps.launches(attention_fwd_kernel, out.shape[0] * out.shape[1], args)
