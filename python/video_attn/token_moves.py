"""Tokens from one order to another, and their derivatives: rows of a tensor by a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import forward_mode_is_on, is_plain, wants_gradient
from .words import as_words


def move_tokens(
    x: Tensor,
    dim: int,
    index: Tensor,
    inverse: Tensor,
    holes: Tensor | None,
    inverse_holes: Tensor | None,
) -> Tensor:
    """out[i] = x[index[i]], or zero in the ``holes``, where index[i] < 0.

    The inverse is the way back. Holes are positions, or a mask of all of them.
    """
    if not torch.compiler.is_compiling():  # which knows no derivatives but backward ones
        if forward_mode_is_on() or torch._C._are_functorch_transforms_active():
            return _MoveTokensForwardMode.apply(x, dim, index, inverse, holes, inverse_holes)
        if not wants_gradient(x):
            return _take(x, dim, index, holes)
    return _MoveTokens.apply(x, dim, index, inverse, holes, inverse_holes)


class _MoveTokens(torch.autograd.Function):
    """:func:`move_tokens` and its gradient, which gathers by the inverse.

    A gather in both directions keeps the backward deterministic, which a scatter-add on a GPU is
    not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dim: int,
        index: Tensor,
        inverse: Tensor,
        holes: Tensor | None,
        inverse_holes: Tensor | None,
    ) -> Tensor:
        _keep(ctx, dim, index, inverse, holes, inverse_holes)
        return _take(x, dim, index, holes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, inverse, holes, inverse_holes = ctx.saved_tensors
        grad_x = move_tokens(grad, ctx.dim, inverse, index, inverse_holes, holes)
        return grad_x, None, None, None, None, None


class _MoveTokensForwardMode(torch.autograd.Function):
    """The same with a forward-mode derivative, and for ``torch.func``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        dim: int,
        index: Tensor,
        inverse: Tensor,
        holes: Tensor | None,
        inverse_holes: Tensor | None,
    ) -> Tensor:
        return _take(x, dim, index, holes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[1:])
        ctx.save_for_forward(*inputs[2:])

    backward = _MoveTokens.backward

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: Any) -> Tensor:
        return move_tokens(tangent, ctx.dim, *ctx.saved_tensors)


def _keep(
    ctx: Any,
    dim: int,
    index: Tensor,
    inverse: Tensor,
    holes: Tensor | None,
    inverse_holes: Tensor | None,
) -> None:
    ctx.dim = dim
    ctx.save_for_backward(index, inverse, holes, inverse_holes)


def _take(x: Tensor, dim: int, index: Tensor, holes: Tensor | None) -> Tensor:
    # Rows move in words of 16 bytes where they can and nobody watches.
    words = x
    if not torch.compiler.is_compiling() and is_plain(x) and dim not in (-1, x.dim() - 1):
        (words,) = as_words(x)
    out = words.index_select(dim, index if holes is None else index.clamp_min(0))
    if holes is not None:
        clear_holes(out, dim, holes)
    return out if words is x else out.view(x.dtype)


def clear_holes(x: Tensor, dim: int, holes: Tensor) -> None:
    """Zeros into the ``holes`` of ``x``: positions, or a mask of all of them."""
    if holes.dtype == torch.bool:
        shape = [1] * x.dim()
        shape[dim] = -1
        x.masked_fill_(holes.view(shape), 0)
    else:  # a pass over these rows alone
        x.index_fill_(dim, holes, 0)
