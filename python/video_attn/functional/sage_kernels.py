"""The functions of the ``sageattention`` package that name a kernel, with its own arguments.

Each computes what its name says, on whatever backend serves here: INT8 scores, and values in fp16
or FP8. An argument is honoured or refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..quantize import QuantizationOptions, recipe_text
from .sage import attend, first_served

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
    return attend(
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
    return attend(q, k, v, "sage_fp16", options, tensor_layout, is_causal, sm_scale, return_lse)


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
    given: dict[str, Any] = {
        "granularity": qk_quant_gran,
        "smooth_k": smooth_k,
        "smooth_v": smooth_v,
    }
    sums = {
        "fp32+fp16": QuantizationOptions(**given, pv_accumulation="fp32+fp16"),
        "fp32+fp32": QuantizationOptions(**given),
    }  # fmt: skip
    if pv_accum_dtype is None:
        recipes = tuple(recipe_text("sage_fp8", options) for options in sums.values())
        pv_accum_dtype = tuple(sums)[first_served(q, k, v, is_causal, recipes)]
    _check_choice("pv_accum_dtype", pv_accum_dtype, (*sums, "fp32"))
    options = sums["fp32+fp32" if pv_accum_dtype == "fp32" else pv_accum_dtype]
    return attend(q, k, v, "sage_fp8", options, tensor_layout, is_causal, sm_scale, return_lse)


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
    return attend(q, k, v, "sage_fp8", options, tensor_layout, is_causal, sm_scale, return_lse)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
