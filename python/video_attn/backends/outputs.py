"""Allocation of outputs, the same for kernels and for their fakes."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like_heads(x: Tensor, head_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [B, H, S, head_dim] in the memory order of ``x`` (BHSD or BSHD in memory)."""
    batch, heads, length, _ = x.shape
    dtype = x.dtype if dtype is None else dtype
    if x.stride(1) < x.stride(2):
        return torch.empty(batch, length, heads, head_dim, dtype=dtype, device=x.device).transpose(
            1, 2
        )
    return torch.empty(batch, heads, length, head_dim, dtype=dtype, device=x.device)


def empty_lse(q: Tensor) -> Tensor:
    """Uninitialised fp32 [B, Hq, Sq] (fp64 for fp64 inputs)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape[:3], dtype=dtype, device=q.device)
