"""What the codes of the Sage kernels stand for: the layout that csrc/sage/tiles.h describes."""

from __future__ import annotations

import torch
from torch import Tensor

from video_attn.backends.cuda_sage import SageCodes
from video_attn.quantize import QuantizationOptions, QuantizedInputs, scale_groups
from video_attn.quantized_reference import TilePlan


def plain_rows(tiles: Tensor) -> Tensor:
    """Undo the swizzle of rows of 64 or 128 bytes, [..., rows, bytes]: chunk c of row r lies at
    c ^ (r % 8), or c ^ (r / 2 % 4) for rows of 64."""
    rows, size = tiles.shape[-2:]
    row, chunk = torch.arange(rows)[:, None], torch.arange(size // 16)
    at = chunk ^ (row % 8 if size == 128 else row // 2 % 4)
    chunks = tiles.unflatten(-1, (size // 16, 16))
    return chunks[..., row, at, :].flatten(-2)


def plain_tokens(codes: Tensor) -> Tensor:
    """Codes of Q or K as [B, H, tiles * 64, padded dim]."""
    return plain_rows(codes.view(torch.uint8)).view(codes.dtype).flatten(2, 3)


def plain_values(codes: Tensor) -> Tensor:
    """Codes of V as [B, H, tiles * 64, padded dim]."""
    batch, heads, tiles = codes.shape[:3]
    if codes.dtype == torch.float16:  # panels of 64 channels
        panels = codes.view(torch.uint8).reshape(batch, heads, tiles, -1, 64, 128)
        return plain_rows(panels).view(torch.float16).transpose(3, 4).flatten(4).flatten(2, 3)
    channels = plain_rows(codes.view(torch.uint8)).view(codes.dtype)
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    at = torch.argsort(torch.cat([order + 16 * i for i in range(4)]))
    return channels.view(torch.uint8)[..., at].view(codes.dtype).transpose(3, 4).flatten(2, 3)


def inputs_of(
    codes: SageCodes, options: QuantizationOptions, plan: TilePlan, dims: tuple[int, int]
) -> QuantizedInputs:
    """The kernel's codes in the form that ``attend`` takes."""
    q_len, kv_len = plan.q_tiling.length, plan.kv_tiling.length
    groups = [
        scale_groups(role, options.granularity, tiling, torch.device("cpu"))[0]
        for role, tiling in (("q", plan.q_tiling), ("k", plan.kv_tiling))
    ]
    return QuantizedInputs(
        q=plain_tokens(codes.q)[:, :, :q_len, : dims[0]],
        k=plain_tokens(codes.k)[:, :, :kv_len, : dims[0]],
        v=plain_values(codes.v)[:, :, :kv_len, : dims[1]],
        q_scale=codes.q_scale.flatten(2),
        k_scale=codes.k_scale.flatten(2),
        v_scale=codes.v_scale[..., : dims[1]],
        v_mean=None if codes.v_mean is None else codes.v_mean[..., : dims[1]],
        q_group=groups[0],
        k_group=groups[1],
        lse_shift=codes.lse_shift,
        score_shift=None if codes.score_shift is None else codes.score_shift[..., :kv_len],
    )
