"""Block means and exact top-k, the first steps of video sparse attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Side, columns, head_args, lens_args, named_strides, padded
from .tiles import head_rows, load_tile, own_tile, sized_jit, store_tile

_MEAN_TILE = 4096  # numbers in registers at a time
MEAN_WARPS = 2  # 128 us for 453 MB on an H200, where 4 warps took 220 and 8 took 350
_SCORES = 2048  # of a row in registers at a time


@triton.jit
def slot_of(i, N, H):
    """Slot, head and batch, 64-bit, of the ``i``-th of N slots in all H heads of all batches.

    Divided with 32 bits, for a GPU divides 64 in a hundred instructions.
    """
    return (i % N).to(tl.int64), (i // N % H).to(tl.int64), (i // N // H).to(tl.int64)


@triton.jit
def mean_of_slot(
    x, mean, lens, stride_x_b, stride_x_h, stride_x_s, stride_mean_b, stride_mean_h, stride_mean_s,
    stride_lens_b, i, H, N, D, length,
    SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """mean_n = sum of the valid rows of slot n / their number, 0 where there is none.

    i: number of the slot among those of all heads.
    """
    i_n, i_h, i_b = slot_of(i, N, H)
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    _, start, n_rows, n_valid = own_tile(i_n, length, p_lens, SLOT, SLOT)
    o_m, o_d = tl.arange(0, BM).to(tl.int64), tl.arange(0, BD)
    p_x = head_rows(x, i_b, i_h, stride_x_b, stride_x_h, VEC)
    p_mean = head_rows(mean, i_b, i_h, stride_mean_b, stride_mean_h, VEC)
    b_sum = tl.zeros([BM, BD], ACC)
    for i_m in range(0, SLOT, BM):  # padding is loaded and left out: no load waits for the lengths
        m_m = i_m + o_m < n_rows
        b_x = load_tile(p_x, start + i_m, o_m, m_m, o_d, stride_x_s, D, VEC, True)  # [BM, BD]
        if lens is not None:
            b_x = tl.where((i_m + o_m < n_valid)[:, None], b_x, 0.0)
        b_sum += b_x
    b_mean = tl.sum(b_sum, 0) / tl.maximum(n_valid, 1)
    p_mean += i_n * stride_mean_s * VEC
    m_d = o_d < (BD if D is None else D * VEC)
    tl.store(p_mean + o_d, b_mean.to(mean.dtype.element_ty), mask=m_d)


@sized_jit
def block_mean_kernel(
    x, mean, lens,
    stride_x_b, stride_x_h, stride_x_s, stride_mean_b, stride_mean_h, stride_mean_s,
    stride_lens_b, H, N, D, length,
    SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    ACC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The means of all slots of x, one program for each."""
    mean_of_slot(
        x, mean, lens, stride_x_b, stride_x_h, stride_x_s, stride_mean_b, stride_mean_h,
        stride_mean_s, stride_lens_b, tl.program_id(0), H, N, D, length,
        SLOT, BD, BM, ACC, VEC,
    )  # fmt: skip


