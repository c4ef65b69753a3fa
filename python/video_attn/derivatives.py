"""How an attention is differentiated: backward, forward-mode, and under ``torch.func``.

:func:`attend` takes the shortest way that gives the derivatives which are asked for. Compiled code,
modes and subclasses of tensors see the torch operators of ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import flops
from .block_mask import BlockMask, mask_arguments
from .calls import ForwardCall
from .checks import forward_mode_is_on, is_plain, wants_gradient
from .mask_arguments import MaskArguments
from .ops import (
    NO_DERIVATIVE,
    NO_SECOND_DERIVATIVE,
    backward,
    backward_backend,
    check_differentiable,
    forward,
    library,
    run_forward,
)
from .quantize import is_differentiable, recipe_text
from .transforms import fold_into_batch, register_vmap

_ops = torch.ops.video_attn
Run = Callable[[ForwardCall], tuple[Tensor, Tensor]]


def attend(call: ForwardCall, deterministic: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, differentiable as far as its tensors ask for it.

    Raises:
        ValueError: a quantized precision, without straight_through, is to be differentiated.
        RuntimeError: no backend, or not the one asked for, can serve.
    """
    q, k, v = call.q, call.k, call.v
    wanted = wants_gradient(q, k, v)
    exact = is_differentiable(call.precision, call.quantization)
    if not exact and (wanted or has_tangent(q, k, v)):
        raise ValueError(f"precision {call.precision!r} {NO_DERIVATIVE}")
    if not torch.compiler.is_compiling():
        if torch._C._len_torch_dispatch_stack() > 0:
            flops.register()  # one of the modes may count
        transformed = torch._C._are_functorch_transforms_active()
        if wanted or forward_mode_is_on() or transformed:
            wanted = wanted and not transformed  # then the lists may have another dimension
            if wanted and not forward_mode_is_on() and is_plain(q, k, v):
                run = partial(run_forward, backend=backend)
                return _PlainAttention.apply(q, k, v, call, run, deterministic, backend)
            return _Attention.apply(*_arguments(call, wanted, deterministic, backend))
        if is_plain(q, k, v):
            return run_forward(call, backend)
    return _ops.attention_forward(*_arguments(call, wanted, deterministic, backend))


def attend_as_seen(
    call: ForwardCall, run: Run, deterministic: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """:func:`attend` for a call that nobody but autograd watches, by a backend's ``run``."""
    if not wants_gradient(call.q, call.k, call.v):
        return run(call)
    if not is_differentiable(call.precision, call.quantization):
        raise ValueError(f"precision {call.precision!r} {NO_DERIVATIVE}")
    return _PlainAttention.apply(call.q, call.k, call.v, call, run, deterministic, backend)


def _arguments(
    call: ForwardCall, wanted: bool, deterministic: bool, backend: str | None
) -> tuple[Any, ...]:
    """Those of ``attention_forward``; ``wanted``: a backward pass may follow."""
    transposed = wanted and call.mask is not None and _transposes_now(call.mask, call.q)
    return (
        call.q, call.k, call.v, *mask_arguments(call.mask, transposed), call.scale, call.is_causal,
        recipe_text(call.precision, call.quantization), deterministic, backend,
    )  # fmt: skip


def _transposes_now(mask: BlockMask, q: Tensor) -> bool:
    """Whether the transposed lists are made in the forward pass, and kept for the backward one.

    A mask that many calls share keeps them. But those of a mask of many heads, made for one call as
    in video sparse attention, would wait for the backward pass in every layer, and they are as wide
    as the sequence is long: the backward pass makes them, for some heads at a time.
    """
    if mask.keeps_transpose:
        return True
    if torch.compiler.is_compiling():
        return False
    return mask.transpose_bytes * 16 <= q.numel() * q.element_size()


def has_tangent(*tensors: Any) -> bool:
    """Whether forward-mode differentiation goes through one of the tensors."""
    if torch.compiler.is_compiling() or not forward_mode_is_on():
        return False
    return any(isinstance(x, Tensor) and x.is_floating_point() and _is_dual(x) for x in tensors)


def _is_dual(x: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:  # not to be seen inside of vmap: then it may well have one
        return True


class _PlainAttention(torch.autograd.Function):
    """A call with its backward pass and nothing else: what a training step needs.

    Of a function with a ``setup_context`` torch inspects the signature at every call, which takes
    longer than all the rest here.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: ForwardCall, run: Run,
        deterministic: bool, backend: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        transposed = call.mask is not None and _transposes_now(call.mask, q)
        lists = mask_arguments(call.mask, transposed)
        out, lse = run(call)
        ctx.block_sizes = lists.q_block_size, lists.kv_block_size
        ctx.scale, ctx.is_causal = call.scale, call.is_causal
        ctx.recipe = recipe_text(call.precision, call.quantization)
        ctx.deterministic, ctx.backend = deterministic, backend
        ctx.save_for_backward(q, k, v, out, lse, *lists.tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, grad_out, grad_lse)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """The backward pass of either function; ``ctx`` is filled as they do it."""
    check_differentiable(ctx.recipe)  # inside of vmap nothing shows who differentiates outside
    q, k, v, out, lse, *lists = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # Only with create_graph can anybody ask for the derivatives of the gradients.
    again = torch.is_grad_enabled() or not is_plain(grad_out, q, k, v)
    grads = (_AttentionBackward.apply if again else backward)(
        grad_out, grad_lse, q, k, v, out, lse, *lists, *ctx.block_sizes,
        ctx.scale, ctx.is_causal, ctx.deterministic, backward_backend(ctx.recipe, ctx.backend),
    )  # fmt: skip
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


class _Attention(torch.autograd.Function):
    """``attention_forward`` with all its derivatives."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        run = forward if is_plain(q, k, v) else _ops.attention_forward
        return run(q, k, v, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *arguments = inputs
        lists = MaskArguments(*arguments[: len(MaskArguments._fields)])
        ctx.block_sizes = lists.q_block_size, lists.kv_block_size
        options = arguments[len(lists) :]
        ctx.scale, ctx.is_causal, ctx.recipe, ctx.deterministic, ctx.backend = options
        saved = (q, k, v, *output, *lists.tensors)
        ctx.save_for_backward(*saved)
        if forward_mode_is_on():
            ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, grad_out, grad_lse)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        check_differentiable(ctx.recipe)  # inside of vmap nothing shows who differentiates outside
        q, k, v, _, lse, *lists = ctx.saved_tensors
        return _AttentionTangent.apply(
            *tangents[:3], q, k, v, lse, *lists, *ctx.block_sizes, ctx.scale, ctx.is_causal
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_into_batch(_Attention.apply, 3, info.batch_size, in_dims, arguments)


class _AttentionBackward(torch.autograd.Function):
    """``attention_backward``, which cannot be differentiated again."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.attention_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_into_batch(_AttentionBackward.apply, 7, info.batch_size, in_dims, arguments)


class _AttentionTangent(torch.autograd.Function):
    """``attention_tangent``, which cannot be differentiated again."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _ops.attention_tangent(*arguments)

    setup_context = _AttentionBackward.setup_context
    backward = _AttentionBackward.backward
    jvp = _AttentionBackward.jvp

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_into_batch(_AttentionTangent.apply, 7, info.batch_size, in_dims, arguments)


# For tensors without derivatives, which go to the operators at once.
for _name, _leading in (
    ("attention_forward", 3),
    ("attention_backward", 7),
    ("attention_tangent", 7),
):
    register_vmap(getattr(_ops, _name).default, _leading, library)
