"""Attention forward: softmax(scale * q k^T) v over the listed keys, and its log-sum-exp."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..quantize import TILE
from .codes import Codes, code_args
from .launch import Launch, Lists, Side, head_args, problem_args, side_args
from .launch_tables import LaunchRow
from .quantized_step import (
    add_quantized_values,
    key_scales,
    load_channels,
    online_softmax_scaled,
    quantized_scores,
    query_factors,
)
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


@triton.jit
def _scores(b_q, b_k):
    """q k^T of one step, not yet scaled, fp32 [BM, BN]."""
    return tl.dot(b_q, tl.trans(b_k), input_precision="ieee")


@triton.jit
def _add_values(b_acc, b_p, b_v):
    """acc + p v of one step, fp32 [BM, BDV]."""
    return tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")


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
def attention_fwd_kernel(
    q, k, v, out, lse, full, counts, lists, q_lens, kv_lens,
    q_scale, k_scale, v_scale, v_mean, lse_shift,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_out_b, stride_out_h, stride_out_s,
    stride_counts_b, stride_counts_h, stride_lists_b, stride_lists_h, stride_lists_r,
    stride_q_lens_b, stride_kv_lens_b,
    HQ, q_len, kv_len, n_tiles, n_q_groups, n_k_groups, scale, scale_log2,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    Q_SLOT: tl.constexpr, KV_SLOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, HAS_PARTIAL: tl.constexpr, IS_CAUSAL: tl.constexpr,
    QUANTIZED: tl.constexpr, Q_GROUPS: tl.constexpr, K_GROUPS: tl.constexpr,
    Q_SCALE_SLOT: tl.constexpr, K_SCALE_SLOT: tl.constexpr,
    P_EXPONENT: tl.constexpr, FP16_SUMS: tl.constexpr, DV_OUT: tl.constexpr,
    VEC: tl.constexpr, VEC_OUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j exp(s_ij - lse_i) v_j, lse_i = log sum_j exp(s_ij), s = scale q k^T.

    One program per query tile; online softmax in base 2. QUANTIZED: q, k, v are codes with scales,
    see ``codes.py``, D and DV are their padded dims; the weights are rounded as v is.
    """
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
    p_k = head_rows(k, i_b, i_h // G, stride_k_b, stride_k_h, VEC)
    p_v = head_rows(v, i_b, i_h // G, stride_v_b, stride_v_h, VEC)
    p_out = head_rows(out, i_b, i_h, stride_out_b, stride_out_h, VEC_OUT)
    last_key = (start + o_m).to(tl.int32) + (kv_len - q_len)  # that a causal row sees
    b_q = load_tile(p_q, start, o_m, m_m, o_d, stride_q_s, D, VEC, True)  # [BM, BD]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    if QUANTIZED:
        i_head = i_b * (HQ // G) + i_h // G
        b_factor = query_factors(
            q_scale + (i_b * HQ + i_h) * n_q_groups, start, o_m, m_m, scale_log2,
            Q_SCALE_SLOT, Q_GROUPS,
        )  # fmt: skip
        p_k_scale = k_scale + i_head * n_k_groups

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
            m_s = m_n[None, :]
            if MASKED and IS_CAUSAL:
                m_s = m_s & ((start_n + o_n).to(tl.int32)[None, :] <= last_key[:, None])
            if QUANTIZED:
                b_s, b_row_factor = quantized_scores(
                    b_q, b_k, b_factor,
                    key_scales(p_k_scale, start_n, o_n, m_n, K_SCALE_SLOT, K_GROUPS, MODE, MASKED),
                )  # fmt: skip
                b_p, b_m, b_l, b_alpha = online_softmax_scaled(
                    b_s, b_row_factor, m_s, b_m, b_l, P_EXPONENT, MASKED
                )
            else:
                b_s = _scores(b_q, b_k)
                if MASKED:
                    b_s = tl.where(m_s, b_s, float("-inf"))
                b_p, b_m, b_l, b_alpha = _online_softmax(b_s, b_m, b_l, scale_log2, MASKED)
            if QUANTIZED and v.dtype.element_ty != tl.float16:
                b_v = load_channels(p_v, start_n, o_n, m_n, o_dv, stride_v_s, VEC, MASKED)
            else:
                b_v = load_tile(  # [BN, BDV]
                    p_v, start_n, o_n, m_n, o_dv, stride_v_s, DV, VEC, MASKED
                )
            b_acc = b_acc * b_alpha[:, None]
            if QUANTIZED:
                b_acc = add_quantized_values(b_acc, b_p, b_v, FP16_SUMS)
            else:
                b_acc = _add_values(b_acc, b_p, b_v)

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
    args = head_args(q=q, k=k, v=v, out=out) | problem_args(q, k, v, scale, is_causal)
    args |= {"VEC_OUT": args["VEC"], "DV_OUT": args["DV"], **code_args(None, q_side, kv_side)}
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
    args = head_args(out=out)
    args |= {"VEC_OUT": args["VEC"], "DV_OUT": out.shape[3]}
    args |= head_args(q=codes.q, k=codes.k, v=codes.v)
    args |= problem_args(codes.q, codes.k, codes.v_scale[:, :, None], scale, is_causal)
    args |= code_args(codes, q_side, kv_side)
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
    args |= {"lse": lse, "HQ": out.shape[1], "scale_log2": args["scale"] * math.log2(math.e)}
    args |= side_args("q", steps.own) | side_args("kv", steps.other)
    return steps.launches(attention_fwd_kernel, out.shape[0] * out.shape[1], args)
