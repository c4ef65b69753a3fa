"""Device functions of a step of the forward kernel over codes; see ``quantized_reference.py``."""

import triton
import triton.language as tl

from .quantize_parts import TILE, scale_group, to_fp8
from .tiles import load_tile, seen_keys

# Sums of FP8 products inside the tensor core of sm_90 keep about 14 bits. After so many products
# they are added to fp32 numbers; other chips sum in fp32 anyway.
_FP8_RUN = tl.constexpr(128)


@triton.jit
def quantized_step(state, rows, given, OPTIONS: tl.constexpr, MASKED: tl.constexpr):
    """Folds a step of codes into (maximum, sum, acc); ``given``: the forward kernel's, and scales.

    Maxima are of base-2 scores.
    """
    b_m, b_l, b_acc = state
    start_n, o_n, m_n = rows
    plain, b_factor, p_k_scale, p_shift = given
    b_q, p_k, p_v, _, stride_v_s, o_d, o_dv, _, _, last_key, _ = plain
    VEC_V: tl.constexpr = OPTIONS[0]
    IS_CAUSAL: tl.constexpr = OPTIONS[1]
    K_SCALE_SLOT: tl.constexpr = OPTIONS[2]
    K_GROUPS: tl.constexpr = OPTIONS[3]
    MODE: tl.constexpr = OPTIONS[4]
    P_EXPONENT: tl.constexpr = OPTIONS[5]
    FP16_SUMS: tl.constexpr = OPTIONS[6]
    SHIFTED: tl.constexpr = OPTIONS[7]
    # Rows of K, and of an fp16 V, follow one another: strides that the compiler knows.
    b_k = load_tile(p_k, start_n, o_n, m_n, o_d, o_d.shape[0], None, 1, MASKED)  # [BN, BD]
    k_scales = key_scales(p_k_scale, start_n, o_n, m_n, K_SCALE_SLOT, K_GROUPS, MODE, MASKED)
    b_s = quantized_scores(b_q, b_k)
    m_s = seen_keys(start_n, o_n, m_n, last_key, MASKED and IS_CAUSAL)
    b_shift = None
    if SHIFTED:
        b_shift = tl.load(p_shift + start_n + o_n, mask=m_n, other=0.0)  # [BN]
    b_p, b_m, b_l, b_alpha = online_softmax_scaled(
        b_s, b_factor, k_scales, b_shift, m_s, b_m, b_l, P_EXPONENT, MASKED
    )
    b_acc = b_acc * b_alpha[:, None]
    if p_v.dtype.element_ty == tl.float16:
        b_v = load_tile(p_v, start_n, o_n, m_n, o_dv, o_dv.shape[0], None, 1, MASKED)  # [BN, BDV]
    else:
        # Codes of tokens that do not count are 0, past the end too: only gathers need a mask.
        M_V: tl.constexpr = MASKED and MODE == "gather"
        b_v = load_channels(p_v, start_n, o_n, m_n, o_dv, stride_v_s, VEC_V, M_V)  # [BDV, BN]
    return b_m, b_l, add_quantized_values(b_acc, b_p, b_v, FP16_SUMS)


