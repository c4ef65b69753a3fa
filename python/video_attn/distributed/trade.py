"""Trades of tokens for heads in chunks, for autograd: a chunk travels while another is attended to.

Forward and backward have the same shape. All chunks leave together, each arrives when it is wanted;
each result leaves when it is there, all come home together. So there are four nodes, and gradients
meet them in the opposite order: Depart / Arrive / Leave / Home. What is on its way is kept beside
the graph, in the trade; the nodes are tied by tensors without elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .ulysses import Swap, Travelling


@dataclass
class Trade:
    """The chunks of one trade, and what is on its way.

    Args:
        chunks: for each, its swaps, and which of the tensors travel with each of them.
    """

    chunks: Sequence[Sequence[tuple[Swap, Sequence[int]]]]
    _on_the_way: dict[int, list[Travelling]] = field(default_factory=dict)

    def gradient(self) -> Trade:
        return Trade([[(swap.gradient, places) for swap, places in c] for c in self.chunks])

    def start_to_heads(self, chunk: int, xs: Sequence[Tensor]) -> None:
        self._on_the_way[chunk] = [
            swap.start_to_heads([xs[i] for i in places]) for swap, places in self.chunks[chunk]
        ]

    def finish_to_heads(self, chunk: int) -> list[Tensor]:
        started = self._on_the_way.pop(chunk)
        arrived: dict[int, Tensor] = {}
        for (swap, places), travelling in zip(self.chunks[chunk], started, strict=True):
            arrived |= zip(places, swap.finish_to_heads(travelling), strict=True)
        return [arrived[i] for i in sorted(arrived)]

    def start_to_tokens(self, chunk: int, ys: Sequence[Tensor]) -> None:
        self._on_the_way[chunk] = [
            swap.start_to_tokens([ys[i] for i in places]) for swap, places in self.chunks[chunk]
        ]

    def finish_to_tokens(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """All chunks, in tensors of these ``shapes`` [B, H, held, D]."""
        adds = not all(swap.is_one_to_one for swap, _ in self.chunks[0])
        if self.chunks[0][0][0].copies:
            adds = False  # every holder of a token gets each head once
        into = [_tokens(shape, dtype, device, adds) for shape in shapes]
        for chunk, swaps in enumerate(self.chunks):
            started = self._on_the_way.pop(chunk)
            for (swap, places), travelling in zip(swaps, started, strict=True):
                swap.finish_to_tokens(travelling, [into[i] for i in places], adds)
        return into


def _tokens(shape: Sequence[int], dtype: torch.dtype, device: torch.device, zero: bool) -> Tensor:
    """[B, H, S, D] that lies in memory as [B, S, H, D], as the layers around attention want it."""
    batch, heads, tokens, channels = shape
    allocate = torch.zeros if zero else torch.empty
    return allocate(batch, tokens, heads, channels, dtype=dtype, device=device).transpose(1, 2)


class Depart(torch.autograd.Function):
    """Sends all chunks of tensors [B, H, held, D]; a tie for each chunk."""

    @staticmethod
    def forward(ctx: Any, trade: Trade, back: Trade, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.back, ctx.like = back, ([x.shape for x in xs], xs[0].dtype, xs[0].device)
        for chunk in range(len(trade.chunks)):
            trade.start_to_heads(chunk, xs)
        return tuple(xs[0].new_empty(0) for _ in trade.chunks)

    @staticmethod
    def backward(ctx: Any, *ties: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.back.finish_to_tokens(*ctx.like)


class Arrive(torch.autograd.Function):
    """The tensors [B, heads of this rank, slots, D] of a chunk; its gradients leave at once."""

    @staticmethod
    def forward(ctx: Any, trade: Trade, back: Trade, chunk: int, tie: Tensor) -> tuple[Tensor, ...]:
        ctx.back, ctx.chunk = back, chunk
        return tuple(trade.finish_to_heads(chunk))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.back.start_to_tokens(ctx.chunk, grads)
        return None, None, None, grads[0].new_empty(0)


class Leave(torch.autograd.Function):
    """Sends the result of a chunk home; its gradient arrives when it is wanted."""

    @staticmethod
    def forward(ctx: Any, trade: Trade, back: Trade, chunk: int, y: Tensor) -> Tensor:
        ctx.back, ctx.chunk = back, chunk
        trade.start_to_tokens(chunk, [y])
        return y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, tie: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, ctx.back.finish_to_heads(ctx.chunk)[0]


class Home(torch.autograd.Function):
    """The result of all chunks [B, H, held, D]; the gradients of all chunks leave together."""

    @staticmethod
    def forward(ctx: Any, trade: Trade, back: Trade, shape: Sequence[int], *ties: Tensor) -> Tensor:
        ctx.back = back
        return trade.finish_to_tokens([shape], ties[0].dtype, ties[0].device)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chunks = len(ctx.back.chunks)
        for chunk in range(chunks):
            ctx.back.start_to_heads(chunk, [grad])
        return None, None, None, *(grad.new_empty(0) for _ in range(chunks))
