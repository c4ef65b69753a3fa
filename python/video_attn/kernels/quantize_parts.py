"""Device functions of the quantized precisions: rounding, scales, scale groups.

They follow ``video_attn/quantize.py``, the definition. A magnitude is compared as the bits of its
fp32 number: as integers NaN > inf > everything finite, so nothing strange gets lost in a maximum.
"""

import os

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # quantize.TILE
_INFINITY = tl.constexpr(0x7F800000)
_TINY = tl.constexpr(0x0D800000)  # 2^-100: a smaller amax counts as 0
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: x + it ends in x rounded to even, |x| < 2^22
# Fixed when kernels are defined, as in Triton itself.
_INTERPRETED = tl.constexpr(
    os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
)


@triton.jit
def magnitude_bits(b_x):
    """|x| as the bits of an fp32 number."""
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(b_amax, LIMIT: tl.constexpr):
    """``amax / LIMIT`` and ``LIMIT / amax`` from the bits of amax.

    Zeros for an amax below 2^-100; one that is inf or NaN is the scale, with inverse 0.
    """
    b_value = b_amax.to(tl.float32, bitcast=True)
    b_strange = b_amax >= _INFINITY
    b_none = b_strange | (b_amax < _TINY)
    b_value = tl.where(b_strange, b_value, tl.where(b_none, 1.0, b_value))
    b_limit = tl.full(b_amax.shape, LIMIT, tl.float32)
    b_scale = tl.where(b_none, 0.0, tl.div_rn(b_value, b_limit))
    b_inverse = tl.where(b_none, 0.0, tl.div_rn(b_limit, b_value))
    return tl.where(b_strange, b_value, b_scale), b_inverse


@triton.jit
def power_of_two_and_inverse(b_amax):
    """The power of two that brings amax, given as bits, into [256, 512) by division; its inverse.

    Zeros and strange values as in :func:`scale_and_inverse`.
    """
    b_strange = b_amax >= _INFINITY
    b_none = b_strange | (b_amax < _TINY)
    b_shift = tl.where(b_none, 0, (b_amax >> 23) - 135)  # 2^8 has the exponent bits 135
    b_scale = ((b_shift + 127) << 23).to(tl.float32, bitcast=True)
    b_inverse = ((127 - b_shift) << 23).to(tl.float32, bitcast=True)
    b_scale = tl.where(b_none, 0.0, b_scale)
    b_scale = tl.where(b_strange, b_amax.to(tl.float32, bitcast=True), b_scale)
    return b_scale, tl.where(b_none, 0.0, b_inverse)


