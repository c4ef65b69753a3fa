"""Triton kernels: NVIDIA sm_80 and newer, AMD CDNA and RDNA; CPU tensors in Triton's interpreter.

Importing this file imports no triton: the kernels are loaded by the first call that uses them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..calls import BackwardCall, ForwardCall
from ..device import device_info
from ..kernels.codes import Codes, allocate_codes
from ..kernels.launch import Launch, Lists, Saved, Side, padded, reads_vectors
from ..kernels.launch_tables import LaunchRow, launch_row, unsupported_arch, unsupported_precision
from ..kernels.plans import run_planned
from ..quantize import QUANTIZED_PRECISIONS, TILE, QuantizationOptions, fp8_dtype
from ..registry import Backend, Problem, register
from .triton_blocks import BLOCK_OPS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


@cache
def _available() -> str | None:
    return None if find_spec("triton") else "triton is not installed (pip install triton)"


def _interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; fixed once triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _supports(problem: Problem) -> str | None:
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype} is not float16, bfloat16 or float32"
    for name, size in (("head_dim", problem.head_dim), ("head_dim of v", problem.head_dim_v)):
        if size > _MAX_HEAD_DIM:
            return f"{name} {size} is larger than {_MAX_HEAD_DIM}"
    if _interpreting():
        if problem.dtype == torch.bfloat16:
            return "bfloat16 arithmetic is wrong in the Triton interpreter (TRITON_INTERPRET=1)"
    elif problem.device_type == "cpu":
        return "CPU tensors run only in the Triton interpreter (TRITON_INTERPRET=1)"
    else:
        refusal = unsupported_arch(problem.arch)
        if refusal is not None:
            return refusal
    return None if problem.precision == "native" else _refuse_recipe(problem)


def _refuse_recipe(problem: Problem) -> str | None:
    options = problem.quantization or QuantizationOptions()
    for name in ("hadamard", "smooth_q"):
        if getattr(options, name) and options.granularity == "per_head":
            return f"{name} with granularity 'per_head': these kernels take amax of q as it comes"
    if options.pv_accumulation == "fp32+fp16":
        return "pv_accumulation 'fp32+fp16': Triton has no FP8 products with fp16 sums"
    if options.pv_accumulation == "fp16+fp32" and problem.arch.startswith("gfx"):
        return f"pv_accumulation 'fp16+fp32': {problem.arch} has no fp16 products with fp16 sums"
    return None if _interpreting() else unsupported_precision(problem.arch, problem.precision)


def _forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    out, lse = call.empty_results()
    tensors = {"q": call.q, "k": call.k, "v": call.v, "out": out, "lse": lse}
    options = ("forward", call.scale, call.is_causal, call.precision, call.quantization)
    _run(call.mask, None, options, tensors, partial(_forward_launches, call, out, lse))
    return out, lse


def _forward_launches(call: ForwardCall, out: Tensor, lse: Tensor) -> list[Launch]:
    q, k, v, mask = call.q, call.k, call.v, call.mask
    options: dict[str, Any] = {"scale": call.scale, "is_causal": call.is_causal}
    if call.precision == "native":
        row = chosen_row("forward", mask, q, k, v)
        return forward_launches(q, k, v, out, lse, mask, row=row, **options)
    codes, launches = quantize_launches(
        q, k, v, mask, scale=call.scale, precision=call.precision,
        options=call.quantization or QuantizationOptions(),
    )  # fmt: skip
    options["row"] = chosen_row(call.precision, mask, q, k, v)
    return launches + quantized_launches(codes, out, lse, mask, kv_len=k.shape[2], **options)


def _run(
    mask: BlockMask | None,
    transposed: Lists | None,
    options: tuple[Hashable, ...],
    tensors: Mapping[str, Tensor | None],
    launches: Callable[[], list[Launch]],
) -> None:
    """Runs the launches of a call, from a plan where there can be one."""
    if mask is not None:
        tensors = {
            **tensors, "counts": mask.kv_num_blocks, "lists": mask.kv_indices,
            "q_lens": mask.q_block_lens, "kv_lens": mask.kv_block_lens,
        }  # fmt: skip
        options += (mask.q_block_size, mask.kv_block_size)
    if transposed is not None:
        tensors = {**tensors, "q_counts": transposed.counts, "q_lists": transposed.indices}
    run_planned(options, tensors, launches)


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
        q,
        k,
        v,
        out,
        lse,
        lists,
        *_sides(q.shape[2], k.shape[2], mask),
        scale=scale,
        is_causal=is_causal,
        row=row,
    )


def quantize_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    *,
    scale: float,
    precision: str,
    options: QuantizationOptions,
    fp8: torch.dtype | None = None,
) -> tuple[Codes, list[Launch]]:
    """Codes of q, k, v, and the kernel launches that fill them; fp8: by default the device's."""
    from ..kernels.quantize import quantize

    fp8 = fp8_dtype(device_info(q.device).arch) if fp8 is None else fp8
    sides = _sides(q.shape[2], k.shape[2], mask, TILE)
    codes = allocate_codes(q, k, v, *sides, precision, options, fp8)
    return codes, quantize(q, k, v, codes, *sides, scale=scale)


