"""A kernel launch as data: the same description runs on a GPU or is compiled without one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TEMPORARY = "_video_attn_temporary"


class Side(NamedTuple):
    """One side of attention, queries or keys: ``length`` tokens in slots of ``slot`` tokens.

    ``lens`` int32 [B|1, slots] gives the valid tokens of each slot; None means all.
    """

    slot: int
    length: int
    lens: Tensor | None = None

    def tiles(self, rows: int) -> int:
        """Tiles of ``rows`` rows; a tile does not cross from one slot to the next."""
        return -(-self.length // self.slot) * -(-self.slot // rows)


class Lists(NamedTuple):
    """Ascending lists of slots: counts int32 [B|1, H|1, R], indices int32 [B|1, H|1, R, max]."""

    counts: Tensor
    indices: Tensor


class Saved(NamedTuple):
    """What a backward pass starts from: the forward pass, and the gradients of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Args:
        kernel: the ``triton.jit`` function. grid: number of programs, in one dimension.
        args: by name, constexprs too.
        options: ``num_warps``, ``num_stages`` and what the vendor's compiler takes besides.
    """

    kernel: Any
    grid: int
    args: Mapping[str, Any]
    options: Mapping[str, int]

    def keywords(self) -> dict[str, Any]:
        """All keywords of the launch."""
        # Said here because Triton's default changes between versions, and with it the rounding.
        return {**self.args, **self.options, "enable_fp_fusion": True}

    def run(self) -> Any:
        """Triton's compiled kernel; None in the interpreter, or if there was nothing to run."""
        if self.grid > 0:
            return self.kernel[(self.grid,)](**self.keywords())
        return None


def run_launches(launches: Iterable[Launch], device: torch.device) -> None:
    """Runs launches in order on the current stream of ``device``."""
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        for launch in launches:
            launch.run()


def temporary(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that one launch of a call writes before another reads it."""
    x = torch.empty(shape, dtype=dtype, device=device)
    setattr(x, _TEMPORARY, True)
    return x


def is_temporary(x: Tensor) -> bool:
    """Whether :func:`temporary` made this very tensor, and not a view of it."""
    return getattr(x, _TEMPORARY, False)


def padded(size: int) -> int:
    """The smallest power of two >= ``size`` that the matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def named_strides(name: str, x: Tensor | None, axes: str, unit: int = 1) -> dict[str, Any]:
    """Kernel arguments of a tensor: itself, and the strides of its first axes, each by its letter.

    A stride is 0 where the size is 1: that one serves every index. None gives strides 0. Strides
    count ``unit`` numbers.
    """
    args: dict[str, Any] = {name: x}
    for i, axis in enumerate(axes):
        stride = 0 if x is None or x.shape[i] == 1 else x.stride(i)
        args[f"stride_{name}_{axis}"] = stride // unit
    return args


def head_args(**tensors: Tensor) -> dict[str, Any]:
    """Kernel arguments of [B, H, S, D] tensors, and in how many numbers VEC they are counted."""
    vec = min(vector_length(x) for x in tensors.values())
    args: dict[str, Any] = {"VEC": vec}
    for name, x in tensors.items():
        args |= named_strides(name, x, "bhs", vec)
    return args


def vector_length(x: Tensor) -> int:
    """The largest vector of up to 16 bytes, in numbers, of which rows of ``x`` and gaps consist."""
    vec = 16 // x.element_size()
    sizes = [x.shape[3], *(x.stride(i) for i in range(3) if x.shape[i] > 1)]
    while any(size % vec for size in sizes):
        vec //= 2
    return vec


def reads_vectors(*tensors: Tensor) -> bool:
    """Whether Triton copies rows of all these to shared memory without registers in between.

    It does so with at least 4 bytes at a time, and trusts an address only if 16 divides it.
    """
    return all(x.data_ptr() % 16 == 0 and vector_length(x) * x.element_size() >= 4 for x in tensors)


def packed(*tensors: Tensor) -> bool:
    """Whether in all of [B, H, S, D] rows follow one another, with a head dim that is not padded.

    Kernels that walk over such rows know the stride when they are compiled: they keep one address
    instead of one for each row that a thread copies, which takes 10 % of a step's instructions.
    """
    return all(x.stride(2) == x.shape[3] == padded(x.shape[3]) for x in tensors)


def columns(size: int, padded_size: int, vec: int) -> int | None:
    """A head dim as kernels take it: in ``vec`` numbers; None where it fills its padded size."""
    return None if size == padded_size else size // vec


def lens_args(name: str, lens: Tensor | None) -> dict[str, Any]:
    """Kernel arguments of valid lengths, int32 [B|1, slots] or None."""
    if lens is not None and lens.stride(1) != 1:
        lens = lens.contiguous()
    return named_strides(name, lens, "b")


def side_args(name: str, side: Side) -> dict[str, Any]:
    """Kernel arguments of the side called ``name``, "q" or "kv"."""
    args = {f"{name}_len": side.length, f"{name.upper()}_SLOT": side.slot}
    return args | lens_args(f"{name}_lens", side.lens)


def dim_args(head_dim: int, head_dim_v: int, vec: int) -> dict[str, Any]:
    """Kernel arguments of head dims."""
    dim, dim_v = padded(head_dim), padded(head_dim_v)
    args: dict[str, Any] = {"BD": dim, "BDV": dim_v}
    return args | {"D": columns(head_dim, dim, vec), "DV": columns(head_dim_v, dim_v, vec)}


def problem_args(q: Tensor, k: Tensor, scale: float, is_causal: bool) -> dict[str, Any]:
    """Kernel arguments that forward, dq and dkv have in common."""
    args: dict[str, Any] = {}
    args |= {"G": q.shape[1] // k.shape[1], "IS_CAUSAL": is_causal}
    return args | {"scale": scale, "scale_log2": scale * math.log2(math.e)}


def wide_rows(rows: int, args: Mapping[str, Any]) -> bool:
    """Whether offsets inside a tile of ``rows`` rows of a [B, H, S, D] argument need 64 bits."""
    tensors = [x for x in args.values() if isinstance(x, Tensor) and x.dim() == 4]
    return any(abs(x.stride(2)) * rows + x.shape[3] >= 2**31 for x in tensors)
