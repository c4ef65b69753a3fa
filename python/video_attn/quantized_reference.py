"""Attention over quantized inputs, step by step as the kernels do it: the oracle of every quantized
kernel.

The listed keys are taken in tiles of 64, in the order of the list. For a row of queries, with
everything in fp32::

    x_j   = (code_q . code_k) * (q_scale * scale * log2(e)) * k_scale      base-2 scores of tile j
    m_j   = max(m_{j-1}, max x_j)
    p_j   = exp2(x_j - m_j) * 2^e                                          e: quantize.p_exponent
    l_j   = l_{j-1} * exp2(m_{j-1} - m_j) + sum p_j                        p_j not rounded
    acc_j = acc_{j-1} * exp2(m_{j-1} - m_j) + round(p_j) . code_v          rounded to fp16 or FP8

    out = acc / l * v_scale + v_mean          lse = (m + log2 l - e) / log2(e) + lse_shift

A kernel that follows this differs by the order of its sums only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .block_mask import BlockMask
from .quantize import (
    LOG2E,
    TILE,
    QuantizationOptions,
    QuantizedInputs,
    Tiling,
    encode,
    p_exponent,
    quantize_inputs,
)


def quantized_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    precision: str,
    options: QuantizationOptions | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    fp8: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """Attention in a quantized precision, by definition: quantize, then attend.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv]; fp16, bf16 or fp32; Hq a
            multiple of Hkv.
        mask: key blocks of each query block; None for dense attention, with ``is_causal`` aligned
            bottom right.
        precision: "sage_fp16", "sage_fp8" or "fp8". options: default ``QuantizationOptions()``.
        scale: of the scores, default 1/sqrt(D). fp8: the FP8 format.

    Returns:
        out [B, Hq, Sq, Dv] in the dtype of q; lse fp32 [B, Hq, Sq]. A query that sees no key, or
        lies past its block's valid length: output 0, lse -inf.

    Raises:
        ValueError: precision, options, head_dim and fp8 do not fit together.
    """
    options = QuantizationOptions() if options is None else options
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    plan = plan_tiles(mask, q.shape[2], k.shape[2], q.device)
    inputs = quantize_inputs(
        q, k, v, precision, options, scale=scale, fp8=fp8, q_tiling=plan.q_tiling,
        kv_tiling=plan.kv_tiling, q_valid=plan.q_valid, kv_valid=plan.kv_valid,
    )  # fmt: skip
    out, lse = attend(
        inputs, plan, options, precision=precision, scale=scale, is_causal=is_causal, fp8=fp8
    )
    return out.to(q.dtype), lse


class TilePlan(NamedTuple):
    """A mask, or its absence, as lists of key tiles for every query tile."""

    q_tiling: Tiling
    kv_tiling: Tiling
    q_valid: Tensor  # bool [B|1, Sq]
    kv_valid: Tensor  # bool [B|1, Sk]
    lists: Tensor  # int64 [B|1, H|1, query tiles, steps]: key tiles in order, -1 past the end


def plan_tiles(mask: BlockMask | None, q_len: int, kv_len: int, device: torch.device) -> TilePlan:
    """Lists of key tiles from a mask; without one every query tile lists every key tile."""
    if mask is None:
        q_tiling, kv_tiling = Tiling(q_len, q_len), Tiling(kv_len, kv_len)
        tiles = torch.arange(kv_tiling.num_tiles, device=device)
        q_valid, kv_valid = (
            torch.ones(1, n, dtype=torch.bool, device=device) for n in (q_len, kv_len)
        )
        lists = tiles.expand(1, 1, q_tiling.num_tiles, -1)
        return TilePlan(q_tiling, kv_tiling, q_valid, kv_valid, lists)
    q_tiling = Tiling(q_len, mask.q_block_size)
    kv_tiling = Tiling(kv_len, mask.kv_block_size)
    position = torch.arange(mask.kv_indices.shape[-1], device=device)
    listed = position < mask.kv_num_blocks[..., None]
    first = mask.kv_indices.long() * kv_tiling.tiles_per_slot
    tiles = first[..., None] + torch.arange(kv_tiling.tiles_per_slot, device=device)
    tiles = torch.where(listed[..., None] & (tiles < kv_tiling.num_tiles), tiles, -1).flatten(-2)
    slot_of_tile = torch.arange(q_tiling.num_tiles, device=device) // q_tiling.tiles_per_slot
    return TilePlan(
        q_tiling,
        kv_tiling,
        _valid(mask.q_lens(), q_tiling),
        _valid(mask.kv_lens(), kv_tiling),
        tiles[:, :, slot_of_tile],
    )


def _valid(lens: Tensor, tiling: Tiling) -> Tensor:
    token = torch.arange(tiling.length, device=lens.device)
    return token % tiling.slot < lens[:, token // tiling.slot]


def attend(
    inputs: QuantizedInputs,
    plan: TilePlan,
    options: QuantizationOptions,
    *,
    precision: str,
    scale: float,
    is_causal: bool = False,
    fp8: torch.dtype = torch.float8_e4m3fn,
    tiles_per_step: int = 1,
) -> tuple[Tensor, Tensor]:
    """The attention step alone, from codes and scales: (out fp32 [B, Hq, Sq, Dv], lse fp32 [B, Hq,
    Sq]).

    ``tiles_per_step``: tiles of a list whose scores share one maximum m_j, as in a kernel with
    longer steps; their products are summed one after the other.
    """
    batches, heads, q_len, _ = inputs.q.shape
    out = torch.zeros(
        batches, heads, q_len, inputs.v.shape[3], dtype=torch.float32, device=inputs.q.device
    )
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float32, device=out.device)
    tokens = plan.q_tiling.tokens(out.device)
    present = tokens >= 0
    for b in range(batches):
        for h in range(heads):
            head = _Head(inputs, plan, b, h, scale, is_causal, fp8)
            acc, m, total = head.run(precision, options, tiles_per_step)
            m = m + torch.log2(total) - p_exponent(precision, fp8)
            seen = present & _pick(plan.q_valid, b)[tokens.clamp(min=0)] & (total != 0)
            rows = tokens[seen]
            h_kv = head.h_kv
            out[b, h, rows] = (acc / total[..., None])[seen] * inputs.v_scale[b, h_kv]
            lse[b, h, rows] = m[seen] / LOG2E
            if inputs.v_mean is not None:
                out[b, h, rows] += inputs.v_mean[b, h_kv]
            if inputs.lse_shift is not None:
                lse[b, h, rows] += inputs.lse_shift[b, h, rows]
    return out, lse


class _Head:
    """One (batch, head): query tiles side by side, one key tile of each list per step."""

    def __init__(
        self,
        inputs: QuantizedInputs,
        plan: TilePlan,
        b: int,
        h: int,
        scale: float,
        is_causal: bool,
        fp8: torch.dtype,
    ) -> None:
        self.h_kv = h // (inputs.q.shape[1] // inputs.k.shape[1])
        self.fp8 = fp8
        self.lists = _pick(_pick(plan.lists, b), h)
        self.q_tokens = plan.q_tiling.tokens(inputs.q.device)
        self.k_tokens = plan.kv_tiling.tokens(inputs.q.device)
        rows, keys = self.q_tokens.clamp(min=0), self.k_tokens.clamp(min=0)
        self.key_valid = (self.k_tokens >= 0) & _pick(plan.kv_valid, b)[keys]
        q_factor = inputs.q_scale[b, h, inputs.q_group] * (scale * LOG2E)
        self.q, self.q_factor = inputs.q[b, h].float()[rows], q_factor[rows][..., None]
        self.k = inputs.k[b, self.h_kv].float()[keys]
        self.k_scale = inputs.k_scale[b, self.h_kv, inputs.k_group][keys]
        self.v = torch.where(self.key_valid[..., None], inputs.v[b, self.h_kv].float()[keys], 0.0)
        self.shift = None if inputs.score_shift is None else inputs.score_shift[b, h][:, keys]
        self.offset = inputs.k.shape[2] - inputs.q.shape[2] if is_causal else None

    def run(
        self, precision: str, options: QuantizationOptions, tiles_per_step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(acc [tiles, 64, Dv], m [tiles, 64], l [tiles, 64]) after the last step."""
        tiles = self.q.shape[0]
        acc = torch.zeros(tiles, TILE, self.v.shape[-1], dtype=torch.float32, device=self.q.device)
        m = torch.full((tiles, TILE), -torch.inf, dtype=torch.float32, device=self.q.device)
        total = torch.zeros_like(m)
        for step in self.lists.split(tiles_per_step, -1):
            x = torch.cat([self._scores(tile) for tile in step.unbind(-1)], -1)
            new_m = torch.maximum(m, x.amax(-1))
            pivot = torch.where(new_m == -torch.inf, 0.0, new_m)  # rows that saw no key yet
            keep = torch.exp2(m - pivot)
            p = torch.exp2(x - pivot[..., None] + p_exponent(precision, self.fp8))
            total = total * keep + p.sum(-1)
            codes = encode(p, torch.float16 if precision == "sage_fp16" else self.fp8)
            # NaN scores round to code 0, but the output must show them: they are in the total.
            acc, m = acc * keep[..., None], new_m
            for p_tile, tile in zip(codes.split(TILE, -1), step.unbind(-1), strict=True):
                acc = acc + _tile_product(
                    p_tile, self.v[tile.clamp(min=0)], options.pv_accumulation
                )
        return acc, m, total

    def _scores(self, tile: Tensor) -> Tensor:
        """Base-2 scores [tiles, 64, 64] of one key tile per query tile; -inf for pairs that do not
        count.
        """
        known = tile.clamp(min=0)
        x = self.q @ self.k[known].mT * (self.q_factor * self.k_scale[known][:, None, :])
        if self.shift is not None:
            x = x + self.shift[torch.arange(len(tile), device=tile.device), known][:, None, :]
        counts = (self.key_valid[known] & (tile >= 0)[:, None])[:, None, :]
        if self.offset is not None:
            counts = counts & (
                self.k_tokens[known][:, None, :] <= self.q_tokens[..., None] + self.offset
            )
        return torch.where(counts, x, -torch.inf)


def _tile_product(p: Tensor, v: Tensor, accumulation: str) -> Tensor:
    """P V of one tile [tiles, 64, Dv], summed in fp32, or in fp16 from sums of 16 (fp16 codes) or
    32 (FP8).
    """
    p = p.float()
    if accumulation == "fp32":
        return p @ v
    step = 16 if accumulation == "fp16+fp32" else 32
    total = torch.zeros(*p.shape[:2], v.shape[-1], dtype=torch.float16, device=p.device)
    for i in range(0, TILE, step):
        total = (total.float() + p[..., i : i + step] @ v[:, i : i + step]).half()
    return total.float()


def _pick(x: Tensor, i: int) -> Tensor:
    """Entry ``i`` of a leading dimension that may be 1 for "all"."""
    return x[min(i, x.shape[0] - 1)]