def quantized_launches(
    codes: Codes,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask | None,
    *,
    kv_len: int,
    scale: float,
    is_causal: bool,
    row: LaunchRow,
) -> list[Launch]:
    """The kernel launches of a forward pass over codes with the launch options ``row``."""
    from ..kernels.attention_forward import quantized_attention_forward

    lists = None if mask is None else Lists(mask.kv_num_blocks, mask.kv_indices)
    sides = _sides(out.shape[2], kv_len, mask, TILE)
    return quantized_attention_forward(
        codes, out, lse, lists, *sides, scale=scale, is_causal=is_causal, row=row
    )


def _backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    mask = call.mask
    grads = dq, dk, dv = call.empty_results()
    transposed = None if mask is None else Lists(*mask.transposed())
    tensors = {
        "q": call.q, "k": call.k, "v": call.v, "out": call.out, "lse": call.lse,
        "grad_out": call.grad_out, "grad_lse": call.grad_lse, "dq": dq, "dk": dk, "dv": dv,
    }  # fmt: skip
    options = ("backward", call.scale, call.is_causal)
    _run(mask, transposed, options, tensors, partial(_backward_launches, call, grads, transposed))
    return grads


def _backward_launches(
    call: BackwardCall, grads: tuple[Tensor, Tensor, Tensor], transposed: Lists | None
) -> list[Launch]:
    q, k, v, mask = call.q, call.k, call.v, call.mask
    return backward_launches(
        Saved(q, k, v, call.out, call.lse, call.grad_out, call.grad_lse), grads, mask, transposed,
        scale=call.scale, is_causal=call.is_causal,
        dq_row=chosen_row("dq", mask, q, k, v, call.grad_out),
        dkv_row=chosen_row("dkv", mask, q, k, v, call.grad_out),
    )  # fmt: skip


def backward_launches(
    saved: Saved,
    grads: tuple[Tensor, Tensor, Tensor],
    mask: BlockMask | None,
    transposed: Lists | None = None,
    *,
    scale: float,
    is_causal: bool,
    dq_row: LaunchRow,
    dkv_row: LaunchRow,
) -> list[Launch]:
    """The kernel launches of a backward pass, which fill ``grads`` = (dq, dk, dv).

    ``transposed``: the lists of the key blocks, if they are made already.
    """
    from ..kernels.attention_backward import attention_backward

    lists = None if mask is None else Lists(mask.kv_num_blocks, mask.kv_indices)
    if mask is not None and transposed is None:
        transposed = Lists(*mask.transposed())
    return attention_backward(
        saved, grads, lists, transposed, *_sides(saved.q.shape[2], saved.k.shape[2], mask),
        scale=scale, is_causal=is_causal, dq_row=dq_row, dkv_row=dkv_row,
    )  # fmt: skip


def _sides(
    q_len: int, kv_len: int, mask: BlockMask | None, dense_slot: int = 1
) -> tuple[Side, Side]:
    if mask is None:  # the kernels cut dense sequences as they like; codes have their tiles
        return Side(dense_slot, q_len), Side(dense_slot, kv_len)
    return (
        Side(mask.q_block_size, q_len, mask.q_block_lens),
        Side(mask.kv_block_size, kv_len, mask.kv_block_lens),
    )


def chosen_row(
    kernel: str, mask: BlockMask | None, *tensors: Tensor, arch: str | None = None
) -> LaunchRow:
    """Launch options of a kernel that reads the [B, H, S, D] ``tensors``; arch: default theirs."""
    if kernel in QUANTIZED_PRECISIONS:
        itemsize, vectors = 1, True  # the codes are ours
    else:
        itemsize, vectors = tensors[0].element_size(), reads_vectors(*tensors)
        if itemsize == 4:  # their parts come through registers, see launch_tables_nvidia
            vectors = vectors and len({padded(x.shape[3]) for x in tensors}) == 1
    return launch_row(
        arch or device_info(tensors[0].device).arch,
        kernel,
        max(x.shape[3] for x in tensors),
        itemsize,
        None if mask is None else min(mask.q_block_size, mask.kv_block_size),
        vectors=vectors,
    )


register(
    Backend(
        name="triton",
        priority=10,
        available=_available,
        supports=_supports,
        forward=_forward,
        backward=_backward,
        block_ops=BLOCK_OPS,
    )
)
