"""Attention whose keys come from other ranks, as one step for autograd."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Call(Protocol):
    """All of a call but its tensors, and its two passes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse)."""

    def backward(
        self, grads: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, *results: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv from the gradients of ``results``, (out, lse)."""


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``call``. Differentiable."""
    return _Attend.apply(call, q, k, v)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call.forward(q, k, v)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.backward((grad_out, grad_lse), *ctx.saved_tensors)
