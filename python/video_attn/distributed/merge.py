"""Attention over a union of keys, from attention over its parts and their log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the keys of both; out in fp32 (fp64 for fp64), which may be written in place.

    Each side weighs exp(its lse - lse of both). A side that saw nothing (lse -inf) weighs 0, and a
    row that neither saw stays 0 and -inf.
    """
    both = torch.logaddexp(lse, part_lse)
    finite = both.masked_fill(both == -torch.inf, 0)
    kept, added = (lse - finite).exp_()[..., None], (part_lse - finite).exp_()[..., None]
    # Mixed dtypes: 16-bit results are widened as they are read, not in passes of their own.
    wide = out.mul_(kept) if out.dtype == lse.dtype else torch.mul(out, kept)
    return wide.addcmul_(part, added), both


def merge_all(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the keys of all parts, out [B, H, parts, S, Dv] and lse [B, H, parts, S]; in
    the dtypes given.
    """
    whole = lse.logsumexp(2)
    weights = (lse - whole.masked_fill(whole == -torch.inf, 0)[:, :, None]).exp_()
    return (out * weights[..., None]).sum(2).to(out.dtype), whole


class Accumulator:
    """Partial results of the same rows [B, H, S, Dv], added up in the order they come."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, part: Tensor, lse: Tensor) -> None:
        """``part`` is the accumulator's own from now on."""
        if self.out is None or self.lse is None:
            self.out, self.lse = part, lse
        else:
            self.out, self.lse = merge(self.out, self.lse, part, lse)


def nothing_seen(like: Tensor, rows: int, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out 0 and lse -inf for ``rows`` rows of the batches, heads and channels of ``like``."""
    batch, heads, _, channels = like.shape
    out = torch.zeros(batch, heads, rows, channels, dtype=like.dtype, device=like.device)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=lse_dtype, device=like.device)
    return out, lse
