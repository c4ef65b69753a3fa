"""What video sparse attention does beside its exact part: means, scores, coarse branch, sum.

Few launches, because in a short sequence the host is what a call waits for: all means in one, all
scores and their average of the values in one, and one that adds that average to the output.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .block_pool import MEAN_WARPS, mean_of_slot, slot_of
from .launch import (
    Launch,
    Side,
    columns,
    dim_args,
    head_args,
    lens_args,
    named_strides,
    padded,
)
from .tiles import add_product, head_rows, load_tile, own_tile, product, sized_jit, store_tile

_NUMBERS = 4096  # of a tile in registers at a time
_TILES = (("BM", "BD"), ("BMV", "BDV"))


@sized_jit
def block_means_kernel(
    q, k, v, q_mean, k_mean, v_mean, q_lens, kv_lens,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s,
    stride_q_mean_b, stride_q_mean_h, stride_q_mean_s,
    stride_k_mean_b, stride_k_mean_h, stride_k_mean_s,
    stride_v_mean_b, stride_v_mean_h, stride_v_mean_s, stride_q_lens_b, stride_kv_lens_b,
    HQ, H, R, N, D, DV, n_q_groups, n_k_groups, q_len, kv_len,
    Q_SLOT: tl.constexpr, KV_SLOT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BMV: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The means of q, then those of k, then those of v; ``n_q_groups``: slots of q in all heads."""
    pid = tl.program_id(0)
    if pid < n_q_groups:
        mean_of_slot(
            q, q_mean, q_lens, stride_q_b, stride_q_h, stride_q_s,
            stride_q_mean_b, stride_q_mean_h, stride_q_mean_s, stride_q_lens_b,
            pid, HQ, R, D, q_len, Q_SLOT, BD, BM, ACC, VEC,
        )  # fmt: skip
    elif pid < n_q_groups + n_k_groups:
        mean_of_slot(
            k, k_mean, kv_lens, stride_k_b, stride_k_h, stride_k_s,
            stride_k_mean_b, stride_k_mean_h, stride_k_mean_s, stride_kv_lens_b,
            pid - n_q_groups, H, N, D, kv_len, KV_SLOT, BD, BM, ACC, VEC,
        )  # fmt: skip
    elif v is not None:
        mean_of_slot(
            v, v_mean, kv_lens, stride_v_b, stride_v_h, stride_v_s,
            stride_v_mean_b, stride_v_mean_h, stride_v_mean_s, stride_kv_lens_b,
            pid - n_q_groups - n_k_groups, H, N, DV, kv_len, KV_SLOT, BDV, BMV, ACC, VEC,
        )  # fmt: skip


