"""C++ on the CPU: really sparse, forward and backward, on ATen's matrix kernels. See csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..block_mask import mask_arguments
from ..calls import BackwardCall, ForwardCall
from ..registry import Backend, Problem, register
from . import cpu_quantized

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


def _forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    if call.quantization is not None:
        return cpu_quantized.forward(call)
    out, lse = call.empty_results()
    mask = mask_arguments(call.mask)
    torch.ops.video_attn.cpu_attention_forward(
        call.q, call.k, call.v, *mask.lists, *mask.slots, call.scale, call.is_causal, out, lse
    )
    return out, lse


def _backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    # `deterministic` asks for nothing more: the sums are always made in the same order.
    dq, dk, dv = call.empty_results()
    mask = mask_arguments(call.mask, transposed=True)
    torch.ops.video_attn.cpu_attention_backward(
        call.grad_out, call.grad_lse, call.q, call.k, call.v, call.out, call.lse,
        *mask.transposed_lists, *mask.slots, call.scale, call.is_causal, dq, dk, dv,
    )  # fmt: skip
    return dq, dk, dv


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
