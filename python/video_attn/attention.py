"""attention(q, k, v, mask): the one way into the kernels. Validates, then calls the operator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypedDict, overload

import torch
from torch import Tensor

from .block_mask import BlockMask
from .calls import ForwardCall
from .checks import broadcasts, check_bool, check_positive_number
from .derivatives import attend, attend_as_seen
from .quantize import QuantizationOptions, check_recipe, with_straight_through
from .registry import PRECISIONS, check_backend_name, context_backend
from .seen_calls import recall, remember, signature_of

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Options(TypedDict, total=False):
    """The options of :func:`attention` that the functions over patterns hand on to it."""

    scale: float | None
    precision: str
    backend: str | None
    deterministic: bool
    quantization: QuantizationOptions | None
    straight_through: bool


OPTION_NAMES = (
    "scale", "precision", "backend", "deterministic", "quantization", "straight_through",
)  # fmt: skip


def check_options(function: str, options: Mapping[str, object]) -> None:
    """
    Raises:
        TypeError: ``options`` of ``function`` has a name that is not in ``Options``.
    """
    for name in options:
        if name not in OPTION_NAMES:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = ..., *, precision: str = ...,
    scale: float | None = ..., is_causal: bool = ..., return_lse: Literal[False] = ...,
    layout: str = ..., backend: str | None = ..., deterministic: bool = ...,
    quantization: QuantizationOptions | None = ..., straight_through: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = ..., *, precision: str = ...,
    scale: float | None = ..., is_causal: bool = ..., return_lse: Literal[True],
    layout: str = ..., backend: str | None = ..., deterministic: bool = ...,
    quantization: QuantizationOptions | None = ..., straight_through: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    precision: str = "native",
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    layout: str = "bhsd",
    backend: str | None = None,
    deterministic: bool = False,
    quantization: QuantizationOptions | None = None,
    straight_through: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that ``mask`` keeps: softmax(scale * q k^T) v.

    Args:
        q: [B, Hq, Sq, D]; fp16, bf16 or fp32 (fp64 on the reference backend). D <= 256, any value.
        k: [B, Hkv, Sk, D]. v: [B, Hkv, Sk, Dv]. Hq must be a multiple of Hkv (GQA): query head h
            reads key head h // (Hq // Hkv). All three are read in place through their strides; the
            last stride must be 1.
        mask: which key blocks each query block sees; None for dense attention.
        precision: "native" (the dtype of q, k, v, fp32 accumulation), or a quantized kernel:
            "sage_fp16" (INT8 QK, fp16 PV), "sage_fp8" (INT8 QK, FP8 PV), "fp8".
        scale: of the scores, a positive number; default 1/sqrt(D).
        is_causal: dense only; query i sees keys up to i + Sk - Sq (aligned at the bottom right).
        return_lse: also return the log-sum-exp of the scaled scores.
        layout: "bhsd", or "bshd" for tensors (and output) [B, S, H, D].
        backend: a name from ``video-attn info`` to force it; default the best that can serve.
        deterministic: bitwise repeatable gradients, also asked for by
            ``torch.use_deterministic_algorithms``. The forward pass always is.
        quantization: the options of a quantized precision (granularity, smoothing, accumulation);
            None for the defaults of ``QuantizationOptions``.
        straight_through: with a quantized precision, for fine-tuning: the forward pass is
            quantized; the backward pass is that of "native" over the unquantized q, k, v, in their
            dtype, with the quantized out and lse, on ``backend`` where that has a backward pass,
            else on the best. False: such a call refuses to be differentiated.

    Returns:
        out [B, Hq, Sq, Dv] in the dtype of q, in q's memory order; with ``return_lse`` also lse,
        fp32 [B, Hq, Sq], natural logarithm. A query row that sees no key, or lies past its block's
        valid length: output 0, lse -inf, gradients 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend, or not the one asked for, can serve; the message says why for
            each.
    """
    check_bool("return_lse", return_lse)
    options = (
        precision, scale, is_causal, layout, backend, deterministic, quantization, straight_through
    )  # fmt: skip
    signature = None
    if not torch.compiler.is_compiling():
        signature = signature_of(q, k, v, mask, options)
    seen = recall(signature)
    if seen is None:
        call = checked_call(
            q, k, v, mask, precision=precision, scale=scale, is_causal=is_causal, layout=layout,
            backend=backend, deterministic=deterministic, quantization=quantization,
            straight_through=straight_through,
        )  # fmt: skip
    else:
        if layout == "bshd":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        call = ForwardCall(q, k, v, mask, seen.scale, is_causal, precision, seen.quantization)
    if backend is None and not torch.compiler.is_compiling():
        # For the backward pass too, which may come after the context and on another thread.
        backend = context_backend()
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if seen is None:
        out, lse = attend(call, deterministic, backend)
        remember(signature, call, backend)
    else:
        out, lse = attend_as_seen(call, seen.forward, deterministic, backend)
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    *,
    precision: str = "native",
    scale: float | None = None,
    is_causal: bool = False,
    layout: str = "bhsd",
    backend: str | None = None,
    deterministic: bool = False,
    quantization: QuantizationOptions | None = None,
    straight_through: bool = False,
) -> ForwardCall:
    """What the arguments of :func:`attention` ask for; raises as it does."""
    q, k, v = as_bhsd(layout, q=q, k=k, v=v)
    check_shapes(q, k, v)
    _check_options(precision, is_causal, backend, deterministic)
    _check_quantization(precision, quantization, straight_through, q.shape[3])
    scale = check_scale(scale, q.shape[3])
    if mask is not None:
        _check_mask(q, k, mask, is_causal)
    if precision != "native" and quantization is None:
        quantization = QuantizationOptions()
    if straight_through:
        quantization = with_straight_through(quantization)
    return ForwardCall(q, k, v, mask, scale, is_causal, precision, quantization)