@sized_jit
def block_scores_kernel(
    q, k, v, scores, out, lens,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_scores_b, stride_scores_h, stride_scores_s,
    stride_out_b, stride_out_h, stride_out_s, stride_lens_b,
    HQ, D, DV, R, n_keys, n_tiles, scale,
    G: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROUND_MEANS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """scores = scale q k^T of block means; out = softmax(scores) v, empty blocks weighing nothing.

    The whole row of scores is stored as it comes, for the choice of blocks. Scores in half
    precision (``scores`` says so) are rounded as a model in that precision rounds, with means
    rounded to it; the average has them unrounded.
    """
    pid = tl.program_id(0)
    i_tile = pid % n_tiles
    i_h = (pid // n_tiles % HQ).to(tl.int64)
    i_b = (pid // n_tiles // HQ).to(tl.int64)
    start = i_tile.to(tl.int64) * BM
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_m = start + o_m < R
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    p_q = head_rows(q, i_b, i_h, stride_q_b, stride_q_h, VEC)
    p_k = head_rows(k, i_b, i_h // G, stride_k_b, stride_k_h, VEC)
    p_scores = scores + i_b * stride_scores_b + i_h * stride_scores_h
    p_scores += (start + o_m)[:, None] * stride_scores_s
    b_q = load_tile(p_q, start, o_m, m_m, o_d, stride_q_s, D, VEC, True)  # [BM, BD]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    for i in range(0, n_keys, BN):
        m_n = i + o_n < n_keys
        b_k = load_tile(p_k, i, o_n, m_n, o_d, stride_k_s, D, VEC, True)  # [BN, BD]
        b_s = product(b_q, b_k, "ieee")  # [BM, BN]
        b_rank = b_s * scale
        if scores.dtype.element_ty != tl.float32:
            b_products = b_s
            if ROUND_MEANS:
                half = scores.dtype.element_ty
                b_products = product(b_q.to(half), b_k.to(half), "ieee")
            b_rank = b_products.to(scores.dtype.element_ty).to(tl.float32) * scale
        tl.store(
            p_scores + (i + o_n)[None, :],
            b_rank.to(scores.dtype.element_ty),
            mask=m_m[:, None] & m_n[None, :],
        )
        if v is not None:
            b_s *= scale
            if lens is not None:  # finite, for there may be no other
                m_empty = tl.load(p_lens + i + o_n, mask=m_n, other=1) <= 0
                b_s = tl.where(m_empty[None, :], -3.4028234663852886e38, b_s)
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_p = tl.exp2((b_s - b_m_new[:, None]) * 1.4426950408889634)
            b_alpha = tl.exp2((b_m - b_m_new) * 1.4426950408889634)
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_m = b_m_new
            p_v = head_rows(v, i_b, i_h // G, stride_v_b, stride_v_h, VEC)
            b_v = load_tile(p_v, i, o_n, m_n, o_dv, stride_v_s, DV, VEC, True)  # [BN, BDV]
            b_acc = add_product(b_acc * b_alpha[:, None], b_p, b_v, "ieee")
    if v is not None:
        p_out = head_rows(out, i_b, i_h, stride_out_b, stride_out_h, VEC)
        b_out = b_acc / b_l[:, None]
        store_tile(p_out, start, b_out, o_m, m_m, o_dv, stride_out_s, DV, VEC)


@sized_jit
def add_coarse_kernel(
    out, coarse, gate, lens,
    stride_out_b, stride_out_h, stride_out_s, stride_coarse_b, stride_coarse_h, stride_coarse_s,
    stride_gate_b, stride_gate_h, stride_gate_s, stride_lens_b,
    H, N, D, length, weight,
    SLOT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    GATE_PER_CHANNEL: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out += gate * coarse of its slot in the valid rows; the gate is a tensor or ``weight``."""
    i_n, i_h, i_b = slot_of(tl.program_id(0), N, H)
    p_lens = lens if lens is None else lens + i_b * stride_lens_b
    _, start, _, n_valid = own_tile(i_n, length, p_lens, SLOT, SLOT)
    o_m, o_d = tl.arange(0, BM).to(tl.int64), tl.arange(0, BD)
    m_d = o_d < (BD if D is None else D * VEC)
    p_out = head_rows(out, i_b, i_h, stride_out_b, stride_out_h, VEC)
    p_coarse = head_rows(coarse, i_b, i_h, stride_coarse_b, stride_coarse_h, VEC)
    p_coarse += i_n * stride_coarse_s * VEC
    b_coarse = tl.load(p_coarse + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    for i_m in range(0, n_valid, BM):
        m_m = i_m + o_m < n_valid
        b_out = load_tile(p_out, start + i_m, o_m, m_m, o_d, stride_out_s, D, VEC, True)
        b_gate = weight
        if gate is not None:
            if GATE_PER_CHANNEL:
                p_gate = head_rows(gate, i_b, i_h, stride_gate_b, stride_gate_h, VEC)
                b_gate = load_tile(
                    p_gate, start + i_m, o_m, m_m, o_d, stride_gate_s, D, VEC, True
                ).to(tl.float32)
            else:
                p_gate = gate + i_b * stride_gate_b + i_h * stride_gate_h
                b_gate = tl.load(
                    p_gate + (start + i_m + o_m) * stride_gate_s, mask=m_m, other=0.0
                ).to(tl.float32)[:, None]
        b_out = b_out.to(tl.float32) + b_gate * b_coarse
        store_tile(p_out, start + i_m, b_out, o_m, m_m, o_d, stride_out_s, D, VEC)


def block_means(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    means: tuple[Tensor, Tensor, Tensor | None],
    q_side: Side,
    kv_side: Side,
) -> Launch:
    """The launch that fills the ``means`` [B, H, N, D] of q, k and v; v may be None."""
    (q, k, v), (q_mean, k_mean, v_mean) = tensors, means
    some = {"q": q, "k": k, "q_mean": q_mean, "k_mean": k_mean}
    args = (
        head_args(**some) if v is None or v_mean is None else head_args(**some, v=v, v_mean=v_mean)
    )
    if v is None:
        args |= named_strides("v", None, "bhs") | named_strides("v_mean", None, "bhs")
    args |= lens_args("q_lens", q_side.lens) | lens_args("kv_lens", kv_side.lens)
    args |= {"HQ": q.shape[1], "H": k.shape[1], "R": q_mean.shape[2], "N": k_mean.shape[2]}
    dims = dim_args(q.shape[3], q.shape[3] if v is None else v.shape[3], args["VEC"])
    rows = {name: max(1, min(64, _NUMBERS // dims[dim])) for name, dim in _TILES}
    slots = [x.shape[0] * x.shape[1] * x.shape[2] for x in means if x is not None]
    args |= dims | rows | {"n_q_groups": slots[0], "n_k_groups": slots[1]}
    args |= {"q_len": q_side.length, "Q_SLOT": q_side.slot}
    args |= {"kv_len": kv_side.length, "KV_SLOT": kv_side.slot}
    args["ACC"] = tl.float64 if q.dtype == torch.float64 else tl.float32
    options = {"num_warps": MEAN_WARPS, "num_stages": 1}
    return Launch(block_means_kernel, sum(slots), args, options)


def block_scores(
    means: tuple[Tensor, Tensor, Tensor | None],
    scores: Tensor,
    coarse: Tensor | None,
    kv_lens: Tensor | None,
    scale: float,
    *,
    amd: bool = torch.version.hip is not None,
) -> Launch:
    """The launch that fills ``scores`` [B, Hq, R, N] and, of the means of v, ``coarse`` likewise.

    ``scores`` are fp32, or fp16 or bf16 for scores that are rounded as a model does. ``amd``: for a
    GPU of AMD, whose registers do not hold the loads of the next step as well (gfx11 spilled 96).
    """
    q, k, v = means
    args: dict[str, Any]
    if v is None or coarse is None:
        args = head_args(q=q, k=k)
        args |= named_strides("v", None, "bhs") | named_strides("out", None, "bhs")
    else:
        args = head_args(q=q, k=k, v=v, out=coarse)
    args |= named_strides("scores", scores, "bhs") | lens_args("lens", kv_lens)
    args |= dim_args(q.shape[3], q.shape[3] if v is None else v.shape[3], args["VEC"])
    wide = q.dtype == torch.float32  # no matrix units: the numbers wait in registers
    rows, keys = (16, 32) if wide or q.shape[3] > 128 else (32, 32)
    tiles = -(-q.shape[2] // rows)
    args |= {"HQ": q.shape[1], "R": q.shape[2], "n_keys": k.shape[2], "n_tiles": tiles}
    args |= {"G": q.shape[1] // k.shape[1], "BM": rows, "BN": keys, "scale": scale}
    args["ROUND_MEANS"] = scores.dtype not in (torch.float32, q.dtype)
    grid = tiles * q.shape[0] * q.shape[1]
    options = {"num_warps": 4, "num_stages": 1 if amd else 2}
    return Launch(block_scores_kernel, grid, args, options)


def add_coarse(out: Tensor, coarse: Tensor, gate: Tensor | float, side: Side) -> Launch:
    """The launch of ``out += gate * coarse``: see ``BlockOps.add_coarse``."""
    batch, heads, slots, head_dim = coarse.shape
    args: dict[str, Any]
    per_channel = isinstance(gate, Tensor) and gate.shape[3] > 1
    if isinstance(gate, Tensor) and per_channel:
        args = head_args(out=out, coarse=coarse, gate=gate)
    else:
        args = head_args(out=out, coarse=coarse)
        args |= named_strides("gate", gate if isinstance(gate, Tensor) else None, "bhs")
    dim = padded(head_dim)
    args |= {"weight": 1.0 if isinstance(gate, Tensor) else gate, "GATE_PER_CHANNEL": per_channel}
    args |= {"H": heads, "N": slots, "length": side.length, "SLOT": side.slot}
    args |= {"D": columns(head_dim, dim, args["VEC"]), "BD": dim}
    args |= lens_args("lens", side.lens) | {"BM": max(1, min(64, _NUMBERS // dim))}
    return Launch(add_coarse_kernel, batch * heads * slots, args, {"num_warps": 4, "num_stages": 2})
