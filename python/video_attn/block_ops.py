"""Block means and exact top-k as torch operators: schema, fake and derivatives.

``video_attn::block_mean``, its backward and ``video_attn::select_top_k`` choose their code inside,
as attention does: by the backend that is asked for, where it has some, else by the best for the
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends as _backends  # noqa: F401  fills the registry
from .calls import Side
from .checks import broadcasts, check_int, forward_mode_is_on, wants_gradient
from .registry import select_block_ops
from .transforms import fold_into_batch, register_vmap

library = torch.library.Library("video_attn", "FRAGMENT")
library.define(
    "block_mean(Tensor x, Tensor? block_lens, SymInt block_size, str? backend=None) -> Tensor"
)
library.define(
    "block_mean_backward(Tensor grad, Tensor? block_lens, SymInt block_size, SymInt length, "
    "str? backend=None) -> Tensor"
)
library.define(
    "select_top_k(Tensor scores, SymInt top_k, Tensor? key_lens, str? backend=None) -> Tensor"
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ops = torch.ops.video_attn


def block_mean(
    x: Tensor, block_lens: Tensor | None, block_size: int, *, backend: str | None = None
) -> Tensor:
    """Mean of the valid tokens of every block; what padding tokens hold does not matter.

    Args:
        x: [B, H, S, D], fp16, bf16, fp32 or fp64.
        block_lens: int32 [B|1, N], valid tokens of each block (valid first), or None: all. There
            are N = ceil(S / block_size) blocks; the last also ends where the sequence ends.
        block_size: tokens per block.
        backend: as in :func:`video_attn.attention`; one without block means leaves the choice.

    Returns:
        [B, H, N, D] in the dtype of x, summed in fp32 (fp64 for fp64); 0 for a block without valid
        tokens. The gradient is spread evenly over the valid tokens and is 0 for padding.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    _check_4d("x", x, "[B, H, S, D]")
    block_size = check_int("block_size", block_size, 1)
    _check_lens("block_lens", block_lens, x, -(-x.shape[2] // block_size))
    if not torch.compiler.is_compiling() and (
        wants_gradient(x) or forward_mode_is_on() or torch._C._are_functorch_transforms_active()
    ):
        return _BlockMean.apply(x, block_lens, block_size, backend)
    return _ops.block_mean(x, block_lens, block_size, backend)


def select_top_k(
    scores: Tensor, top_k: int, key_lens: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Indices of the ``top_k`` largest scores of every row, exactly ``top_k`` of them.

    Args:
        scores: [B, H, Nq, Nk], fp16, bf16 or fp32 (on a CPU also fp64). NaN counts as -inf.
        top_k: 1 to Nk.
        key_lens: int32 [B|1, Nk] or None; the scores of keys of length 0 count as -inf.
        backend: as in :func:`block_mean`.

    Returns:
        int32 [B, H, Nq, top_k], ascending. Of equal scores the lower index is taken, also among
        those that count as -inf, so that every device gives the same. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    _check_4d("scores", scores, "[B, H, Nq, Nk]")
    top_k = check_int("top_k", top_k, 1)
    if top_k > scores.shape[3]:
        raise ValueError(
            f"top_k must be at most the number of keys, {scores.shape[3]}, got {top_k}"
        )
    if scores.is_cuda and scores.dtype == torch.float64:
        raise TypeError("scores on a GPU must be float16, bfloat16 or float32, got torch.float64")
    _check_lens("key_lens", key_lens, scores, scores.shape[3])
    return _ops.select_top_k(scores, top_k, key_lens, backend)


def _block_mean(
    x: Tensor, block_lens: Tensor | None, block_size: int, backend: str | None = None
) -> Tensor:
    mean = _block_mean_fake(x, block_lens, block_size)
    x = x if x.stride(3) == 1 else x.contiguous()
    side = Side(block_size, x.shape[2], block_lens)
    select_block_ops(x.device, backend).block_mean(x, mean, side)
    return mean


def _block_mean_backward(
    grad: Tensor,
    block_lens: Tensor | None,
    block_size: int,
    length: int,
    backend: str | None = None,
) -> Tensor:
    dx = _block_mean_backward_fake(grad, block_lens, block_size, length)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    side = Side(block_size, length, block_lens)
    select_block_ops(grad.device, backend).block_mean_backward(grad, dx, side)
    return dx


def _select_top_k(
    scores: Tensor, top_k: int, key_lens: Tensor | None, backend: str | None = None
) -> Tensor:
    indices = _select_top_k_fake(scores, top_k, key_lens)
    scores = scores if scores.stride(3) == 1 else scores.contiguous()
    select_block_ops(scores.device, backend).select_top_k(scores, indices, top_k, key_lens)
    return indices


def _block_mean_fake(
    x: Tensor, block_lens: Tensor | None, block_size: int, backend: str | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:2], -(-x.shape[2] // block_size), x.shape[3])


def _block_mean_backward_fake(
    grad: Tensor,
    block_lens: Tensor | None,
    block_size: int,
    length: int,
    backend: str | None = None,
) -> Tensor:
    return grad.new_empty(*grad.shape[:2], length, grad.shape[3])


def _select_top_k_fake(
    scores: Tensor, top_k: int, key_lens: Tensor | None, backend: str | None = None
) -> Tensor:
    return scores.new_empty(*scores.shape[:3], top_k, dtype=torch.int32)


class _BlockMean(torch.autograd.Function):
    """``block_mean``, which is linear: its forward-mode derivative is itself."""

    @staticmethod
    def forward(
        x: Tensor, block_lens: Tensor | None, block_size: int, backend: str | None
    ) -> Tensor:
        return _ops.block_mean(x, block_lens, block_size, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, block_lens, ctx.block_size, ctx.backend = inputs
        ctx.length = x.shape[2]
        ctx.save_for_backward(block_lens)
        ctx.save_for_forward(block_lens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (lens,) = ctx.saved_tensors
        dx = _BlockMeanBackward.apply(grad, lens, ctx.block_size, ctx.length, ctx.backend)
        return dx, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: Any) -> Tensor:
        return _BlockMean.apply(tangent, *ctx.saved_tensors, ctx.block_size, ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_into_batch(_BlockMean.apply, 1, info.batch_size, in_dims, arguments)


class _BlockMeanBackward(torch.autograd.Function):
    """``block_mean_backward``, linear too: the transpose of the mean."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _ops.block_mean_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, block_lens, ctx.block_size, ctx.length, ctx.backend = inputs
        ctx.save_for_backward(block_lens)
        ctx.save_for_forward(block_lens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dgrad = _BlockMean.apply(grad, *ctx.saved_tensors, ctx.block_size, ctx.backend)
        return dgrad, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: Any) -> Tensor:
        return _BlockMeanBackward.apply(
            tangent, *ctx.saved_tensors, ctx.block_size, ctx.length, ctx.backend
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_into_batch(_BlockMeanBackward.apply, 1, info.batch_size, in_dims, arguments)


def _setup_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, block_lens, ctx.block_size, ctx.backend = inputs
    ctx.save_for_backward(block_lens)
    ctx.length = x.shape[2]


def _mean_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (lens,) = ctx.saved_tensors
    dx = _ops.block_mean_backward(grad, lens, ctx.block_size, ctx.length, ctx.backend)
    return dx, None, None, None


def _setup_mean_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, block_lens, ctx.block_size, _, ctx.backend = inputs
    ctx.save_for_backward(block_lens)


def _mean_backward_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (lens,) = ctx.saved_tensors
    return _ops.block_mean(grad, lens, ctx.block_size, ctx.backend), None, None, None, None


for _name, _run, _fake in (
    ("block_mean", _block_mean, _block_mean_fake),
    ("block_mean_backward", _block_mean_backward, _block_mean_backward_fake),
    ("select_top_k", _select_top_k, _select_top_k_fake),
):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"video_attn::{_name}", _fake, lib=library)
    register_vmap(getattr(_ops, _name).default, 1, library)
# For compiled code, which knows nothing of the functions above.
for _name, _autograd, _setup in (
    ("block_mean", _mean_autograd, _setup_mean),
    ("block_mean_backward", _mean_backward_autograd, _setup_mean_backward),
):
    torch.library.register_autograd(
        f"video_attn::{_name}", _autograd, setup_context=_setup, lib=library
    )


def _check_4d(name: str, x: object, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")


def _check_lens(name: str, lens: object, x: Tensor, blocks: int) -> None:
    if lens is None:
        return
    if not isinstance(lens, Tensor) or lens.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {getattr(lens, 'dtype', type(lens))}")
    if lens.dim() != 2 or not broadcasts(lens.shape[0], x.shape[0]) or lens.shape[1] != blocks:
        raise ValueError(
            f"{name} must be [1, {blocks}] or [{x.shape[0]}, {blocks}], got {tuple(lens.shape)}"
        )
    if lens.device != x.device:
        raise ValueError(f"{name} is on {lens.device}, but the data is on {x.device}")
