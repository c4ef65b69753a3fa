"""Compiled kernels for NVIDIA H100 and H200 (sm_90), forward and backward: see csrc/hopper.

Two components: ``sta`` serves blocks of at least 128 tokens and dense attention, ``vsa`` blocks of
64. Either works without the other.

The kernels move tensors with the tensor memory accelerator, which wants addresses and strides that
are multiples of 16 bytes, and no stride of 0. A q, k, v or gradient that is not so (a view of odd
offset, an expanded tensor) is copied once, whole; everything else is read in place.

Nothing about a mask is kept from one call to the next. What a launch derives from the lists (steps,
the order of rows) it derives on the GPU, again in every call: that costs microseconds, and a CUDA
graph may put other lists into the same memory, which no cache on the host would see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..block_mask import mask_arguments
from ..calls import BackwardCall, ForwardCall
from ..registry import Backend, Problem, register

MAX_HEAD_DIM = 128
FINE_BLOCK = 64  # the block size of component vsa; also what larger ones are a multiple of
SMALLEST_COARSE_BLOCK = 128
_ALIGNMENT = 16  # bytes
_STEP = _ALIGNMENT // 2  # the same in 16-bit values
_DTYPES = (torch.float16, torch.bfloat16)
_COMPONENTS = {"coarse": "sta", "fine": "vsa"}

_library = torch.library.Library("video_attn", "FRAGMENT")
_LISTS = "Tensor? kv_num_blocks, Tensor? kv_indices"
_LENS = "Tensor? q_block_lens, Tensor? kv_block_lens, int q_block_size, int kv_block_size"
# Results are arguments: they are allocated here, so that C++ only fills them.
for _grain in _COMPONENTS:
    _library.define(
        f"hopper_{_grain}_forward(Tensor q, Tensor k, Tensor v, {_LISTS}, {_LENS}, float scale, "
        "Tensor(a!) out, Tensor(b!) lse) -> ()"
    )
    _library.define(
        f"hopper_{_grain}_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
        f"Tensor v, Tensor out, Tensor lse, {_LISTS}, Tensor? q_num_blocks, Tensor? q_indices, "
        f"{_LENS}, float scale, bool deterministic, "
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()"
    )
    for _direction in ("forward", "backward"):
        # They return nothing and change their last arguments: there is nothing to allocate.
        torch.library.register_fake(
            f"video_attn::hopper_{_grain}_{_direction}", lambda *args: None, lib=_library
        )

_OPERATORS = {
    (grain, direction): getattr(torch.ops.video_attn, f"hopper_{grain}_{direction}").default
    for grain in _COMPONENTS
    for direction in ("forward", "backward")
}


def _available() -> str | None:
    reasons = [native.component(name).reason for name in _COMPONENTS.values()]
    return None if None in reasons else "; ".join(dict.fromkeys(map(str, reasons)))


def _built(problem: Problem) -> str | None:
    return native.component(_COMPONENTS[_grain_of(problem.kv_block_size)]).reason


def _grain_of(block_size: int | None) -> str:
    return "fine" if block_size == FINE_BLOCK else "coarse"


def _supports(problem: Problem) -> str | None:
    if problem.device_type != "cuda" or problem.arch != "sm_90":
        return f"device {problem.arch} is not sm_90 (H100, H200)"
    if problem.precision != "native":
        return f"precision {problem.precision!r} is not 'native'"
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype} is not float16 or bfloat16"
    if problem.is_causal:
        return "is_causal is not in these kernels"
    return _refuse_head_dims(problem) or _refuse_blocks(problem)


def _refuse_head_dims(problem: Problem) -> str | None:
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim {problem.head_dim} is more than {MAX_HEAD_DIM}"
    if problem.head_dim % 8:
        return f"head_dim {problem.head_dim} is not a multiple of 8"
    if problem.head_dim_v != problem.head_dim:
        return f"head_dim of v {problem.head_dim_v} is not head_dim {problem.head_dim}"
    return None


def _refuse_blocks(problem: Problem) -> str | None:
    sizes = {name: getattr(problem, name) for name in ("q_block_size", "kv_block_size")}
    if set(sizes.values()) in ({None}, {FINE_BLOCK}):
        return None
    for name, size in sizes.items():
        if size < SMALLEST_COARSE_BLOCK or size % FINE_BLOCK:
            return (
                f"{name} {size} is not a multiple of {FINE_BLOCK} from {SMALLEST_COARSE_BLOCK} on "
                f"(or both {FINE_BLOCK})"
            )
    return None


def _forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    out, lse = call.empty_results()
    mask = mask_arguments(call.mask)
    operator = _OPERATORS[_grain_of(mask.kv_block_size), "forward"]
    operator(
        aligned(call.q), aligned(call.k), aligned(call.v), *mask.lists, *mask.slots, call.scale,
        out, lse,
    )  # fmt: skip
    return out, lse


def _backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = call.empty_results()
    mask = mask_arguments(call.mask, transposed=True)
    grad_out, q, k, v, out = (aligned(x) for x in (call.grad_out, call.q, call.k, call.v, call.out))
    grad_lse = None if call.grad_lse is None else call.grad_lse.contiguous()
    operator = _OPERATORS[_grain_of(mask.kv_block_size), "backward"]
    operator(
        grad_out, grad_lse, q, k, v, out, call.lse.contiguous(), *mask.lists,
        *mask.transposed_lists, *mask.slots, call.scale, call.deterministic, dq, dk, dv,
    )  # fmt: skip
    return dq, dk, dv


def aligned(x: Tensor) -> Tensor:
    """``x`` [B, H, S, D] if the tensor memory accelerator can read it in place, else a copy."""
    batch, head, token, channel = x.stride()
    # The first test is quick and almost always enough; the second knows that nobody steps along a
    # dimension of size 1.
    fits = batch * head * token > 0 and (batch | head | token) % _STEP == 0
    if not fits:
        sizes = zip(x.shape, x.stride(), strict=True)
        fits = all(n == 1 or (s > 0 and s % _STEP == 0) for n, s in list(sizes)[:3])
    if fits and channel == 1 and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


register(
    Backend(
        name="hopper",
        priority=40,
        available=_available,
        supports=_supports,
        built=_built,
        forward=_forward,
        backward=_backward,
    )
)
