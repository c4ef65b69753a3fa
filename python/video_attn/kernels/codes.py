"""Codes and scales of q, k, v as the Triton kernels read them: shapes, groups, allocation.

What they mean is defined in ``video_attn/quantize.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quantize import TILE, QuantizationOptions, p_exponent
from .launch import Side, padded, temporary

# How a tile of 64 tokens is shared out in scale groups: (OUTER, INNER, RUN), with a token's row as
# ((outer * repeats + repeat) * INNER + inner) * RUN + run, and its group as outer * INNER + inner.
GROUPS = {
    ("q", "per_block"): (1, 1, 1),
    ("q", "per_warp"): (4, 1, 1),
    ("q", "per_thread"): (4, 8, 1),
    ("k", "per_block"): (1, 1, 1),
    ("k", "per_warp"): (1, 1, 1),
    ("k", "per_thread"): (1, 4, 2),
}


# FP8 codes of V: channels are padded with zeros to a multiple of so many tokens, the largest step,
# so that steps read whole vectors without a mask.
FP8_ROWS = 128


class Codes(NamedTuple):
    """What the quantizers make. The padded dims BD, BDV are powers of two, zero past D and DV."""

    q: Tensor  # int8 or FP8 [B, HQ, Sq, BD]
    k: Tensor  # int8 or FP8 [B, H, Sk, BD]
    v: Tensor  # fp16 [B, H, Sk, BDV]; FP8 [B, H, BDV, Sk and zeros]
    q_scale: Tensor  # fp32 [B, HQ, groups]
    k_scale: Tensor  # fp32 [B, H, groups]
    v_scale: Tensor  # fp32 [B, H, BDV]
    v_mean: Tensor | None  # fp32 [B, H, BDV], smooth_v
    lse_shift: Tensor | None  # fp32 [B, HQ, Sq], smooth_k: to add to the lse
    q_means: Tensor | None  # fp32 [B, HQ, query tiles, BD], smooth_q
    score_shift: Tensor | None  # fp32 [B, HQ, query tiles, Sk], smooth_q: to add to base-2 scores
    precision: str
    options: QuantizationOptions

    def groups(self, role: str) -> tuple[int, int, int] | None:
        """How a tile of "q" or "k" is shared out in scale groups; None: one group for the head."""
        granularity = self.options.granularity
        return None if granularity == "per_head" else GROUPS[role, granularity]


def padded_codes(size: int) -> int:
    """A head dim of codes: the matrix units take 32 bytes at a time."""
    return max(32, padded(size))


def code_limit(dtype: torch.dtype) -> float:
    """The largest code of Q or K."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def scale_slot(side: Side) -> int:
    """The slot in which tiles are counted: the side's own only where a tile can end early in it."""
    return TILE if side.slot % TILE == 0 else side.slot


def allocate_codes(
    q: Tensor, k: Tensor, v: Tensor, q_side: Side, kv_side: Side,
    precision: str, options: QuantizationOptions, fp8: torch.dtype,
) -> Codes:  # fmt: skip
    """Room for the codes and scales of q, k, v."""
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, head_dim_v) = q.shape, v.shape
    dim, dim_v = padded_codes(head_dim), padded_codes(head_dim_v)
    qk_dtype = fp8 if precision == "fp8" else torch.int8

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return temporary(*shape, dtype=dtype, device=q.device)

    def scales(role: str, heads: int, side: Side) -> Tensor:
        if options.granularity == "per_head":
            return empty(batch, heads, 1)
        outer, inner, _ = GROUPS[role, options.granularity]
        return empty(batch, heads, side.tiles(TILE) * outer * inner)

    q_tiles = (batch, heads, q_side.tiles(TILE))
    if precision == "sage_fp16":
        v_codes = empty(batch, kv_heads, kv_len, dim_v, dtype=torch.float16)
    else:
        v_codes = empty(batch, kv_heads, dim_v, -(-kv_len // FP8_ROWS) * FP8_ROWS, dtype=fp8)
    return Codes(
        q=empty(batch, heads, q_len, dim, dtype=qk_dtype),
        k=empty(batch, kv_heads, kv_len, dim, dtype=qk_dtype),
        v=v_codes,
        q_scale=scales("q", heads, q_side),
        k_scale=scales("k", kv_heads, kv_side),
        v_scale=empty(batch, kv_heads, dim_v),
        v_mean=empty(batch, kv_heads, dim_v) if options.smooth_v else None,
        lse_shift=empty(batch, heads, q_len) if options.smooth_k else None,
        q_means=empty(*q_tiles, dim) if options.smooth_q else None,
        score_shift=empty(*q_tiles, kv_len) if options.smooth_q else None,
        precision=precision,
        options=options,
    )


def code_args(codes: Codes | None, q_side: Side, kv_side: Side) -> dict[str, Any]:
    """Arguments of the forward kernel that say what codes stand for; None: there are none."""
    args: dict[str, Any] = {"QUANTIZED": codes is not None}
    for name in ("q_scale", "k_scale", "v_scale", "v_mean", "lse_shift", "score_shift"):
        args[name] = None if codes is None else getattr(codes, name)
    args["n_q_tiles"] = 0 if args["score_shift"] is None else args["score_shift"].shape[2]
    for role, side in (("q", q_side), ("k", kv_side)):
        scales = args[f"{role}_scale"]
        args[f"n_{role}_groups"] = 0 if scales is None else scales.shape[2]
        args[f"{role.upper()}_GROUPS"] = None if codes is None else codes.groups(role)
        args[f"{role.upper()}_SCALE_SLOT"] = TILE if codes is None else scale_slot(side)
    exponent = 0 if codes is None else p_exponent(codes.precision, codes.v.dtype)
    fp16_sums = codes is not None and codes.options.pv_accumulation != "fp32"
    return args | {"P_EXPONENT": exponent, "FP16_SUMS": fp16_sums}