@triton.jit
def query_factors(
    p_scale, start, o_m, m_m, scale_log2, SLOT: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """What turns products with codes of own rows into base-2 scores, but for K's scale, [BM]."""
    o_group = scale_group(start + o_m, SLOT, GROUPS)
    return tl.load(p_scale + o_group, mask=m_m, other=0.0) * scale_log2


@triton.jit
def key_scales(
    p_scale, start, o_n, m_n, SLOT: tl.constexpr, GROUPS: tl.constexpr,
    MODE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K's scales of a step: (one number or [BN],), or two numbers where it is two tiles."""
    TILES: tl.constexpr = (o_n.shape[0] + TILE - 1) // TILE
    if GROUPS is None:
        k_scales = (tl.load(p_scale),)
    elif GROUPS[0] * GROUPS[1] == 1 and SLOT == TILE and MODE != "gather" and TILES + MASKED <= 2:
        p_tile = p_scale + start // TILE
        k_scales = (tl.load(p_tile),)
        if TILES == 2:
            k_scales = (k_scales[0], tl.load(p_tile + 1))
    else:
        o_group = scale_group(start + o_n, SLOT, GROUPS)
        if MASKED:
            k_scales = (tl.load(p_scale + o_group, mask=m_n, other=0.0),)
        else:
            k_scales = (tl.load(p_scale + o_group),)
    return k_scales


@triton.jit
def quantized_scores(b_q, b_k):
    """Products of codes, fp32 [BM, BN]."""
    if b_q.dtype == tl.int8:
        b_s = tl.dot(b_q, tl.trans(b_k)).to(tl.float32)  # int32 sums are exact
    elif b_q.shape[1] > _FP8_RUN:
        b_s = tl.dot(b_q, tl.trans(b_k), max_num_imprecise_acc=_FP8_RUN)
    else:
        b_s = tl.dot(b_q, tl.trans(b_k))
    return b_s


@triton.jit
def scaled_scores(b_s, b_factor, k_scales, MASKED: tl.constexpr):
    """Factors that bring scores to base 2, [BM, BN] or [BM, 1], and maxima of rows after it, [BM].

    Scores that share a factor, which is not negative, have their maximum before it: one product
    instead of one for each. MASKED: no maxima, b_s has rows that do not count.
    """
    b_max = b_factor
    if len(k_scales) == 2:
        b_first, b_second = b_factor * k_scales[0], b_factor * k_scales[1]
        m_first = tl.arange(0, b_s.shape[1])[None, :] < TILE
        b_factors = tl.where(m_first, b_first[:, None], b_second[:, None])
        b_max = tl.maximum(
            tl.max(tl.where(m_first, b_s, float("-inf")), 1) * b_first,
            tl.max(tl.where(m_first, float("-inf"), b_s), 1) * b_second,
        )
    elif len(k_scales[0].shape) == 0:
        b_factors = (b_factor * k_scales[0])[:, None]
        if not MASKED:
            b_max = tl.max(b_s, 1) * (b_factor * k_scales[0])
    else:
        b_factors = b_factor[:, None] * k_scales[0][None, :]
        if not MASKED:
            b_max = tl.max(b_s * b_factors, 1)
    return b_factors, b_max


@triton.jit
def online_softmax_scaled(
    b_s, b_factor, k_scales, b_shift, m_s, b_m, b_l, EXPONENT: tl.constexpr, MASKED: tl.constexpr
):
    """Folds scores in: weights times 2^EXPONENT, new maximum, new sum, factor for earlier sums.

    Maxima are of base-2 scores: the factors change from step to step. b_shift: None, or numbers
    [BN] to add to the scores.
    """
    SHIFTED: tl.constexpr = b_shift is not None
    b_factors, b_max = scaled_scores(b_s, b_factor, k_scales, MASKED or SHIFTED)
    if MASKED or SHIFTED:
        b_x = b_s * b_factors
        if SHIFTED:
            b_x += b_shift[None, :]
        if MASKED:
            b_x = tl.where(m_s, b_x, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_x, 1))
        # Rows that have seen no key yet: any finite pivot gives weights 0.
        b_pivot = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
        b_p = tl.exp2(b_x - (b_pivot - EXPONENT)[:, None])
    else:
        b_m_new = tl.maximum(b_m, b_max)
        b_pivot = b_m_new
        b_p = tl.exp2(b_s * b_factors - (b_pivot - EXPONENT)[:, None])
    b_alpha = tl.exp2(b_m - b_pivot)
    return b_p, b_m_new, b_l * b_alpha + tl.sum(b_p, 1), b_alpha


@triton.jit
def load_channels(
    p_head, start, o_row, m_row, o_channel, stride, VEC: tl.constexpr, MASKED: tl.constexpr
):
    """Rows ``start + o_row`` of an FP8 V, which lies as [channels, rows]: [BDV, BN]."""
    p_tile = p_head + o_channel.to(tl.int64)[:, None] * (stride * VEC) + (start + o_row)[None, :]
    m_tile = m_row[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0) if MASKED else tl.load(p_tile)


@triton.jit
def add_quantized_values(b_acc, b_p, b_v, FP16_SUMS: tl.constexpr):
    """acc + p v of one step, fp32 [BM, BDV]; p is rounded to the type of v.

    fp16 v is [BN, BDV]; FP8 v is [BDV, BN]. FP16_SUMS: the products of the step are summed in fp16.
    """
    if b_v.dtype == tl.float16:
        b_p = b_p.to(tl.float16)
        if FP16_SUMS:
            b_acc += tl.dot(b_p, b_v, out_dtype=tl.float16).to(tl.float32)
        else:
            b_acc = tl.dot(b_p, b_v, b_acc)
    else:
        b_p = to_fp8(b_p, b_v.dtype)
        b_acc += tl.dot(b_p, tl.trans(b_v))
    return b_acc
