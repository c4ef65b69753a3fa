"""Scores of block means, the blocks that score highest, and the coarse branch.

For some heads at a time, so that a matrix of all blocks by all blocks is never there for all heads.
Nor is one kept for the backward pass, which makes it again from the means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import forward_mode_is_on, wants_gradient

_BYTES = 12  # of a score and what is made of it
_LEAST_ROOM = 64 * 2**20


def rank_and_average(
    q_mean: Tensor,
    k_mean: Tensor,
    v_mean: Tensor | None,
    kv_lens: Tensor | None,
    scale: float,
    room: int,
    select: Callable[[Tensor, slice, slice], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """(selected int32 [B, Hq, Nq, k], coarse fp32 [B, Hq, Nq, Dv] or None without ``v_mean``).

    Args:
        q_mean: [B, Hq, Nq, D]. k_mean: [B, Hkv, Nk, D]. v_mean: [B, Hkv, Nk, Dv].
        kv_lens: int32 [B|1, Nk], blocks of length 0 are not there; None: all are.
        room: bytes that scores may take, but for those of one key head, and 64 MiB at least.
        select: ``(scores, query heads, key heads)`` to the blocks that are chosen.
    """
    selected, coarse = [], []
    for heads, keys in head_groups(q_mean, k_mean, room):
        q, k = q_mean[:, heads], k_mean[:, keys]
        scores = block_scores(q.detach(), k.detach(), scale)
        selected.append(select(scores, heads, keys))
        if v_mean is None:
            continue
        v = v_mean[:, keys]
        if _transformed():  # differentiated, or mapped, by rules of torch's own
            coarse.append(_average(block_scores(q, k, scale), v, kv_lens))
        elif wants_gradient(q, k, v):
            coarse.append(_Average.apply(q, k, v, kv_lens, scale))
        else:
            coarse.append(_average(scores, v, kv_lens))
    return _joined(selected), _joined(coarse) if coarse else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _transformed() -> bool:
    if torch.compiler.is_compiling():
        return True
    return forward_mode_is_on() or torch._C._are_functorch_transforms_active()


def head_groups(
    q_mean: Tensor, k_mean: Tensor, room: int, head_bytes: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """(query heads, key heads) of as many key heads as ``room`` allows, one at least.

    ``head_bytes``: what one query head takes; default: all blocks by all blocks of the means.
    """
    if torch.compiler.is_compiling():
        yield slice(None), slice(None)
        return
    group = q_mean.shape[1] // k_mean.shape[1]
    if head_bytes is None:
        head_bytes = q_mean.shape[2] * k_mean.shape[2] * _BYTES
    one_head = q_mean.shape[0] * group * head_bytes
    step = max(1, max(room, _LEAST_ROOM) // max(1, one_head))
    for first in range(0, k_mean.shape[1], step):
        yield slice(first * group, (first + step) * group), slice(first, first + step)


def block_scores(q_mean: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """scale * q k^T in fp32 (fp64 for fp64 means)."""
    wide = torch.float64 if q_mean.dtype == torch.float64 else torch.float32
    return per_kv_head(q_mean.to(wide) * scale, k_mean.mT)


def per_kv_head(left: Tensor, right: Tensor) -> Tensor:
    """left [B, Hq, N, M] @ right [B, Hkv, M, P], each head of ``right`` serving its query heads."""
    grouped = left.unflatten(1, (right.shape[1], -1)) @ right[:, :, None].to(left.dtype)
    return grouped.flatten(1, 2)


def _average(scores: Tensor, v_mean: Tensor, kv_lens: Tensor | None) -> Tensor:
    if kv_lens is not None:  # an empty tile is not there; finite, for there may be no other
        empty = (kv_lens == 0)[:, None, None, :]
        scores = scores.masked_fill(empty, torch.finfo(scores.dtype).min)
    return per_kv_head(scores.softmax(-1), v_mean)


class _Average(torch.autograd.Function):
    """softmax(scale * q k^T) v over blocks, made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, kv_lens)
        ctx.scale = scale
        return _average(block_scores(q, k, scale), v, kv_lens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *means, kv_lens = ctx.saved_tensors
        return *average_gradients(means, kv_lens, ctx.scale, grad), None, None


def average_gradients(
    means: Sequence[Tensor], kv_lens: Tensor | None, scale: float, grad: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the means of q, k and v, from that of the coarse branch."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in means)
        out = _average(block_scores(q, k, scale), v, kv_lens)
    return torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))
