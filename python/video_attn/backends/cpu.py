"""C++ on the CPU: really sparse, forward and backward, on ATen's matrix kernels. See csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..block_mask import BlockMask
from ..quantize import QuantizationOptions
from ..registry import Backend, Problem, register
from . import cpu_quantized
from .outputs import empty_like_heads, empty_lse

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Outputs are arguments: they are allocated here, where the fakes' rules are.
_library = torch.library.Library("video_attn", "FRAGMENT")
_LENS = "Tensor? q_block_lens, Tensor? kv_block_lens, int q_block_size, int kv_block_size"
_library.define(
    "cpu_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? kv_num_blocks, "
    f"Tensor? kv_indices, {_LENS}, float scale, bool is_causal, "
    "Tensor(a!) out, Tensor(b!) lse) -> ()"
)
_library.define(
    "cpu_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor lse, Tensor? q_num_blocks, Tensor? q_indices, "
    f"{_LENS}, float scale, bool is_causal, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()"
)
_library.define("cpu_description() -> str")


def description() -> str:
    """The CPU capability in use and how each dtype is multiplied, in one line.

    Raises:
        RuntimeError: the component is not here.
    """
    reason = _available()
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.video_attn.cpu_description()


def _available() -> str | None:
    return native.component("cpu").reason


def _supports(problem: Problem) -> str | None:
    if problem.device_type != "cpu":
        return f"device {problem.device_type} is not cpu"
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype} is not float32, bfloat16 or float16"
    if problem.precision == "native":
        return None
    if problem.direction == "backward":
        return f"precision {problem.precision!r} has no backward pass"
    return cpu_quantized.refuse(problem)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    *,
    scale: float,
    is_causal: bool,
    precision: str,
    quantization: QuantizationOptions | None = None,
) -> tuple[Tensor, Tensor]:
    if quantization is not None:
        return cpu_quantized.forward(
            q, k, v, mask,
            scale=scale, is_causal=is_causal, precision=precision, quantization=quantization,
        )  # fmt: skip
    out, lse = empty_like_heads(q, v.shape[3]), empty_lse(q)
    lists = (None, None) if mask is None else (mask.kv_num_blocks, mask.kv_indices)
    torch.ops.video_attn.cpu_attention_forward(
        q, k, v, *lists, *_lens(mask), scale, is_causal, out, lse
    )
    return out, lse


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
    # `deterministic` asks for nothing more: the sums are always made in the same order.
    dq, dk, dv = (empty_like_heads(x, x.shape[3]) for x in (q, k, v))
    lists = (None, None) if mask is None else mask.transposed()
    torch.ops.video_attn.cpu_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *lists, *_lens(mask), scale, is_causal, dq, dk, dv
    )
    return dq, dk, dv


def _lens(mask: BlockMask | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Block lengths and block sizes, as the operators take them."""
    if mask is None:
        return None, None, 0, 0
    return mask.q_block_lens, mask.kv_block_lens, mask.q_block_size, mask.kv_block_size


register(
    Backend(
        name="cpu",
        priority=10,
        available=_available,
        supports=_supports,
        forward=_forward,
        backward=_backward,
    )
)
