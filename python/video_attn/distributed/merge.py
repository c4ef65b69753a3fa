"""Attention over a union of keys, from attention over its parts and their log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the keys of both; out in fp32 (fp64 for fp64).

    Each side weighs exp(its lse - lse of both). A side that saw nothing (lse -inf) weighs 0, and a
    row that neither saw stays 0 and -inf.
    """
    both = torch.logaddexp(lse, part_lse)
    finite = both.masked_fill(both == -torch.inf, 0)
    kept, added = (lse - finite).exp_(), (part_lse - finite).exp_()
    wide = out if out.dtype == lse.dtype else out.to(lse.dtype)
    return (wide * kept[..., None]).addcmul_(part.to(lse.dtype), added[..., None]), both


class Accumulator:
    """Partial results of the rows [B, H, S, Dv], added up in the order they come."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, part: Tensor, lse: Tensor, first: int, rows: int) -> None:
        """``part`` and ``lse`` are those of the rows from ``first`` on, of ``rows`` in all."""
        if self.out is None and part.shape[2] == rows:
            self.out, self.lse = part, lse
            return
        if self.out is None or self.lse is None:
            self.out, self.lse = nothing_seen(part, rows, lse.dtype)
        span = slice(first, first + part.shape[2])
        merged, both = merge(self.out[:, :, span], self.lse[:, :, span], part, lse)
        if part.shape[2] == rows:
            self.out, self.lse = merged, both
            return
        if self.out.dtype != merged.dtype:
            self.out = self.out.to(merged.dtype)
        self.out[:, :, span] = merged
        self.lse[:, :, span] = both


def nothing_seen(like: Tensor, rows: int, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out 0 and lse -inf for ``rows`` rows of the batches, heads and channels of ``like``."""
    batch, heads, _, channels = like.shape
    out = torch.zeros(batch, heads, rows, channels, dtype=like.dtype, device=like.device)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=lse_dtype, device=like.device)
    return out, lse