@sized_jit
def block_mean_bwd_kernel(
    grad, dx, lens,
    stride_grad_b, stride_grad_h, stride_grad_s, stride_dx_b, stride_dx_h, stride_dx_s,
    stride_lens_b, H, N, D, length,
    SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    ACC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dx = grad of the slot's mean / number of valid rows; 0 in rows that are not valid."""
    i_n, i_h, i_b = slot_of(tl.program_id(0), N, H)
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    _, start, n_rows, n_valid = own_tile(i_n, length, p_lens, SLOT, SLOT)
    o_m, o_d = tl.arange(0, BM).to(tl.int64), tl.arange(0, BD)
    p_grad = head_rows(grad, i_b, i_h, stride_grad_b, stride_grad_h, VEC)
    p_grad += i_n * stride_grad_s * VEC
    m_d = o_d < (BD if D is None else D * VEC)
    b_grad = tl.load(p_grad + o_d, mask=m_d, other=0.0).to(ACC)  # [BD]
    b_dx = b_grad / tl.maximum(n_valid, 1)
    p_dx = head_rows(dx, i_b, i_h, stride_dx_b, stride_dx_h, VEC)
    for i in range(0, n_rows, BM):
        b_rows = tl.where((i + o_m < n_valid)[:, None], b_dx[None, :], 0.0)
        store_tile(p_dx, start + i, b_rows, o_m, i + o_m < n_rows, o_d, stride_dx_s, D, VEC)


@triton.jit
def _keys(p_row, p_lens, o, n_keys, LOW_BITS: tl.constexpr):
    """Scores as unsigned integers of the same order, equal where they are equal; 0 past the row.

    NaN and the scores of empty slots count as -inf. LOW_BITS are those that fp32 has and the scores
    have not: they carry nothing.
    """
    m = o < n_keys
    b_score = tl.load(p_row + o, mask=m, other=0.0).to(tl.float32)
    if p_lens is not None:
        b_score = tl.where(tl.load(p_lens + o, mask=m, other=0) > 0, b_score, float("-inf"))
    b_score = tl.where(b_score == b_score, b_score, float("-inf"))
    b_score = tl.where(b_score == 0.0, 0.0, b_score)  # -0 ties with 0
    b_bits = b_score.to(tl.uint32, bitcast=True)
    b_key = tl.where(b_bits >> 31 != 0, ~b_bits, b_bits | 0x80000000)
    return tl.where(m, b_key >> LOW_BITS, 0)


@triton.jit
def _count(
    p_row, p_lens, b_first, o, n_keys, least, LOW_BITS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """How many keys of a row are not smaller than ``least``; its first BN are in registers."""
    n = tl.sum((b_first >= least).to(tl.int32))
    for i in range(BN, n_keys, BN):
        n += tl.sum((_keys(p_row, p_lens, i + o, n_keys, LOW_BITS) >= least).to(tl.int32))
    return n


@triton.jit
def _take(p_out, b_key, o, kth, n_taken, n_ties, n_keys):
    """Writes which of the keys are taken; how many were until now, and which ties still may be."""
    m_tie = (b_key == kth) & (o < n_keys)
    m_take = (b_key > kth) | (m_tie & (tl.cumsum(m_tie.to(tl.int32)) <= n_ties))
    b_rank = n_taken + tl.cumsum(m_take.to(tl.int32)) - 1
    tl.store(p_out + b_rank, o, mask=m_take)
    return n_taken + tl.sum(m_take.to(tl.int32)), n_ties - tl.sum(m_tie.to(tl.int32))


@sized_jit
def select_top_k_kernel(
    scores, indices, counts, lens,
    stride_scores_b, stride_scores_h, stride_scores_s, stride_lens_b,
    H, R, n_keys, top_k,
    LOW_BITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Ascending indices of the ``top_k`` largest scores of a row, of equal ones the lower index.

    The k-th largest key is found bit by bit: a bit is set if k keys are still not smaller, until no
    more than k are. The search begins near the largest key, within four powers of two, which holds
    for the best tenth of most scores; else at zero. All keys above the k-th are taken, and of those
    equal to it the first ones. ``counts`` is filled with ``top_k``, where it is given.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_r, i_h, i_b = slot_of(tl.program_id(0), R, H)
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    p_row = scores + i_b * stride_scores_b + i_h * stride_scores_h + i_r * stride_scores_s
    o = tl.arange(0, BN)
    b_first = _keys(
        p_row, p_lens, o, n_keys, LOW_BITS
    )  # stays in registers; the rest is read again

    largest = tl.max(b_first, 0)
    for i in range(BN, n_keys, BN):
        largest = tl.maximum(largest, tl.max(_keys(p_row, p_lens, i + o, n_keys, LOW_BITS), 0))
    bit = tl.full((), 1 << (24 - LOW_BITS), tl.uint32)
    kth = tl.where(largest >= 2 * bit, largest - (2 * bit - 1), 0)  # so no sum is over the largest
    n_kept = _count(p_row, p_lens, b_first, o, n_keys, kth, LOW_BITS, BN)  # not smaller than kth
    if n_kept < top_k:
        kth = tl.zeros((), tl.uint32)
        bit = tl.full((), 1 << (31 - LOW_BITS), tl.uint32)
        n_kept = tl.full((), 0, tl.int32) + n_keys
    while (bit != 0) & (n_kept != top_k):
        n_above = _count(p_row, p_lens, b_first, o, n_keys, kth + bit, LOW_BITS, BN)
        kth = tl.where(n_above >= top_k, kth + bit, kth)
        n_kept = tl.where(n_above >= top_k, n_above, n_kept)
        bit = bit >> 1
    n_ties = top_k - _count(p_row, p_lens, b_first, o, n_keys, kth + 1, LOW_BITS, BN)

    if counts is not None:
        tl.store(counts + i_row, top_k)
    p_out = indices + i_row * top_k
    n_taken, n_ties = _take(p_out, b_first, o, kth, 0, n_ties, n_keys)
    for i in range(BN, n_keys, BN):
        b_key = _keys(p_row, p_lens, i + o, n_keys, LOW_BITS)
        n_taken, n_ties = _take(p_out, b_key, i + o, kth, n_taken, n_ties, n_keys)


def block_mean(x: Tensor, mean: Tensor, side: Side) -> Launch:
    """The launch that fills ``mean`` [B, H, N, D] from ``x`` [B, H, S, D]."""
    return _mean_launch(block_mean_kernel, head_args(x=x, mean=mean), mean, side, MEAN_WARPS)


def block_mean_backward(grad: Tensor, dx: Tensor, side: Side) -> Launch:
    """The launch that fills ``dx`` [B, H, S, D] from ``grad`` [B, H, N, D]."""
    return _mean_launch(block_mean_bwd_kernel, head_args(grad=grad, dx=dx), grad, side, 4)


def _mean_launch(kernel: object, args: dict, mean: Tensor, side: Side, warps: int) -> Launch:
    batch, heads, slots, head_dim = mean.shape
    acc = tl.float64 if mean.dtype == torch.float64 else tl.float32
    args |= {"H": heads, "N": slots, "length": side.length, "SLOT": side.slot}
    dim = padded(head_dim)
    args |= {"D": columns(head_dim, dim, args["VEC"]), "BD": dim, "ACC": acc}
    args |= lens_args("lens", side.lens) | {"BM": max(1, min(64, _MEAN_TILE // dim))}
    return Launch(kernel, batch * heads * slots, args, {"num_warps": warps, "num_stages": 2})


def select_top_k(
    scores: Tensor,
    indices: Tensor,
    top_k: int,
    key_lens: Tensor | None,
    counts: Tensor | None = None,
) -> Launch:
    """The launch that fills ``indices`` int32 [B, H, R, top_k], contiguous, from ``scores``.

    ``counts`` int32 [B, H, R], contiguous: filled with ``top_k``.
    """
    batch, heads, rows, keys = scores.shape
    block = min(_SCORES, padded(keys))
    args = named_strides("scores", scores, "bhs") | lens_args("lens", key_lens)
    args |= {
        "indices": indices,
        "counts": counts,
        "H": heads,
        "R": rows,
        "n_keys": keys,
        "top_k": top_k,
    }
    args |= {"LOW_BITS": _LOW_BITS[scores.dtype], "BN": block}
    warps = max(1, block // 512)
    return Launch(
        select_top_k_kernel, batch * heads * rows, args, {"num_warps": warps, "num_stages": 1}
    )


_LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
