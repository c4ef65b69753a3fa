"""INT8 and FP8 attention in C++ on the CPU: the recipes of quantize.py, for backend ``cpu``.

Codes are made and multiplied in one operator. INT8 codes are multiplied as INT8 on CPUs with
AVX-512 VNNI, else as fp32; FP8 codes, which no common CPU multiplies, as bf16 or fp32. Both hold
them exactly, so the results are the same everywhere but for the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_mask import mask_arguments
from ..calls import ForwardCall
from ..quantize import QuantizationOptions
from ..registry import Problem

_library = torch.library.Library("video_attn", "FRAGMENT")
_library.define(
    "cpu_quantized_forward(Tensor q, Tensor k, Tensor v, Tensor? kv_num_blocks, "
    "Tensor? kv_indices, Tensor? q_block_lens, Tensor? kv_block_lens, int q_block_size, "
    "int kv_block_size, float scale, bool is_causal, str precision, str granularity, "
    "bool smooth_k, bool smooth_q, bool hadamard, bool smooth_v, "
    "Tensor(a!) out, Tensor(b!) lse) -> ()"
)
# It returns nothing and changes its last arguments: there is nothing to allocate.
torch.library.register_fake("video_attn::cpu_quantized_forward", lambda *args: None, lib=_library)


def refuse(problem: Problem) -> str | None:
    """Why these kernels do not serve a quantized problem; None when they do."""
    options = problem.quantization or QuantizationOptions()
    if options.pv_accumulation != "fp32":
        return f"pv_accumulation {options.pv_accumulation!r} is not 'fp32': CPUs sum in fp32"
    return None


def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Attention in a quantized precision: (out, lse)."""
    out, lse = call.empty_results()
    mask, options = mask_arguments(call.mask), call.quantization or QuantizationOptions()
    torch.ops.video_attn.cpu_quantized_forward(
        call.q, call.k, call.v, *mask.lists, *mask.slots, call.scale, call.is_causal,
        call.precision, options.granularity, options.smooth_k, options.smooth_q, options.hadamard,
        options.smooth_v, out, lse,
    )  # fmt: skip
    return out, lse
