"""The torch operators: schema, fake and autograd, the same for every backend.

``video_attn::attention_forward`` and ``video_attn::attention_backward`` choose their backend
inside, from the tensors they are given, so that ``torch.compile`` sees one opaque node and forward
and backward may run on different backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends as _backends  # noqa: F401  fills the registry
from . import mask_pytree as _mask_pytree  # noqa: F401  tells torch of BlockMask
from .block_mask import BlockMask
from .calls import BackwardCall, ForwardCall, by_heads, empty_like_heads, empty_lse
from .mask_arguments import MaskArguments
from .quantize import is_differentiable, parse_recipe
from .registry import select, serves_backward
from .tangent import TangentCall, attention_tangent

library = torch.library.Library("video_attn", "DEF")
_TRANSPOSE_BYTES = 25  # per pair of blocks, for a moment, while lists are transposed

MASK_SCHEMA = (
    "Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? q_num_blocks, Tensor? q_indices, "
    "Tensor? q_block_lens, Tensor? kv_block_lens, SymInt q_block_size, SymInt kv_block_size"
)
library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {MASK_SCHEMA}, float scale, bool is_causal, "
    "str recipe, bool deterministic, str? backend) -> (Tensor out, Tensor lse)"
)
library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {MASK_SCHEMA}, float scale, bool is_causal, bool deterministic, "
    "str? backend) -> (Tensor dq, Tensor dk, Tensor dv)"
)
library.define(
    "attention_tangent(Tensor? tangent_q, Tensor? tangent_k, Tensor? tangent_v, Tensor q, "
    f"Tensor k, Tensor v, Tensor lse, {MASK_SCHEMA}, float scale, bool is_causal) "
    "-> (Tensor tangent_out, Tensor tangent_lse)"
)

NO_DERIVATIVE = (
    "has no backward pass and no forward-mode derivative (its rounding has none), but q, k or "
    "v is to be differentiated. Use straight_through=True for the gradients of unquantized "
    "attention, precision='native' for training, or call under torch.no_grad()"
)
NO_SECOND_DERIVATIVE = (
    "attention has no second derivative: its gradients and its tangents cannot be differentiated "
    "again (create_graph=True and then backward through dq, dk or dv; torch.func.hessian)"
)


class _ForwardOptions(NamedTuple):
    """What follows the mask in the arguments of ``attention_forward``."""

    scale: float
    is_causal: bool
    recipe: str  # the precision and its options: quantize.recipe_text
    deterministic: bool  # of the backward pass
    backend: str | None


class _BackwardOptions(NamedTuple):
    """What follows the mask in the arguments of ``attention_backward``."""

    scale: float
    is_causal: bool
    deterministic: bool
    backend: str | None


def _split(arguments: Sequence[Any], options: type[Any]) -> tuple[MaskArguments, Any]:
    """The arguments of an operator after its tensors: a mask's, and those of ``options``."""
    fields = len(MaskArguments._fields)
    return MaskArguments(*arguments[:fields]), options(*arguments[fields:])


def run_forward(call: ForwardCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """(out, lse) by the backend that is asked for, or by the best."""
    if 0 in (*call.q.shape[:3], call.k.shape[2]):
        out, lse = call.empty_results()
        return out.zero_(), lse.fill_(-torch.inf)
    return select(call.problem, backend).forward(call)


def run_backward(call: BackwardCall, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the backend that is asked for, or by the best."""
    if 0 in (*call.q.shape[:3], call.k.shape[2]):
        dq, dk, dv = call.empty_results()
        return dq.zero_(), dk.zero_(), dv.zero_()
    run = select(call.problem, backend).backward
    assert run is not None  # select() refuses a backend without one
    mask = call.mask
    if mask is None or mask.keeps_transpose or mask.kv_indices.shape[1] == 1:
        return run(call)
    # The transposed lists of all heads at once could be as large as q: see derivatives.py.
    call = call._replace(results=call.empty_results())
    for part in by_heads(call, _TRANSPOSE_BYTES * mask.num_q_blocks * mask.num_kv_blocks):
        run(part)
    assert call.results is not None
    return call.results


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    mask, options = _split(arguments, _ForwardOptions)
    precision, quantization = parse_recipe(options.recipe)
    call = ForwardCall(
        q, k, v, BlockMask.from_arguments(mask, q.shape[2], k.shape[2]),
        options.scale, options.is_causal, precision, quantization,
    )  # fmt: skip
    return run_forward(call, options.backend)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q, v.shape[3]), empty_lse(q)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    mask, options = _split(arguments, _BackwardOptions)
    if grad_out.stride(-1) != 1:  # an expanded gradient, as sum().backward() makes
        grad_out = grad_out.contiguous()
    call = BackwardCall(
        grad_out, grad_lse, q, k, v, out, lse,
        BlockMask.from_arguments(mask, q.shape[2], k.shape[2]),
        options.scale, options.is_causal, options.deterministic,
    )  # fmt: skip
    return run_backward(call, options.backend)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return tuple(empty_like_heads(x, x.shape[3]) for x in (q, k, v))


def check_differentiable(recipe: str) -> None:
    """
    Raises:
        ValueError: calls of this recipe have no derivatives.
    """
    if not is_differentiable(*parse_recipe(recipe)):
        raise ValueError(f"precision {recipe!r} {NO_DERIVATIVE}")


def backward_backend(recipe: str, backend: str | None) -> str | None:
    """The backend that a forward pass of ``recipe`` was told to use, for its backward pass.

    That of ``straight_through`` is of precision "native": a backend of quantized kernels alone
    leaves it to the others.
    """
    if recipe == "native" or backend is None or serves_backward(backend):
        return backend
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *arguments = inputs
    mask, ctx.options = _split(arguments, _ForwardOptions)
    ctx.block_sizes = mask.q_block_size, mask.kv_block_size
    ctx.save_for_backward(q, k, v, *output, *mask.tensors)
    check_differentiable(ctx.options.recipe)


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    options = ctx.options
    grads = torch.ops.video_attn.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *lists, *ctx.block_sizes,
        options.scale, options.is_causal, options.deterministic,
        backward_backend(options.recipe, options.backend),
    )  # fmt: skip
    rest = len(MaskArguments._fields) + len(_ForwardOptions._fields)
    return *grads, *[None] * rest


def _setup_no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing to keep: there is no second derivative."""


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def _tangent(
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    *mask, scale, is_causal = arguments
    built = BlockMask.from_arguments(MaskArguments(*mask), q.shape[2], k.shape[2])
    call = TangentCall(tangent_q, tangent_k, tangent_v, q, k, v, lse, built, scale, is_causal)
    return attention_tangent(call)


def _tangent_fake(
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q, v.shape[3]), empty_lse(q)


for _name, _run, _fake in (
    ("attention_forward", forward, _forward_fake),
    ("attention_backward", backward, _backward_fake),
    ("attention_tangent", _tangent, _tangent_fake),
):
    # Not under CPU or CUDA: one implementation that asks the registry serves every device.
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"video_attn::{_name}", _fake, lib=library)
torch.library.register_autograd(
    "video_attn::attention_forward", _autograd, setup_context=_setup_context, lib=library
)
# Without this, torch would only warn, and give wrong second derivatives.
for _name in ("attention_backward", "attention_tangent"):
    torch.library.register_autograd(
        f"video_attn::{_name}",
        _no_second_derivative,
        setup_context=_setup_no_context,
        lib=library,
    )
