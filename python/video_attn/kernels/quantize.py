"""Quantizers: q, k, v to codes and scales, as ``video_attn/quantize.py`` defines them.

A side is cut in tiles of 64 tokens, afresh in every slot. Where a mean or the amax of a whole head
or channel is needed, a first kernel takes statistics of chunks of tiles, which the programs of the
second add up: K and V are read twice then, Q once. Tokens that are not valid count nowhere and
have code 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize import TILE, v_limit
from .codes import FP8_ROWS, Codes, code_limit, padded_codes
from .launch import (
    Launch,
    Side,
    columns,
    lens_args,
    named_strides,
    temporary,
    vector_length,
    wide_rows,
)
from .quantize_parts import (
    channel_mean,
    encode,
    group_amax,
    magnitude_bits,
    power_of_two_and_inverse,
    rotate,
    scale_and_inverse,
)
from .score_shift import score_shift_launch
from .tiles import head_rows, load_tile, own_tile, program_part, sized_jit, store_tile, tile_rows

_CHUNKS = 32  # of statistics, per head, at most
_PROGRAM_TILES = 4  # that a program of the second kernels quantizes
_STATISTICS = 4  # per channel of a chunk: sum, largest, smallest, amax; see _channel_statistics
_STATISTICS_OPTIONS = {"num_warps": 8, "num_stages": 1}
_OPTIONS = {"num_warps": 4, "num_stages": 1}


@sized_jit
def channel_statistics_kernel(
    x, partial, counts, lens,
    stride_x_b, stride_x_h, stride_x_s, stride_lens_b,
    H, D, length, n_tiles, n_chunks, CHUNK,
    SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MEAN: tl.constexpr, AMAX: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of CHUNK tiles, for every channel: the sum, where MEAN is wanted, and how many tokens; where
    AMAX is wanted that, or with MEAN the largest and smallest, from which it is subtracted later.
    """
    EXTREMES: tl.constexpr = MEAN and AMAX
    i_chunk, i_b, i_h = program_part(n_chunks, H)
    i_partial = (i_b * H + i_h) * n_chunks + i_chunk
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    p_x = head_rows(x, i_b, i_h, stride_x_b, stride_x_h, VEC)
    o_m, o_d = tile_rows(BM, WIDE), tl.arange(0, BD)
    b_sum = tl.zeros([BM, BD], tl.float32)
    b_largest = tl.full([BM, BD], float("-inf"), tl.float32)
    b_smallest = tl.full([BM, BD], float("inf"), tl.float32)
    b_amax = tl.zeros([BM, BD], tl.int32)
    n_counted = tl.zeros((), tl.int32)
    for i_tile in range(i_chunk * CHUNK, tl.minimum(i_chunk * CHUNK + CHUNK, n_tiles)):
        _, start, _, n_valid = own_tile(i_tile, length, p_lens, SLOT, BM)
        n_valid = tl.minimum(tl.maximum(n_valid, 0), BM).to(tl.int32)
        m_m = o_m < n_valid
        b_x = load_tile(p_x, start, o_m, m_m, o_d, stride_x_s, D, VEC, True)  # [BM, BD]
        b_x = b_x.to(tl.float32)
        n_counted += n_valid
        if MEAN:
            b_sum += b_x
        if EXTREMES:
            b_largest = tl.maximum(b_largest, tl.where(m_m[:, None], b_x, float("-inf")))
            b_smallest = tl.minimum(b_smallest, tl.where(m_m[:, None], b_x, float("inf")))
        elif AMAX:
            b_amax = tl.maximum(b_amax, magnitude_bits(b_x))
    p_partial = partial + i_partial * (4 * BD) + o_d
    if MEAN:
        tl.store(p_partial, tl.sum(b_sum, 0))
        tl.store(counts + i_partial, n_counted)
    if EXTREMES:
        tl.store(p_partial + BD, tl.max(b_largest, 0))
        tl.store(p_partial + 2 * BD, tl.min(b_smallest, 0))
    elif AMAX:
        tl.store(p_partial + 3 * BD, tl.max(b_amax, 0).to(tl.float32, bitcast=True))