@triton.jit
def rotate(b_x, SIZE: tl.constexpr):
    """Rows of fp32 ``b_x``, each run of SIZE columns times a normalised Hadamard matrix.

    Sums and differences of neighbours, all sums before all differences, as often as SIZE has
    factors of two: this leaves the columns in the order of ``quantize.hadamard_rotation``.
    """
    ROWS: tl.constexpr = b_x.shape[0]
    COLUMNS: tl.constexpr = b_x.shape[1]
    RUNS: tl.constexpr = ROWS * COLUMNS // SIZE
    for i in tl.static_range(8):  # 2^8 columns at most
        if 2**i < SIZE:
            b_even, b_odd = tl.split(tl.reshape(b_x, [RUNS, SIZE // 2, 2]))
            b_x = tl.join(b_even + b_odd, b_even - b_odd)
            b_x = tl.reshape(tl.permute(b_x, [0, 2, 1]), [RUNS, SIZE])
    return tl.reshape(b_x * (SIZE**-0.5), [ROWS, COLUMNS])


@triton.jit
def encode(b_x, b_inverse, dtype: tl.constexpr):
    """Codes of fp32 numbers times an inverse scale: nearest, ties to even; 0 where that is 0.

    The scale comes from an amax of these numbers, so no product rounds to more than the largest
    code, and a NaN or inf among them has made the inverse 0.
    """
    b_x = tl.where(b_inverse != 0.0, b_x * b_inverse, 0.0)
    if dtype == tl.float16:
        b_code = b_x.to(tl.float16)
    else:
        b_code = to_int8(b_x) if dtype == tl.int8 else to_fp8(b_x, dtype)
    return b_code


@triton.jit
def to_int8(b_x):
    """fp32 numbers in the range of INT8 to INT8: nearest, ties to even."""
    # Between the product that made x and the sum, the minimum keeps the compiler from fusing them,
    # which would round once instead of twice.
    b_x = tl.minimum(b_x, 127.0) + _ROUNDER
    return b_x.to(tl.int32, bitcast=True).to(tl.int8)  # the last bits are the integer


@triton.jit
def to_fp8(b_x, dtype: tl.constexpr):
    """fp32 numbers in the range of an FP8 type to that type: nearest, ties to even."""
    if _INTERPRETED:
        # Its conversion is not a rounding to nearest. It is exact for numbers that the type holds,
        # so they are rounded before: in steps of 2^-3 of their power of two, or of the smallest.
        EMIN: tl.constexpr = -7 if dtype == tl.float8e4b8 else -6
        b_power = (b_x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        b_rounder = tl.maximum(b_power, 2.0**EMIN) * 1572864.0  # 1.5 * 2^20
        b_x = (b_x + b_rounder) - b_rounder
    return b_x.to(dtype)


@triton.jit
def scale_group(o_token, SLOT: tl.constexpr, GROUPS: tl.constexpr):
    """The scale group of tokens. GROUPS: how a tile of 64 is shared out, see ``quantize.py``.

    SLOT: where tiles start afresh. With GROUPS None all tokens are in group 0.
    """
    o_group = o_token * 0
    if GROUPS is not None:
        OUTER: tl.constexpr = GROUPS[0]
        INNER: tl.constexpr = GROUPS[1]
        RUN: tl.constexpr = GROUPS[2]
        TILES: tl.constexpr = (SLOT + TILE - 1) // TILE
        o_in = o_token % SLOT
        o_row = o_in % TILE
        o_group = (o_token // SLOT * TILES + o_in // TILE) * (OUTER * INNER)
        o_group += o_row // (TILE // OUTER) * INNER + o_row // RUN % INNER
    return o_group


@triton.jit
def group_amax(b_amax, GROUPS: tl.constexpr):
    """From the amax bits of 64 rows: those of their groups, [OUTER * INNER], and of every row."""
    OUTER: tl.constexpr = GROUPS[0]
    INNER: tl.constexpr = GROUPS[1]
    RUN: tl.constexpr = GROUPS[2]
    REPEATS: tl.constexpr = TILE // (OUTER * INNER * RUN)
    b_rows = tl.reshape(b_amax, [OUTER, REPEATS, INNER, RUN])
    b_group = tl.max(tl.max(b_rows, 3), 1)  # [OUTER, INNER]
    b_rows = tl.broadcast_to(b_group[:, None, :, None], [OUTER, REPEATS, INNER, RUN])
    return tl.reshape(b_group, [OUTER * INNER]), tl.reshape(b_rows, [TILE])


@triton.jit
def channel_mean(partial, counts, i_head, n_chunks, BD: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean of the channels of a head over its valid tokens, [BD], from statistics of chunks; 0
    where there are none.
    """
    o_c, o_d = tl.arange(0, CHUNKS), tl.arange(0, BD)
    p_sum = partial + i_head * n_chunks * (4 * BD) + o_c[:, None] * (4 * BD) + o_d[None, :]
    b_sum = tl.sum(tl.load(p_sum, mask=(o_c < n_chunks)[:, None], other=0.0), 0)
    n = tl.sum(tl.load(counts + i_head * n_chunks + o_c, mask=o_c < n_chunks, other=0), 0)
    b_count = tl.maximum(n, 1).to(tl.float32)
    return tl.div_rn(b_sum, tl.broadcast_to(b_count, [BD]))
