"""Attention by the name of an implementation: "sagev1", "fav3_fp8", ..."""

from __future__ import annotations

from dataclasses import replace
from operator import index

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import as_bhsd, attention, check_scale, check_shapes
from ..attention_types import TORCH_SDPA, AttentionType, resolve_attention_type
from ..block_mask import BlockMask
from ..checks import check_bool
from ..compiler import constant_result
from ..device import is_here
from ..quantize import QuantizationOptions, parse_recipe, recipe_text
from ..registry import Problem


def named_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_type: str,
    mask: BlockMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    layout: str = "bhsd",
    quantization: QuantizationOptions | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by one of the names in ``video_attn.attention_types.ATTENTION_TYPES``.

    Args:
        q, k, v, mask, scale, is_causal, layout: as in :func:`video_attn.attention`.
        attention_type: "sdpa", "sagev1", "fav2", "fav3", "fav3_fp8" or "fav3_sage". It names a
            precision, its options, and the order in which backends are tried; ``video-attn info``
            shows which one runs here, and why not those before it.
        return_lse: also return the log-sum-exp; not with "sdpa".
        quantization: options in place of the type's own; quantized types only.

    Returns:
        as :func:`video_attn.attention`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend of the type can serve; the message says why for each.
    """
    row = resolve_attention_type(attention_type)
    if quantization is not None:
        if row.precision == "native":
            raise ValueError(
                f"quantization must be None with attention_type {row.name!r}, which is not "
                "quantized"
            )
        if not isinstance(quantization, QuantizationOptions):
            raise TypeError(
                "quantization must be a QuantizationOptions or None, got "
                f"{type(quantization).__name__}"
            )
        row = replace(row, quantization=quantization)
    if row.backends == (TORCH_SDPA,):
        return _torch_sdpa(q, k, v, mask, scale, is_causal, return_lse, layout)
    heads = as_bhsd(layout, q=q, k=k, v=v)
    check_shapes(*heads)
    backend = _choose(
        row.name, recipe_text(row.precision, row.quantization), q.device, q.dtype,
        index(heads[0].shape[3]), index(heads[2].shape[3]),
        (mask.q_block_size, mask.kv_block_size) if isinstance(mask, BlockMask) else None,
        is_causal,
    )  # fmt: skip
    return attention(
        q, k, v, mask, precision=row.precision, scale=scale, is_causal=is_causal,
        return_lse=return_lse, layout=layout, backend=backend, quantization=row.quantization,
    )  # type: ignore[call-overload]  # fmt: skip


@constant_result
def _choose(
    name: str,
    recipe: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    block_sizes: tuple[int, int] | None,
    is_causal: bool,
) -> str | None:
    """The backend of a call; None where only shapes are asked for. It takes and gives plain values,
    so that compiled code keeps it.
    """
    if not is_here(device):
        return None
    row: AttentionType = replace(resolve_attention_type(name), quantization=parse_recipe(recipe)[1])
    q_block_size, kv_block_size = block_sizes or (None, None)
    problem = Problem.of(
        "forward", device, dtype, head_dim, head_dim_v, q_block_size, kv_block_size, is_causal
    )
    return row.choose(problem)


def _torch_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float | None,
    is_causal: bool,
    return_lse: bool,
    layout: str,
) -> Tensor:
    if mask is not None:
        raise ValueError("mask must be None with attention_type 'sdpa': torch's attention is dense")
    if return_lse:
        raise ValueError("return_lse must be False with attention_type 'sdpa': torch keeps it")
    check_bool("is_causal", is_causal)
    q, k, v = as_bhsd(layout, q=q, k=k, v=v)
    check_shapes(q, k, v)
    scale = check_scale(scale, q.shape[3])
    q_len, kv_len = q.shape[2], k.shape[2]
    # torch aligns is_causal at the top left, attention() at the bottom right.
    bias = None
    if is_causal and q_len != kv_len:
        from torch.nn.attention.bias import causal_lower_right  # it imports Triton

        bias = causal_lower_right(q_len, kv_len)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=is_causal and bias is None, scale=scale,
        enable_gqa=index(q.shape[1]) != index(k.shape[1]),
    )  # fmt: skip
    return out.transpose(1, 2) if layout == "bshd" else out
