"""Sparse attention under diffusers' context parallelism: Ulysses, where each rank gets some heads
of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .intercept import AttentionCall

# (query, key, value [B, heads of this rank, S, D], first of its heads, all heads)
AttendHeads = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def attend_in_parallel(call: AttentionCall, attend: AttendHeads) -> Tensor:
    """``attend`` over the whole sequence for the heads of this rank, [B, H, S of this rank, Dv].

    diffusers moves the tensors between the ranks. The backward pass computes the forward again.

    Raises:
        ValueError: ring attention, which sees a part of the keys at a time and does not say which;
            heads that the ranks cannot share equally.
    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    config = call.parallel_config.context_parallel_config
    heads = call.query.shape[1]
    if config.ring_degree > 1:
        raise ValueError(
            f"ring_degree must be 1 with sparse attention, got {config.ring_degree}: use "
            "ulysses_degree, which gives each rank whole sequences"
        )
    if heads % config.ulysses_degree:
        raise ValueError(
            f"ulysses_degree must divide the {heads} heads, got {config.ulysses_degree}"
        )
    if call.gate is not None:
        raise ValueError("the gate of a coarse branch cannot be served under context parallelism")
    first = config._ulysses_mesh.get_local_rank() * (heads // config.ulysses_degree)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return attend(q, k, v, first).transpose(1, 2).contiguous()

    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
    ) -> Tensor:
        if options.get("_save_ctx", True):
            ctx.save_for_backward(query, key, value)
        return run(query, key, value)

    def backward(ctx: Any, grad: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(run(*inputs), inputs, grad)

    query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    out: Any = _templated_context_parallel_attention(
        query, key, value, scale=call.scale, forward_op=forward, backward_op=backward,
        _parallel_config=call.parallel_config,
    )  # fmt: skip
    return out.transpose(1, 2)
