"""What queries without the mean of their tile (smooth_q) leave out of the scores.

It is the mean of 64 queries times every key: one number for the 64 products of Q and K that the
matrix units do on codes, in fp32.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from ..quantize import LOG2E
from .codes import Codes, padded_codes
from .launch import Launch, Side, columns, lens_args, named_strides, vector_length, wide_rows
from .quantize_parts import channel_mean
from .tiles import head_rows, load_tile, own_tile, product, program_part, sized_jit, tile_rows

# Keys, and means, of a product in fp32, whose operands wait in registers: 64 of both spilled 6 KB.
_ROWS = 16


@sized_jit
def score_shift_kernel(
    k, k_partial, k_counts, q_means, shift, lens,
    stride_k_b, stride_k_h, stride_k_s, stride_lens_b,
    HQ, D, length, n_tiles, n_q_tiles, n_k_chunks, scale_log2,
    G: tl.constexpr, SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    SMOOTH: tl.constexpr, CHUNKS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """shift[query tile, key] = scale_log2 * (mean of the tile) (key - mean of keys); one program
    per tile of keys and query head. Keys that do not count have 0.
    """
    i_tile, i_b, i_h = program_part(n_tiles, HQ)
    i_head, i_k_head = i_b * HQ + i_h, i_b * (HQ // G) + i_h // G
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    _, start, n_rows, n_valid = own_tile(i_tile, length, p_lens, SLOT, BM)
    o_m, o_d, o_t = tile_rows(BM, WIDE), tl.arange(0, BD), tl.arange(0, BT)
    m_m = o_m < n_valid
    p_k = head_rows(k, i_b, i_h // G, stride_k_b, stride_k_h, VEC)
    b_k = load_tile(p_k, start, o_m, m_m, o_d, stride_k_s, D, VEC, True).to(tl.float32)  # [BM, BD]
    if SMOOTH:
        b_mean = channel_mean(k_partial, k_counts, i_k_head, n_k_chunks, BD, CHUNKS)
        b_k = tl.where(m_m[:, None], b_k - b_mean[None, :], 0.0)
    for i_first in range(0, n_q_tiles, BT):
        m_t = i_first + o_t < n_q_tiles
        i_row = i_head * n_q_tiles + i_first + o_t
        b_q = tl.load(q_means + i_row[:, None] * BD + o_d[None, :], mask=m_t[:, None], other=0.0)
        b_shift = product(b_q, b_k, "ieee") * scale_log2  # [BT, BM]
        p_shift = shift + i_row[:, None] * length + (start + o_m)[None, :]
        tl.store(p_shift, b_shift, mask=m_t[:, None] & (o_m < n_rows)[None, :])


def score_shift_launch(
    k: Tensor, codes: Codes, kv_side: Side, of_k: dict[str, Any], scale: float
) -> Launch:
    """The launch that fills ``codes.score_shift`` from ``codes.q_means``; of_k: the arguments that
    say where the statistics of the keys are.
    """
    assert codes.score_shift is not None
    batch, heads, q_tiles, _ = codes.score_shift.shape
    vec, dim = vector_length(k), padded_codes(k.shape[3])
    tiles = kv_side.tiles(_ROWS)
    args = named_strides("k", k, "bhs", vec) | lens_args("lens", kv_side.lens) | of_k
    args |= {"VEC": vec, "D": columns(k.shape[3], dim, vec), "BD": dim, "HQ": heads}
    args |= {"G": heads // k.shape[1], "SLOT": kv_side.slot, "BM": _ROWS, "BT": _ROWS}
    args |= {"length": kv_side.length, "n_tiles": tiles, "n_q_tiles": q_tiles}
    args |= {"q_means": codes.q_means, "shift": codes.score_shift, "scale_log2": scale * LOG2E}
    args |= {"SMOOTH": codes.options.smooth_k, "WIDE": wide_rows(_ROWS, args)}
    options = {"num_warps": 4 if dim <= 128 else 8, "num_stages": 1}
    return Launch(score_shift_kernel, batch * heads * tiles, args, options)