@triton.jit
def _channel_amax(
    partial, i_head, n_chunks, b_mean, SMOOTH: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr
):
    """The bits of the amax of every channel, [BD], the mean being subtracted for SMOOTH.

    A mean that is not finite makes the amax so too: one of the two differences is inf or NaN.
    """
    o_c, o_d = tl.arange(0, CHUNKS), tl.arange(0, BD)
    m_c = (o_c < n_chunks)[:, None]
    p = partial + i_head * n_chunks * (4 * BD) + o_c[:, None] * (4 * BD) + o_d[None, :]
    if SMOOTH:
        b_largest = tl.max(tl.load(p + BD, mask=m_c, other=float("-inf")), 0)
        b_smallest = tl.min(tl.load(p + 2 * BD, mask=m_c, other=float("inf")), 0)
        b_amax = tl.maximum(magnitude_bits(b_largest - b_mean), magnitude_bits(b_mean - b_smallest))
        b_amax = tl.where(b_largest < b_smallest, 0, b_amax)  # no token at all
    else:
        b_amax = tl.max(magnitude_bits(tl.load(p + 3 * BD, mask=m_c, other=0.0)), 0)
    return b_amax


@sized_jit
def quantize_tokens_kernel(
    x, codes, scales, partial, k_partial, k_counts, lse_shift, q_means, lens,
    stride_x_b, stride_x_h, stride_x_s, stride_codes_b, stride_codes_h, stride_codes_s,
    stride_lens_b,
    H, D, length, n_tiles, n_programs, n_groups, n_chunks, n_k_chunks, scale,
    G: tl.constexpr, SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    GROUPS: tl.constexpr, LIMIT: tl.constexpr, SMOOTH: tl.constexpr, CHUNKS: tl.constexpr,
    ROTATION: tl.constexpr, PROGRAM_TILES: tl.constexpr,
    VEC: tl.constexpr, VEC_CODES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Codes of Q or K, with a scale per group of tokens; GROUPS None: one per head.

    The mean of K comes from ``k_partial``, head i_h // G. SMOOTH: it is subtracted (K itself).
    lse_shift: scale times the products with it are stored (Q). q_means: the mean of every tile is
    stored there, and subtracted (Q). ROTATION: 0, or how many channels a Hadamard matrix turns
    together.
    """
    i_program, i_b, i_h = program_part(n_programs, H)
    i_head = i_b * H + i_h
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    p_x = head_rows(x, i_b, i_h, stride_x_b, stride_x_h, VEC)
    p_codes = head_rows(codes, i_b, i_h, stride_codes_b, stride_codes_h, VEC_CODES)
    o_m, o_d = tile_rows(BM, WIDE), tl.arange(0, BD)
    b_mean = tl.zeros([BD], tl.float32)
    if SMOOTH or lse_shift is not None:
        i_k_head = i_b * (H // G) + i_h // G
        b_mean = channel_mean(k_partial, k_counts, i_k_head, n_k_chunks, BD, CHUNKS)
    if GROUPS is None:
        b_amax = tl.max(_channel_amax(partial, i_head, n_chunks, b_mean, SMOOTH, BD, CHUNKS), 0)
        b_scale, b_inverse = scale_and_inverse(b_amax, LIMIT)
        if i_program == 0:
            tl.store(scales + i_head, b_scale)
    i_first = i_program * PROGRAM_TILES
    for i_tile in range(i_first, tl.minimum(i_first + PROGRAM_TILES, n_tiles)):
        _, start, n_rows, n_valid = own_tile(i_tile, length, p_lens, SLOT, BM)
        if n_rows > 0:
            m_m = o_m < n_valid
            b_x = load_tile(p_x, start, o_m, m_m, o_d, stride_x_s, D, VEC, True)  # [BM, BD]
            b_x = b_x.to(tl.float32)
            if lse_shift is not None:
                b_shift = tl.sum(b_x * b_mean[None, :], 1) * scale
                tl.store(lse_shift + i_head * length + start + o_m, b_shift, mask=o_m < n_rows)
            if q_means is not None:
                n_counted = tl.minimum(tl.maximum(n_valid, 1), BM).to(tl.float32)
                b_own = tl.div_rn(tl.sum(b_x, 0), tl.broadcast_to(n_counted, [BD]))
                tl.store(q_means + (i_head * n_tiles + i_tile) * BD + o_d, b_own)
                b_x = tl.where(m_m[:, None], b_x - b_own[None, :], 0.0)
            if SMOOTH:
                b_x = tl.where(m_m[:, None], b_x - b_mean[None, :], 0.0)
            if ROTATION > 0:
                b_x = rotate(b_x, ROTATION)
            if GROUPS is not None:
                b_group, b_row = group_amax(tl.max(magnitude_bits(b_x), 1), GROUPS)
                b_scale, _inverse = scale_and_inverse(b_group, LIMIT)
                o_group = tl.arange(0, GROUPS[0] * GROUPS[1])
                p_scale = scales + i_head * n_groups + i_tile * (GROUPS[0] * GROUPS[1])
                tl.store(p_scale + o_group, b_scale)
                _scale_row, b_inverse_row = scale_and_inverse(b_row, LIMIT)
            else:
                b_inverse_row = tl.broadcast_to(b_inverse, [BM])
            b_code = encode(b_x, b_inverse_row[:, None], codes.dtype.element_ty)
            store_tile(
                p_codes, start, b_code, o_m, o_m < n_rows, o_d, stride_codes_s, None, VEC_CODES
            )


@sized_jit
def quantize_channels_kernel(
    x, codes, scales, means, partial, counts, lens,
    stride_x_b, stride_x_h, stride_x_s, stride_codes_b, stride_codes_h, stride_codes_s,
    stride_lens_b,
    H, D, length, n_tiles, n_programs, n_chunks,
    SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    LIMIT: tl.constexpr, PER_HEAD: tl.constexpr, CHUNKS: tl.constexpr, PAST: tl.constexpr,
    PROGRAM_TILES: tl.constexpr, VEC: tl.constexpr, VEC_CODES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Codes of V with a scale per channel; FP8 codes as [channels, tokens]. means: smooth_v."""
    i_program, i_b, i_h = program_part(n_programs, H)
    i_head = i_b * H + i_h
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    p_x = head_rows(x, i_b, i_h, stride_x_b, stride_x_h, VEC)
    p_codes = head_rows(codes, i_b, i_h, stride_codes_b, stride_codes_h, VEC_CODES)
    o_m, o_d = tile_rows(BM, WIDE), tl.arange(0, BD)
    SMOOTH: tl.constexpr = means is not None
    b_mean = tl.zeros([BD], tl.float32)
    if SMOOTH:
        b_mean = channel_mean(partial, counts, i_head, n_chunks, BD, CHUNKS)
    b_amax = _channel_amax(partial, i_head, n_chunks, b_mean, SMOOTH, BD, CHUNKS)
    if PER_HEAD:
        b_amax = tl.broadcast_to(tl.max(b_amax, 0), [BD])
    if codes.dtype.element_ty == tl.float16:
        b_scale, b_inverse = power_of_two_and_inverse(b_amax)
    else:
        b_scale, b_inverse = scale_and_inverse(b_amax, LIMIT)
    if i_program == 0:
        tl.store(scales + i_head * BD + o_d, b_scale)
        if SMOOTH:
            tl.store(means + i_head * BD + o_d, b_mean)
    i_first = i_program * PROGRAM_TILES
    for i_tile in range(i_first, tl.minimum(i_first + PROGRAM_TILES, n_tiles)):
        _, start, n_rows, n_valid = own_tile(i_tile, length, p_lens, SLOT, BM)
        if n_rows > 0:
            m_m = o_m < n_valid
            b_x = load_tile(p_x, start, o_m, m_m, o_d, stride_x_s, D, VEC, True)  # [BM, BD]
            b_x = b_x.to(tl.float32)
            if SMOOTH:
                b_x = tl.where(m_m[:, None], b_x - b_mean[None, :], 0.0)
            b_code = encode(b_x, b_inverse[None, :], codes.dtype.element_ty)
            if codes.dtype.element_ty == tl.float16:
                store_tile(
                    p_codes, start, b_code, o_m, o_m < n_rows, o_d, stride_codes_s, None, VEC_CODES
                )
            else:
                p_tile = p_codes + o_d.to(tl.int64)[:, None] * (stride_codes_s * VEC_CODES)
                p_tile += (start + o_m)[None, :]
                tl.store(p_tile, tl.trans(b_code), mask=(o_m < n_rows)[None, :])
    if codes.dtype.element_ty != tl.float16 and i_program == n_programs - 1:
        # Past the end too, where steps read without a mask.
        o_past = length + tl.arange(0, PAST)
        p_past = p_codes + o_d.to(tl.int64)[:, None] * (stride_codes_s * VEC_CODES)
        b_zero = tl.zeros([BD, PAST], tl.float32).to(codes.dtype.element_ty)
        m_past = (o_past < stride_codes_s * VEC_CODES)[None, :]
        tl.store(p_past + o_past[None, :], b_zero, mask=m_past)


class _Statistics(NamedTuple):
    """Statistics of the channels of a tensor, and the launch that takes them."""

    partial: Tensor | None = None
    counts: Tensor | None = None
    n_chunks: int = 0
    launch: tuple[Launch, ...] = ()


def quantize(
    q: Tensor, k: Tensor, v: Tensor, codes: Codes, q_side: Side, kv_side: Side, *, scale: float
) -> list[Launch]:  # fmt: skip
    """The launches that fill ``codes``; ``scale`` of the scores enters only the lse's shift."""
    options = codes.options
    per_head = options.granularity == "per_head"
    none = _Statistics()
    of_q = _statistics(q, q_side, mean=False, amax=True) if per_head else none
    of_k = none
    if per_head or options.smooth_k:
        of_k = _statistics(k, kv_side, mean=options.smooth_k, amax=per_head)
    of_v = _statistics(v, kv_side, mean=options.smooth_v, amax=True)
    key_means = {
        "k_partial": of_k.partial, "k_counts": of_k.counts, "n_k_chunks": of_k.n_chunks,
    }  # fmt: skip
    common = key_means | {
        "LIMIT": code_limit(codes.q.dtype), "scale": scale,
        "ROTATION": q.shape[3] & -q.shape[3] if options.hadamard else 0,
    }  # fmt: skip
    of_role = {
        "q": {
            "lse_shift": codes.lse_shift, "q_means": codes.q_means, "SMOOTH": False,
            "G": q.shape[1] // k.shape[1],
        },
        "k": {"lse_shift": None, "q_means": None, "SMOOTH": options.smooth_k, "G": 1},
    }  # fmt: skip
    launches = [*of_q.launch, *of_k.launch, *of_v.launch]
    for role, x, x_codes, scales, side, statistics in (
        ("q", q, codes.q, codes.q_scale, q_side, of_q),
        ("k", k, codes.k, codes.k_scale, kv_side, of_k),
    ):
        args = _launch_args(x, x_codes, scales, side, statistics) | common | of_role[role]
        args |= {"GROUPS": codes.groups(role), "n_groups": scales.shape[2]}
        launches.append(_launch(quantize_tokens_kernel, x, args))
    if codes.score_shift is not None:
        of_keys = key_means | {"CHUNKS": _CHUNKS}
        launches.append(score_shift_launch(k, codes, kv_side, of_keys, scale))
    args = _launch_args(v, codes.v, codes.v_scale, kv_side, of_v)
    args |= {"counts": of_v.counts, "means": codes.v_mean, "PER_HEAD": per_head, "PAST": FP8_ROWS}
    args |= {"LIMIT": v_limit(codes.precision, options.pv_accumulation, codes.v.dtype)}
    return [*launches, _launch(quantize_channels_kernel, v, args)]


def _statistics(x: Tensor, side: Side, *, mean: bool, amax: bool) -> _Statistics:
    heads, tiles, dim = x.shape[0] * x.shape[1], side.tiles(TILE), padded_codes(x.shape[3])
    chunk = -(-tiles // _CHUNKS)
    n_chunks = -(-tiles // chunk)
    partial = temporary(heads, n_chunks, _STATISTICS, dim, dtype=torch.float32, device=x.device)
    counts = temporary(heads, n_chunks, dtype=torch.int32, device=x.device)
    args = _tensor_args("x", x) | _side_args(side)
    args |= {"BD": dim, "D": columns(x.shape[3], dim, args["VEC"])}
    args |= {"partial": partial, "counts": counts, "H": x.shape[1]}
    args |= {"n_chunks": n_chunks, "CHUNK": chunk, "WIDE": wide_rows(TILE, args)}
    args |= {"MEAN": mean, "AMAX": amax}
    launch = Launch(channel_statistics_kernel, heads * n_chunks, args, _STATISTICS_OPTIONS)
    return _Statistics(partial, counts, n_chunks, (launch,))


def _launch_args(
    x: Tensor, codes: Tensor, scales: Tensor, side: Side, statistics: _Statistics
) -> dict[str, Any]:
    """Arguments that both quantizers have."""
    args = _tensor_args("x", x) | _tensor_args("codes", codes, "_CODES") | _side_args(side)
    dim = padded_codes(x.shape[3])
    args |= {"D": columns(x.shape[3], dim, args["VEC"]), "BD": dim}
    args |= {"H": x.shape[1], "scales": scales}
    args |= {"partial": statistics.partial, "n_chunks": statistics.n_chunks, "CHUNKS": _CHUNKS}
    programs = -(-side.tiles(TILE) // _PROGRAM_TILES)
    args |= {"n_programs": programs, "PROGRAM_TILES": _PROGRAM_TILES}
    return args | {"WIDE": wide_rows(TILE, args)}


def _launch(kernel: Any, x: Tensor, args: dict[str, Any]) -> Launch:
    return Launch(kernel, args["n_programs"] * x.shape[0] * x.shape[1], args, _OPTIONS)


def _tensor_args(name: str, x: Tensor, suffix: str = "") -> dict[str, Any]:
    vec = vector_length(x)
    return named_strides(name, x, "bhs", vec) | {f"VEC{suffix}": vec}


def _side_args(side: Side) -> dict[str, Any]:
    args = {"length": side.length, "n_tiles": side.tiles(TILE), "SLOT": side.slot, "BM": TILE}
    return args | lens_args("lens", side.lens)
