"""The functions of the ``sageattention`` package that name a kernel, with its own arguments.

Each computes what its name says, on whatever backend serves here: INT8 scores, and values in fp16
or FP8. An argument is honoured or refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from ..attention import attention
from ..compiler import constant_result
from ..device import is_here
from ..quantize import QuantizationOptions, parse_recipe, recipe_text
from ..registry import Problem, forced_backend, why_not
from .sage import LAYOUTS, check_layout, padding_mask

_GRANULARITIES = ("per_warp", "per_thread")


def sageattn_qk_int8_pv_fp16_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 scores with a scale per block of 64 tokens, values in fp16, sums in fp32.

    Args:
        quantization_backend: "triton" or "cuda", which give the same codes here.
        q, k, v, tensor_layout, is_causal, attn_mask, sm_scale, smooth_k, return_lse: as in
            :func:`video_attn.sageattn`, and so are result and errors.
    """
    _check_choice("quantization_backend", quantization_backend, ("triton", "cuda"))
    options = QuantizationOptions(granularity="per_block", smooth_k=smooth_k)
    return _attend(
        q, k, v, "sage_fp16", options, tensor_layout, is_causal, sm_scale, return_lse, attn_mask
    )


def sageattn_qk_int8_pv_fp16_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 scores, values in fp16.

    Args:
        qk_quant_gran: "per_thread" or "per_warp", the tokens that share a scale.
        pv_accum_dtype: "fp32", or "fp16+fp32": sums of a tile in fp16. "fp16", sums of all keys in
            fp16, is refused: it overflows.
        smooth_v: subtract the mean of the values, and add it to the output.
        q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse: as in
            :func:`video_attn.sageattn`, and so are result and errors.
    """
    _check_choice("qk_quant_gran", qk_quant_gran, _GRANULARITIES)
    _check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp16+fp32"))
    options = QuantizationOptions(
        granularity=qk_quant_gran, smooth_k=smooth_k, smooth_v=smooth_v,
        pv_accumulation=pv_accum_dtype,
    )  # fmt: skip
    return _attend(q, k, v, "sage_fp16", options, tensor_layout, is_causal, sm_scale, return_lse)


def sageattn_qk_int8_pv_fp8_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str | None = None,
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 scores, values in FP8.

    Args:
        pv_accum_dtype: "fp32+fp16": sums of a tile in fp16. "fp32+fp32" or "fp32": in fp32. Default
            the first where a kernel serves it on the device of q, else the second.
        q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, smooth_k, smooth_v, return_lse:
            as in :func:`sageattn_qk_int8_pv_fp16_cuda`, and so are result and errors.
    """
    _check_choice("qk_quant_gran", qk_quant_gran, _GRANULARITIES)
    options = QuantizationOptions(granularity=qk_quant_gran, smooth_k=smooth_k, smooth_v=smooth_v)
    if pv_accum_dtype is None:
        pv_accum_dtype = _fastest_sums(q, v, is_causal, options)
    _check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32+fp16", "fp32+fp32", "fp32"))
    if pv_accum_dtype == "fp32+fp16":
        options = _with_fp16_sums(options)
    return _attend(q, k, v, "sage_fp8", options, tensor_layout, is_causal, sm_scale, return_lse)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 scores, values in FP8, sums in fp32.

    Args:
        pv_accum_dtype: only "fp32+fp32".
        q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, smooth_k, return_lse: as in
            :func:`sageattn_qk_int8_pv_fp16_cuda`, and so are result and errors.
    """
    _check_choice("qk_quant_gran", qk_quant_gran, _GRANULARITIES)
    _check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32+fp32",))
    options = QuantizationOptions(granularity=qk_quant_gran, smooth_k=smooth_k)
    return _attend(q, k, v, "sage_fp8", options, tensor_layout, is_causal, sm_scale, return_lse)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: str,
    options: QuantizationOptions,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    attn_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    check_layout(tensor_layout)
    mask = None
    if attn_mask is not None:
        mask = padding_mask(attn_mask, q, k, tensor_layout, is_causal)
    return attention(
        q, k, v, mask, precision=precision, scale=sm_scale, is_causal=is_causal,
        return_lse=return_lse, layout=LAYOUTS[tensor_layout], quantization=options,
    )  # type: ignore[call-overload]  # fmt: skip


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def _with_fp16_sums(options: QuantizationOptions) -> QuantizationOptions:
    return QuantizationOptions(
        granularity=options.granularity, smooth_k=options.smooth_k, smooth_v=options.smooth_v,
        pv_accumulation="fp32+fp16",
    )  # fmt: skip


def _fastest_sums(q: Tensor, v: Tensor, is_causal: bool, options: QuantizationOptions) -> str:
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if q.dim() != 4 or v.dim() != 4:
        return "fp32"  # attention() says what is wrong
    return _served_sums(
        q.device, q.dtype, index(q.shape[3]), index(v.shape[3]), bool(is_causal),
        recipe_text("sage_fp8", _with_fp16_sums(options)),
    )  # fmt: skip


@constant_result
def _served_sums(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    recipe: str,
) -> str:
    """Which sums a kernel, or the forced backend, has. Plain values in and out, so that compiled
    code keeps the answer.
    """
    if not is_here(device):
        return "fp32"
    precision, options = parse_recipe(recipe)
    problem = Problem.of(
        "forward", device, dtype, head_dim, head_dim_v, is_causal=is_causal, precision=precision,
        quantization=options,
    )  # fmt: skip
    serving = {x.backend for x in why_not(problem) if x.reason is None}
    forced = forced_backend()
    served = forced[0] in serving if forced else bool(serving - {"reference"})
    return "fp32+fp16" if served else "fp32"
