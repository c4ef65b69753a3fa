"""The torch operators: schema, fake and autograd, the same for every backend.

``video_attn::attention_forward`` and ``video_attn::attention_backward`` choose their backend
inside, from the tensors they are given, so that ``torch.compile`` sees one opaque node and forward
and backward may run on different backends.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import backends as _backends  # noqa: F401  fills the registry
from .backends.outputs import empty_like_heads, empty_lse
from .block_mask import BlockMask
from .device import device_info
from .quantize import QuantizationOptions, parse_recipe
from .registry import Problem, select

library = torch.library.Library("video_attn", "DEF")

_MASK = (
    "Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? q_num_blocks, Tensor? q_indices, "
    "Tensor? q_block_lens, Tensor? kv_block_lens, SymInt q_block_size, SymInt kv_block_size"
)
library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_MASK}, float scale, bool is_causal, "
    "str precision, bool deterministic, str? backend) -> (Tensor out, Tensor lse)"
)
library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_MASK}, float scale, bool is_causal, bool deterministic, "
    "str? backend) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _mask(q: Tensor, k: Tensor, lists: tuple) -> BlockMask | None:
    """The BlockMask of an operator's mask arguments (those of ``_MASK``)."""
    kv_num, kv_indices, q_num, q_indices, q_lens, kv_lens, q_size, kv_size = lists
    if kv_num is None:
        return None
    transpose = None if q_num is None else (q_num, q_indices)
    return BlockMask(
        kv_num, kv_indices, q_size, kv_size, q.shape[2], k.shape[2], q_lens, kv_lens, transpose
    )


def problem_of(
    direction: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool = False,
    precision: str = "native",
    quantization: QuantizationOptions | None = None,
    deterministic: bool = False,
) -> Problem:
    """The Problem that a call with these tensors poses to the registry."""
    sizes = (None, None) if mask is None else (mask.q_block_size, mask.kv_block_size)
    gqa = q.shape[1] != k.shape[1]
    return _problem(
        direction, q.device, q.dtype, q.shape[3], v.shape[3], *sizes,
        is_causal, precision, quantization, gqa, deterministic,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _problem(direction: str, device: torch.device, *fields: Any) -> Problem:
    """Kept, because it is made in every call; ``fields`` are those of Problem after ``arch``."""
    return Problem(direction, device.type, device_info(device).arch, *fields)  # type: ignore[arg-type]


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *lists, scale, is_causal, recipe, _, backend = args
    mask = _mask(q, k, tuple(lists))
    if q.shape[2] == 0 or k.shape[2] == 0 or q.shape[0] * q.shape[1] == 0:
        return empty_like_heads(q, v.shape[3]).zero_(), empty_lse(q).fill_(-torch.inf)
    precision, quantization = parse_recipe(recipe)
    problem = problem_of(
        "forward", q, k, v, mask,
        is_causal=is_causal, precision=precision, quantization=quantization,
    )  # fmt: skip
    run = select(problem, backend).forward
    options = {} if quantization is None else {"quantization": quantization}
    return run(q, k, v, mask, scale=scale, is_causal=is_causal, precision=precision, **options)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q, v.shape[3]), empty_lse(q)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    *lists, scale, is_causal, deterministic, backend = args
    mask = _mask(q, k, tuple(lists))
    if q.shape[2] == 0 or k.shape[2] == 0 or q.shape[0] * q.shape[1] == 0:
        return tuple(empty_like_heads(x, x.shape[3]).zero_() for x in (q, k, v))
    problem = problem_of(
        "backward", q, k, v, mask, is_causal=is_causal, deterministic=deterministic
    )
    run: Any = select(problem, backend).backward  # select() refuses a backend without one
    if grad_out.stride(-1) != 1:  # an expanded gradient, as sum().backward() makes
        grad_out = grad_out.contiguous()
    return run(
        grad_out, grad_lse, q, k, v, out, lse, mask,
        scale=scale, is_causal=is_causal, deterministic=deterministic,
    )  # fmt: skip


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(empty_like_heads(x, x.shape[3]) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *lists = inputs[:11]
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *lists[:6])
    ctx.block_sizes = inputs[9:11]
    ctx.scale, ctx.is_causal, precision, ctx.deterministic, ctx.backend = inputs[11:]
    if precision != "native":
        raise ValueError(
            f"precision {precision!r} has no backward pass: its rounding has no gradient. Use "
            "precision='native' for training, or call it under torch.no_grad()"
        )


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    grads = torch.ops.video_attn.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *lists, *ctx.block_sizes,
        ctx.scale, ctx.is_causal, ctx.deterministic, ctx.backend,
    )  # fmt: skip
    return *grads, *[None] * 13


def _setup_no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing to keep: there is no second derivative."""


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "attention has no second derivative: its gradients cannot be differentiated again "
        "(create_graph=True and then backward through dq, dk or dv)"
    )


for _name, _run, _fake in (
    ("attention_forward", _forward, _forward_fake),
    ("attention_backward", _backward, _backward_fake),
):
    # Not under CPU or CUDA: one implementation that asks the registry serves every device.
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"video_attn::{_name}", _fake, lib=library)
torch.library.register_autograd(
    "video_attn::attention_forward", _autograd, setup_context=_setup_context, lib=library
)
# Without this, torch would only warn, and give wrong second derivatives.
torch.library.register_autograd(
    "video_attn::attention_backward",
    _no_second_derivative,
    setup_context=_setup_no_context,
    lib=library,
)
