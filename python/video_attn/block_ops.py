"""Block means and exact top-k as torch operators: schema, fake and autograd.

``video_attn::block_mean``, its backward and ``video_attn::select_top_k`` choose their code by the
device inside: fused Triton kernels on a GPU, plain torch elsewhere.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .kernels.launch import Side, run_launches

logger = logging.getLogger("video_attn")
library = torch.library.Library("video_attn", "FRAGMENT")
library.define("block_mean(Tensor x, Tensor? block_lens, SymInt block_size) -> Tensor")
library.define(
    "block_mean_backward(Tensor grad, Tensor? block_lens, SymInt block_size, SymInt length)"
    " -> Tensor"
)
library.define("select_top_k(Tensor scores, SymInt top_k, Tensor? key_lens) -> Tensor")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 1 << 22  # scores that the torch code looks at in one go


def block_mean(x: Tensor, block_lens: Tensor | None, block_size: int) -> Tensor:
    """Mean of the valid tokens of every block; what padding tokens hold does not matter.

    Args:
        x: [B, H, S, D], fp16, bf16, fp32 or fp64.
        block_lens: int32 [B|1, N], valid tokens of each block (valid first), or None: all. There
            are N = ceil(S / block_size) blocks; the last also ends where the sequence ends.
        block_size: tokens per block.

    Returns:
        [B, H, N, D] in the dtype of x, summed in fp32 (fp64 for fp64); 0 for a block without valid
        tokens. The gradient is spread evenly over the valid tokens and is 0 for padding.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    _check_4d("x", x, "[B, H, S, D]")
    _check_positive("block_size", block_size)
    _check_lens("block_lens", block_lens, x, -(-x.shape[2] // block_size))
    return torch.ops.video_attn.block_mean(x, block_lens, block_size)


def select_top_k(scores: Tensor, top_k: int, key_lens: Tensor | None = None) -> Tensor:
    """Indices of the ``top_k`` largest scores of every row, exactly ``top_k`` of them.

    Args:
        scores: [B, H, Nq, Nk], fp16, bf16 or fp32 (on a CPU also fp64). NaN counts as -inf.
        top_k: 1 to Nk.
        key_lens: int32 [B|1, Nk] or None; the scores of keys of length 0 count as -inf.

    Returns:
        int32 [B, H, Nq, top_k], ascending. Of equal scores the lower index is taken, also among
        those that count as -inf, so that every device gives the same. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    _check_4d("scores", scores, "[B, H, Nq, Nk]")
    _check_positive("top_k", top_k)
    if top_k > scores.shape[3]:
        raise ValueError(
            f"top_k must be at most the number of keys, {scores.shape[3]}, got {top_k}"
        )
    if scores.is_cuda and scores.dtype == torch.float64:
        raise TypeError("scores on a GPU must be float16, bfloat16 or float32, got torch.float64")
    _check_lens("key_lens", key_lens, scores, scores.shape[3])
    return torch.ops.video_attn.select_top_k(scores, top_k, key_lens)


def _kernels_serve(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device; says once why not where they should."""
    if device.type != "cuda":
        return False
    return _triton_found()


@cache
def _triton_found() -> bool:
    found = find_spec("triton") is not None
    if not found:
        logger.warning("block means and top-k run in plain torch: triton is not installed")
    return found


def _block_mean(x: Tensor, block_lens: Tensor | None, block_size: int) -> Tensor:
    mean = _block_mean_fake(x, block_lens, block_size)
    x = x if x.stride(3) == 1 else x.contiguous()
    side = Side(block_size, x.shape[2], block_lens)
    if _kernels_serve(x.device):
        from .kernels import block_pool

        run_launches([block_pool.block_mean(x, mean, side)], x.device)
        return mean
    if block_lens is None and x.shape[2] % block_size == 0:  # nothing to leave out: one reduction
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return mean.copy_(x.unflatten(2, (-1, block_size)).mean(3, dtype=wide))
    valid, count = _valid_rows(side, x)
    for b in range(x.shape[0]):  # one head at a time bounds the copies
        at = min(b, valid.shape[0] - 1)
        for h in range(x.shape[1]):
            rows = torch.where(valid[at], _blocks(x[b, h], side), 0)
            mean[b, h] = (rows.sum(1, dtype=count.dtype) / count[at]).to(x.dtype)
    return mean


def _block_mean_backward(
    grad: Tensor, block_lens: Tensor | None, block_size: int, length: int
) -> Tensor:
    dx = _block_mean_backward_fake(grad, block_lens, block_size, length)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    side = Side(block_size, length, block_lens)
    if _kernels_serve(grad.device):
        from .kernels import block_pool

        run_launches([block_pool.block_mean_backward(grad, dx, side)], grad.device)
        return dx
    valid, count = _valid_rows(side, grad)
    for b in range(grad.shape[0]):
        at = min(b, valid.shape[0] - 1)
        for h in range(grad.shape[1]):
            share = (grad[b, h] / count[at]).to(grad.dtype)
            dx[b, h] = torch.where(valid[at], share[:, None], 0).flatten(0, 1)[:length]
    return dx


def _blocks(rows: Tensor, side: Side) -> Tensor:
    """[S, D] as [N, block_size, D]; rows past the end are zero."""
    missing = -rows.shape[0] % side.slot
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(0, (-1, side.slot))


def _valid_rows(side: Side, x: Tensor) -> tuple[Tensor, Tensor]:
    """Valid rows of the blocks, bool [B|1, N, V, 1], and how many (at least 1), [B|1, N, 1]."""
    starts = torch.arange(0, side.length, side.slot, device=x.device)
    lens = (side.length - starts).clamp(max=side.slot)[None]
    if side.lens is not None:
        lens = torch.minimum(lens, side.lens)
    valid = torch.arange(side.slot, device=x.device) < lens[..., None]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return valid[..., None], lens.clamp(min=1)[..., None].to(wide)


def _select_top_k(scores: Tensor, top_k: int, key_lens: Tensor | None) -> Tensor:
    indices = _select_top_k_fake(scores, top_k, key_lens)
    if _kernels_serve(scores.device):
        from .kernels import block_pool

        scores = scores if scores.stride(3) == 1 else scores.contiguous()
        run_launches([block_pool.select_top_k(scores, indices, top_k, key_lens)], scores.device)
        return indices
    empty = None if key_lens is None else key_lens <= 0
    rows = max(1, _CHUNK // max(1, scores.shape[1] * scores.shape[3]))
    for b in range(scores.shape[0]):
        hidden = None if empty is None else empty[min(b, empty.shape[0] - 1)]
        for start in range(0, scores.shape[2], rows):
            part = scores[b, :, start : start + rows]
            indices[b, :, start : start + rows] = _top_k_of_rows(part, top_k, hidden)
    return indices


def _top_k_of_rows(scores: Tensor, top_k: int, hidden: Tensor | None) -> Tensor:
    low = scores.isnan() if hidden is None else scores.isnan() | hidden
    scores = scores.masked_fill(low, -torch.inf)
    kth = scores.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tie = scores > kth, scores == kth
    ties = top_k - above.sum(-1, keepdim=True)
    take = above | (tie & (tie.cumsum(-1) <= ties))
    # Every taken index goes to its rank, all others to a column too many.
    rank = torch.where(take, take.cumsum(-1) - 1, top_k)
    index = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    result = index.new_empty(*scores.shape[:-1], top_k + 1)
    return result.scatter_(-1, rank, index.expand_as(rank))[..., :top_k]


def _block_mean_fake(x: Tensor, block_lens: Tensor | None, block_size: int) -> Tensor:
    return x.new_empty(*x.shape[:2], -(-x.shape[2] // block_size), x.shape[3])


def _block_mean_backward_fake(
    grad: Tensor, block_lens: Tensor | None, block_size: int, length: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:2], length, grad.shape[3])


def _select_top_k_fake(scores: Tensor, top_k: int, key_lens: Tensor | None) -> Tensor:
    return scores.new_empty(*scores.shape[:3], top_k, dtype=torch.int32)


def _setup_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, block_lens, ctx.block_size = inputs
    ctx.save_for_backward(block_lens)
    ctx.length = x.shape[2]


def _mean_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (block_lens,) = ctx.saved_tensors
    dx = torch.ops.video_attn.block_mean_backward(grad, block_lens, ctx.block_size, ctx.length)
    return dx, None, None


def _setup_mean_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, block_lens, ctx.block_size, _ = inputs
    ctx.save_for_backward(block_lens)


def _mean_backward_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (block_lens,) = ctx.saved_tensors
    return torch.ops.video_attn.block_mean(grad, block_lens, ctx.block_size), None, None, None


for _name, _run, _fake in (
    ("block_mean", _block_mean, _block_mean_fake),
    ("block_mean_backward", _block_mean_backward, _block_mean_backward_fake),
    ("select_top_k", _select_top_k, _select_top_k_fake),
):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"video_attn::{_name}", _fake, lib=library)
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


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


def _check_lens(name: str, lens: object, x: Tensor, blocks: int) -> None:
    if lens is None:
        return
    if not isinstance(lens, Tensor) or lens.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {getattr(lens, 'dtype', type(lens))}")
    if lens.dim() != 2 or lens.shape[0] not in (1, x.shape[0]) or lens.shape[1] != blocks:
        raise ValueError(
            f"{name} must be [1, {blocks}] or [{x.shape[0]}, {blocks}], got {tuple(lens.shape)}"
        )
    if lens.device != x.device:
        raise ValueError(f"{name} is on {lens.device}, but the data is on {x.device}")
