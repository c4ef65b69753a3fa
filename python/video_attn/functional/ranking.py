"""The first steps of video sparse attention by kernels that do them at once, where a GPU has some.

For some heads at a time, as in coarse.py, where the scores of all would take too much memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..calls import BlockOps, RankCall, Ranking, Side
from ..checks import forward_mode_is_on, is_plain, wants_gradient
from ..registry import select_block_ops
from .coarse import average_gradients, head_groups

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fused_block_ops(backend: str | None, *tensors: Tensor | None) -> BlockOps | None:
    """The kernels for these tensors, if there are some and nobody but autograd watches."""
    given = [x for x in tensors if x is not None]
    if torch.compiler.is_compiling() or forward_mode_is_on() or not is_plain(*given):
        return None
    ops = select_block_ops(given[0].device, backend)
    served = ops.rank is not None and given[0].dtype in _DTYPES and all(x.numel() for x in given)
    return ops if served else None


def rank(ops: BlockOps, call: RankCall, room: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(selected, counts, coarse) of a call, differentiable; see :class:`Ranking`.

    ``room``: bytes that scores may take, as in :func:`coarse.rank_and_average`.
    """
    if call.v is not None and wants_gradient(call.q, call.k, call.v):
        return _Rank.apply(call.q, call.k, call.v, call, ops, room)
    return _by_heads(ops, call, room)[:3]


def _by_heads(ops: BlockOps, call: RankCall, room: int) -> Ranking:
    assert ops.rank is not None
    q, k, v = call.q, call.k, call.v
    keys = call.kv_side.tiles(call.kv_side.slot)
    rows = call.q_side.tiles(call.q_side.slot)
    groups = list(head_groups(q, k, room, rows * keys * 4))
    if len(groups) == 1:
        return ops.rank(call)
    parts = [
        ops.rank(call._replace(q=q[:, a], k=k[:, b], v=None if v is None else v[:, b]))
        for a, b in groups
    ]
    selected, counts, coarse = (_joined([x[i] for x in parts]) for i in range(3))
    q_mean, k_mean, v_mean = (_joined([x.means[i] for x in parts]) for i in range(3))
    assert selected is not None and counts is not None
    assert q_mean is not None and k_mean is not None
    return Ranking(selected, counts, coarse, (q_mean, k_mean, v_mean))


def _joined(parts: list[Any]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts, 1)


class _Rank(torch.autograd.Function):
    """A call with the gradients of its coarse part, whose scores are made again from the means."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: RankCall, ops: BlockOps, room: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The tensors of the call are those that autograd knows: here they are without it.
        ranking = _by_heads(ops, call._replace(q=q, k=k, v=v), room)
        assert ranking.coarse is not None
        ctx.save_for_backward(*ranking.means, call.q_side.lens, call.kv_side.lens)
        ctx.sides = call.q_side._replace(lens=None), call.kv_side._replace(lens=None)
        ctx.scale, ctx.ops, ctx.room = call.scale, ops, room
        ctx.mark_non_differentiable(ranking.selected, ranking.counts)
        return ranking.selected, ranking.counts, ranking.coarse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, __: None, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_mean, k_mean, v_mean, q_lens, kv_lens = ctx.saved_tensors
        sides = ctx.sides[0]._replace(lens=q_lens), ctx.sides[1]._replace(lens=kv_lens)
        parts = [
            average_gradients(
                (q_mean[:, a], k_mean[:, b], v_mean[:, b]), kv_lens, ctx.scale, grad[:, a]
            )
            for a, b in head_groups(q_mean, k_mean, ctx.room)
        ]
        grads = []
        for i, side in enumerate((sides[0], sides[1], sides[1])):
            mean = parts[0][i] if len(parts) == 1 else torch.cat([x[i] for x in parts], 1)
            grads.append(_spread(ctx.ops, mean, side) if ctx.needs_input_grad[i] else None)
        return *grads, None, None, None


def _spread(ops: BlockOps, grad: Tensor, side: Side) -> Tensor:
    """The gradient of a mean, in the tokens that it is of."""
    dx = grad.new_empty(*grad.shape[:2], side.length, grad.shape[3])
    ops.block_mean_backward(grad if grad.stride(3) == 1 else grad.contiguous(), dx, side)
    return dx
