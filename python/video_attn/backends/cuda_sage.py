"""INT8 and FP8 attention by the CUDA kernels of component ``sage``: see csrc/sage.

Two operators: ``sage_quantize`` turns q, k, v into codes and scales, as quantize.py defines them;
``sage_attention`` attends over the codes, as quantized_reference.py defines it.

There are two attention kernels, and the component takes the one that fits the GPU and what it was
built for: on sm_90 with code for 90a the one of warpgroups, which takes two tiles of 64 keys at a
time; elsewhere, and for sums of P V in fp16, the one of ``mma.sync``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..block_mask import mask_arguments
from ..calls import ForwardCall, empty_like_heads
from ..quantize import TILE, QuantizationOptions, v_limit
from ..registry import Backend, Problem, register

MAX_HEAD_DIM = 128
_CHUNK_TILES = 8  # kChunkTiles of csrc/sage/statistics_kernel.h
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_Q_GROUPS = {"per_block": 1, "per_warp": 4, "per_thread": 32}  # scales per tile of 64 queries
_K_GROUPS = {"per_block": 1, "per_warp": 1, "per_thread": 4}

_library = torch.library.Library("video_attn", "FRAGMENT")
_LENS = "Tensor? q_block_lens, Tensor? kv_block_lens, int q_block_size, int kv_block_size"
# Results are arguments: they are allocated here, so that C++ only fills them.
_library.define(
    f"sage_quantize(Tensor q, Tensor k, Tensor v, Tensor? places, {_LENS}, "
    "float scale, float v_limit, "
    "bool hadamard, Tensor(a!) q_codes, Tensor(b!) k_codes, Tensor(c!) v_codes, "
    "Tensor(d!) q_scale, Tensor(e!) k_scale, Tensor(f!) v_scale, Tensor(g!)? v_mean, "
    "Tensor(h!)? lse_shift, Tensor(i!)? score_shift, Tensor(j!) workspace) -> ()"
)
_library.define(
    "sage_attention(Tensor q_codes, Tensor k_codes, Tensor v_codes, Tensor q_scale, "
    "Tensor k_scale, Tensor v_scale, Tensor? v_mean, Tensor? lse_shift, Tensor? score_shift, "
    f"Tensor? kv_num_blocks, Tensor? kv_indices, {_LENS}, int kv_len, float scale, "
    "bool is_causal, bool half_sums, Tensor? places, Tensor(a!) out, Tensor(b!) lse) -> ()"
)
for _name in ("sage_quantize", "sage_attention"):
    # They return nothing and change their last arguments: there is nothing to allocate.
    torch.library.register_fake(f"video_attn::{_name}", lambda *args: None, lib=_library)


class SageCodes(NamedTuple):
    """What ``sage_quantize`` makes; the layout of the codes stands in csrc/sage/tiles.h."""

    q: Tensor  # int8 or FP8 [B, Hq, query tiles, 64, padded dim]
    k: Tensor  # int8 or FP8 [B, Hkv, key tiles, 64, padded dim]
    v: Tensor  # fp16 [B, Hkv, key tiles, 64, padded dim] or FP8 [B, Hkv, key tiles, padded dim, 64]
    q_scale: Tensor  # fp32 [B, Hq, query tiles, groups]
    k_scale: Tensor  # fp32 [B, Hkv, key tiles, groups]
    v_scale: Tensor  # fp32 [B, Hkv, padded dim]
    v_mean: Tensor | None  # fp32 [B, Hkv, padded dim], smooth_v
    lse_shift: Tensor | None  # fp32 [B, Hq, Sq], smooth_k
    score_shift: Tensor | None  # fp32 [B, Hq, query tiles, key tiles * 64], smooth_q


def allocate_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: str,
    options: QuantizationOptions,
    places: Tensor | None = None,
) -> SageCodes:
    """Room for the codes and scales of q, k, v, whose tokens come in the order of ``places``."""
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, head_dim_v) = q.shape, v.shape
    if places is not None:
        q_len = kv_len = places.shape[0]
    dim = 64 if max(head_dim, head_dim_v) <= 64 else MAX_HEAD_DIM
    q_tiles, kv_tiles = -(-q_len // TILE), -(-kv_len // TILE)
    qk_dtype = torch.float8_e4m3fn if precision == "fp8" else torch.int8
    v_is_half = precision == "sage_fp16"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        # With strides it takes half the time of torch.empty, and a call needs nine of these.
        return q.new_empty_strided(shape, _strides(shape), dtype=dtype)

    return SageCodes(
        q=empty(batch, heads, q_tiles, TILE, dim, dtype=qk_dtype),
        k=empty(batch, kv_heads, kv_tiles, TILE, dim, dtype=qk_dtype),
        v=empty(
            *(batch, kv_heads, kv_tiles),
            *((TILE, dim) if v_is_half else (dim, TILE)),
            dtype=torch.float16 if v_is_half else torch.float8_e4m3fn,
        ),
        q_scale=empty(batch, heads, q_tiles, _Q_GROUPS[options.granularity]),
        k_scale=empty(batch, kv_heads, kv_tiles, _K_GROUPS[options.granularity]),
        v_scale=empty(batch, kv_heads, dim),
        v_mean=empty(batch, kv_heads, dim) if options.smooth_v else None,
        lse_shift=empty(batch, heads, q_len) if options.smooth_k else None,
        score_shift=empty(batch, heads, q_tiles, kv_tiles * TILE) if options.smooth_q else None,
    )


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def quantize(call: ForwardCall, places: Tensor | None = None) -> SageCodes:
    """Codes and scales of the call's q, k, v [B, H, S, D]; the mask gives the valid lengths.

    Args:
        places: int32 [tokens of the mask], where its tokens lie in q, k and v, -1 for padding; None
            where they are in its order.
    """
    options = call.quantization or QuantizationOptions()
    codes = allocate_codes(call.q, call.k, call.v, call.precision, options, places)
    workspace = call.q.new_empty_strided((_workspace_floats(codes),), (1,), dtype=torch.float32)
    limit = v_limit(call.precision, options.pv_accumulation, torch.float8_e4m3fn)
    slots = mask_arguments(call.mask).slots
    torch.ops.video_attn.sage_quantize(
        call.q, call.k, call.v, places, *slots, call.scale, limit, options.hadamard, *codes,
        workspace,
    )  # fmt: skip
    return codes


def _workspace_floats(codes: SageCodes) -> int:
    """As csrc/sage/statistics_kernel.h has it: of channels, and with smooth_q means of tiles."""
    batch, kv_heads, kv_tiles, _, dim = codes.k.shape
    floats = batch * kv_heads * dim * (8 * -(-kv_tiles // _CHUNK_TILES) + 2)
    if codes.score_shift is not None:
        floats += batch * codes.q.shape[1] * codes.q.shape[2] * dim
    return floats


def _available() -> str | None:
    return native.component("sage").reason


def _supports(problem: Problem) -> str | None:
    if problem.precision == "native":
        return "precision 'native' is not a quantized one"
    if problem.device_type != "cuda" or not problem.arch.startswith("sm_"):
        return f"device {problem.arch} is not an NVIDIA GPU"
    return (
        _refuse_arch(problem)
        or _refuse_shapes(problem)
        or _refuse_options(problem.quantization or QuantizationOptions())
    )


def _refuse_arch(problem: Problem) -> str | None:
    needed = _needed_architecture(problem.precision)
    if int(problem.arch[3:]) < needed:
        return f"{problem.arch} is older than sm_{needed}, which {problem.precision!r} needs"
    return None


def _needed_architecture(precision: str) -> int:
    return 80 if precision == "sage_fp16" else 89  # FP8 products exist from 8.9 on


def _built(problem: Problem) -> str | None:
    component = native.component("sage")
    if not component.loaded:
        return component.reason
    return refuse_build(component.record["architectures"], problem.arch, problem.precision)


def refuse_build(architectures: Iterable[str], arch: str, precision: str) -> str | None:
    """Why a library built for ``architectures`` cannot serve ``precision`` on ``arch``, or None.

    Code for "89" comes with PTX, from which the driver makes code for every newer GPU; code for
    "90a" runs on sm_90 alone, code for "120f" on its family.
    """
    device, needed = int(arch[3:]), _needed_architecture(precision)
    architectures = list(architectures)
    for built in architectures:
        number, kind = int(built.rstrip("af")), built.lstrip("0123456789")
        runs = {
            "": device >= number,
            "a": device == number,
            "f": device >= number and device // 10 == number // 10,
        }[kind]
        if runs and number >= needed:
            return None
    return (
        f"component sage was built for {', '.join(architectures)}, of which nothing runs "
        f"{precision!r} on {arch}; add {'80' if needed == 80 else '89'} to VIDEO_ATTN_CUDA_ARCHS "
        "and rebuild"
    )


def _refuse_shapes(problem: Problem) -> str | None:
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype} is not float16, bfloat16 or float32"
    for name in ("head_dim", "head_dim_v"):
        if getattr(problem, name) > MAX_HEAD_DIM:
            return (
                f"{name} {getattr(problem, name)} is more than {MAX_HEAD_DIM}; backends triton and "
                "reference take up to 256"
            )
    for name in ("q_block_size", "kv_block_size"):
        size = getattr(problem, name)
        if size is not None and size % TILE:
            return f"{name} {size} is not a multiple of {TILE}"
    return None


def _refuse_options(options: QuantizationOptions) -> str | None:
    if options.granularity not in _Q_GROUPS:
        return f"granularity {options.granularity!r} is not one of {', '.join(_Q_GROUPS)}"
    return None


def attend(
    call: ForwardCall, codes: SageCodes, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the codes of :func:`quantize`: (out [B, Hq, Sq, Dv], lse [B, Hq, Sq]).

    With ``places``, out is in the order of q, and lse in that of the mask.
    """
    batch, heads, tokens, _ = call.q.shape
    kv_len = call.k.shape[2]
    if places is not None:
        tokens = kv_len = places.shape[0]
    out = empty_like_heads(call.q, call.v.shape[3])
    lse = out.new_empty_strided(
        (batch, heads, tokens), (heads * tokens, tokens, 1), dtype=torch.float32
    )
    mask = mask_arguments(call.mask)
    half_sums = call.quantization is not None and call.quantization.pv_accumulation != "fp32"
    torch.ops.video_attn.sage_attention(
        *codes, *mask.lists, *mask.slots, kv_len, call.scale, call.is_causal, half_sums, places,
        out, lse,
    )  # fmt: skip
    return out, lse


def _forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    return attend(call, quantize(call))


def _forward_in_order(call: ForwardCall, places: Tensor) -> Tensor:
    return attend(call, quantize(call, places), places)[0]


register(
    Backend(
        name="cuda_sage",
        priority=30,
        available=_available,
        supports=_supports,
        built=_built,
        forward=_forward,
        forward_in_order=_forward_in_order,
    )
)
