"""Triton kernels: NVIDIA sm_80 and newer, AMD CDNA and RDNA; CPU tensors in Triton's interpreter.

Importing this file imports no triton: the kernels are loaded by the first call that uses them.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..device import device_info
from ..kernels.launch import Launch, Lists, Saved, Side, run_launches
from ..kernels.launch_tables import LaunchRow, launch_row, unsupported_arch
from ..registry import Backend, Problem, register
from .outputs import empty_like_heads, empty_lse

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


@cache
def _available() -> str | None:
    return None if find_spec("triton") else "triton is not installed (pip install triton)"


def _interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; fixed once triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _supports(problem: Problem) -> str | None:
    if problem.precision != "native":
        return f"precision {problem.precision!r} is not 'native'"
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype} is not float16, bfloat16 or float32"
    for name, size in (("head_dim", problem.head_dim), ("head_dim of v", problem.head_dim_v)):
        if size > _MAX_HEAD_DIM:
            return f"{name} {size} is larger than {_MAX_HEAD_DIM}"
    if _interpreting():
        if problem.dtype == torch.bfloat16:
            return "bfloat16 arithmetic is wrong in the Triton interpreter (TRITON_INTERPRET=1)"
        return None
    if problem.device_type == "cpu":
        return "CPU tensors run only in the Triton interpreter (TRITON_INTERPRET=1)"
    return unsupported_arch(problem.arch)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    *,
    scale: float,
    is_causal: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_like_heads(q, v.shape[3]), empty_lse(q)
    row = _row("forward", q, v, mask)
    launches = forward_launches(q, k, v, out, lse, mask, scale=scale, is_causal=is_causal, row=row)
    run_launches(launches, q.device)
    return out, lse


def forward_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask | None,
    *,
    scale: float,
    is_causal: bool,
    row: LaunchRow,
) -> list[Launch]:
    """The kernel launches of a forward pass with the launch options ``row``."""
    from ..kernels.attention_forward import attention_forward

    lists = None if mask is None else Lists(mask.kv_num_blocks, mask.kv_indices)
    return attention_forward(
        q, k, v, out, lse, lists, *_sides(q, k, mask), scale=scale, is_causal=is_causal, row=row
    )


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask | None,
    *,
    scale: float,
    is_causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_like_heads(x, x.shape[3]) for x in (q, k, v))
    saved = Saved(q, k, v, out, lse, grad_out, grad_lse)
    launches = backward_launches(
        saved, (dq, dk, dv), mask, scale=scale, is_causal=is_causal,
        dq_row=_row("dq", q, v, mask), dkv_row=_row("dkv", q, v, mask),
    )  # fmt: skip
    run_launches(launches, q.device)
    return dq, dk, dv


def backward_launches(
    saved: Saved,
    grads: tuple[Tensor, Tensor, Tensor],
    mask: BlockMask | None,
    *,
    scale: float,
    is_causal: bool,
    dq_row: LaunchRow,
    dkv_row: LaunchRow,
) -> list[Launch]:
    """The kernel launches of a backward pass, which fill ``grads`` = (dq, dk, dv)."""
    from ..kernels.attention_backward import attention_backward

    lists = None if mask is None else Lists(mask.kv_num_blocks, mask.kv_indices)
    transposed = None if mask is None else Lists(*mask.transposed())
    return attention_backward(
        saved, grads, lists, transposed, *_sides(saved.q, saved.k, mask),
        scale=scale, is_causal=is_causal, dq_row=dq_row, dkv_row=dkv_row,
    )  # fmt: skip


def _sides(q: Tensor, k: Tensor, mask: BlockMask | None) -> tuple[Side, Side]:
    if mask is None:  # the kernels cut dense sequences as they like
        return Side(1, q.shape[2]), Side(1, k.shape[2])
    return (
        Side(mask.q_block_size, q.shape[2], mask.q_block_lens),
        Side(mask.kv_block_size, k.shape[2], mask.kv_block_lens),
    )


def _row(kernel: str, q: Tensor, v: Tensor, mask: BlockMask | None) -> LaunchRow:
    arch = device_info(q.device).arch
    grain = None if mask is None else min(mask.q_block_size, mask.kv_block_size)
    return launch_row(arch, kernel, max(q.shape[3], v.shape[3]), q.element_size(), grain)


register(
    Backend(
        name="triton",
        priority=10,
        available=_available,
        supports=_supports,
        forward=_forward,
        backward=_backward,
    )
)