def as_bhsd(layout: str, **tensors: Tensor) -> list[Tensor]:
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', got {layout!r}")
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            letters = "[B, H, S, D]" if layout == "bhsd" else "[B, S, H, D]"
            raise ValueError(f"{name} must be {letters}, got shape {tuple(x.shape)}")
    if layout == "bshd":
        return [x.transpose(1, 2) for x in tensors.values()]
    return list(tensors.values())


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtype, device = q.dtype, q.device
    if dtype not in _DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {dtype}")
    batch, q_heads, _, head_dim = q.shape
    (_, heads, tokens, k_dim), (_, v_heads, v_tokens, v_dim) = k.shape, v.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of q, {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on the device of q, {device}, got {x.device}")
        if x.shape[0] != batch:
            raise ValueError(f"{name} must have the batch size of q, {batch}, got {x.shape[0]}")
    if k_dim != head_dim:
        raise ValueError(f"k must have the head_dim of q, {head_dim}, got {k_dim}")
    for name, expected, got in (("heads", heads, v_heads), ("tokens", tokens, v_tokens)):
        if got != expected:
            raise ValueError(f"v must have as many {name} as k, {expected}, got {got}")
    for name, size in (("q", head_dim), ("v", v_dim)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name} must be 1 to {MAX_HEAD_DIM}, got {size}")
    if heads == 0 or q_heads % heads:
        raise ValueError(
            f"q must have a multiple of k's heads (GQA): q has {q_heads}, k has {heads}"
        )
    for name, x, size in (("q", q, head_dim), ("k", k, k_dim), ("v", v, v_dim)):
        if x.stride(3) != 1 and size > 1:
            raise ValueError(
                f"{name} must have stride 1 on its last dimension, got strides "
                f"{tuple(x.stride())}; pass {name}.contiguous()"
            )


def _check_options(
    precision: str, is_causal: bool, backend: str | None, deterministic: bool
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    check_bool("is_causal", is_causal)
    check_bool("deterministic", deterministic)
    if backend is not None:
        check_backend_name(backend)


def _check_quantization(
    precision: str,
    quantization: QuantizationOptions | None,
    straight_through: bool,
    head_dim: int,
) -> None:
    if quantization is not None and not isinstance(quantization, QuantizationOptions):
        raise TypeError(
            f"quantization must be a QuantizationOptions or None, got {type(quantization).__name__}"
        )
    if precision != "native":
        check_recipe(precision, quantization or QuantizationOptions(), head_dim)
    elif quantization is not None:
        raise ValueError("quantization is for quantized precisions: it must be None with 'native'")
    check_straight_through(precision, straight_through)


def check_straight_through(precision: str, straight_through: bool) -> None:
    check_bool("straight_through", straight_through)
    if straight_through and precision == "native":
        raise ValueError(
            "straight_through is for quantized precisions: it must be False with 'native', whose "
            "gradients are exact"
        )


def check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return float(check_positive_number("scale", scale, wanted="a number or None"))


def _check_mask(q: Tensor, k: Tensor, mask: BlockMask, is_causal: bool) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"mask must be a video_attn.BlockMask or None, got {type(mask).__name__}; make one "
            "with BlockMask.from_dense, BlockMask.from_flex or a pattern"
        )
    if is_causal:
        raise ValueError("is_causal is for dense attention: it must be False with a mask")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, but q is on {q.device}; use mask.to(q.device)")
    for name, expected, got in (
        ("q_len", q.shape[2], mask.q_len),
        ("kv_len", k.shape[2], mask.kv_len),
    ):
        if got != expected:
            raise ValueError(f"mask has {name} {got}, but the tensors have {expected} tokens")
    for name, x in (
        ("kv_num_blocks", mask.kv_num_blocks),
        ("q_block_lens", mask.q_block_lens),
        ("kv_block_lens", mask.kv_block_lens),
    ):
        if x is not None and not broadcasts(x.shape[0], q.shape[0]):
            raise ValueError(f"mask.{name} has batch {x.shape[0]}; allowed: 1 or {q.shape[0]}")
    if not broadcasts(mask.kv_num_blocks.shape[1], q.shape[1]):
        raise ValueError(
            f"mask has {mask.kv_num_blocks.shape[1]} heads; allowed: 1 or {q.shape[1]}"
        )
