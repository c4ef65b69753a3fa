"""The kernels of a benchmark: a named attention type on given inputs, whole and in its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attention import check_scale
from ...attention_types import ATTENTION_TYPES, TORCH_SDPA, AttentionType
from ...calls import ForwardCall
from ...device import device_info
from ...functional import named_attention
from ...quantize import QuantizationOptions
from .cases import Case

Run = Callable[[], object]


@dataclass(frozen=True)
class Kernel:
    """An attention type, ready to run on the inputs of one case.

    Args:
        name: the attention type. precision, backend: what it stands for here.
        run: all of it, from q, k, v to the output.
        quantize, attend: its two parts, None where one operator does both.
        tensors: what ``attend`` (or ``run``) reads and writes, with scales.
    """

    name: str
    precision: str
    backend: str
    run: Callable[[], Tensor]
    quantize: Run | None
    attend: Run | None
    tensors: Sequence[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)

    @property
    def is_quantized(self) -> bool:
        return self.precision != "native"


def prepare(name: str, case: Case, qkv: tuple[Tensor, Tensor, Tensor], smooth_k: bool) -> Kernel:
    """The kernel ``name`` on ``qkv``; it has run once, so that compilation is over.

    Raises:
        RuntimeError, ValueError: no backend can serve; the message says why for each.
    """
    row = _row(name, smooth_k)
    options: dict[str, Any] = {"scale": case.scale, "is_causal": case.is_causal}
    if row.quantization is not None:
        options["quantization"] = row.quantization

    def run() -> Tensor:
        out = named_attention(*qkv, name, **options)
        assert isinstance(out, Tensor)
        return out

    out = run()
    call = ForwardCall(
        *qkv, None, check_scale(case.scale, qkv[0].shape[3]), case.is_causal, row.precision,
        row.quantization,
    )  # fmt: skip
    backend = row.choose(call.problem)
    if row.precision == "native":
        tensors = [*qkv, out]
        if backend != TORCH_SDPA:
            tensors.append(call.empty_results()[1])
        return Kernel(name, row.precision, backend, run, None, run, tensors)
    parts = _PARTS.get(backend)
    if parts is None:
        return Kernel(name, row.precision, backend, run, None, None, [*qkv, out])
    split = parts(call)
    gap = (split.out - out).norm(dtype=torch.float32)
    if not gap <= 1e-3 * out.norm(dtype=torch.float32):  # NaN too
        raise RuntimeError(f"{name}: its parts on {backend} do not give what the whole gives")
    return Kernel(name, row.precision, backend, run, split.quantize, split.attend, split.tensors)


def _row(name: str, smooth_k: bool) -> AttentionType:
    row = ATTENTION_TYPES[name]
    if row.precision != "native":
        options = row.quantization or QuantizationOptions()
        row = replace(row, quantization=replace(options, smooth_k=smooth_k))
    return row


@dataclass(frozen=True)
class _Split:
    quantize: Run
    attend: Run
    tensors: Sequence[Tensor]
    out: Tensor


def _cuda_sage(call: ForwardCall) -> _Split:
    from ...backends import cuda_sage

    codes = cuda_sage.quantize(call)
    out, lse = cuda_sage.attend(call, codes)
    return _Split(
        partial(cuda_sage.quantize, call), partial(cuda_sage.attend, call, codes),
        [*(x for x in codes if x is not None), out, lse], out,
    )  # fmt: skip


def _triton(call: ForwardCall) -> _Split:
    from ...backends import triton
    from ...kernels.launch import run_launches
    from ...kernels.launch_tables import launch_row

    q, k, v = call.q, call.k, call.v
    arch = device_info(q.device).arch
    codes, launches = triton.quantize_launches(
        q, k, v, None, scale=call.scale, precision=call.precision,
        options=call.quantization or QuantizationOptions(),
    )  # fmt: skip
    out, lse = call.empty_results()
    attend = triton.quantized_launches(
        codes, out, lse, None, kv_len=k.shape[2], scale=call.scale, is_causal=call.is_causal,
        row=launch_row(arch, call.precision, max(q.shape[3], v.shape[3]), 1, None),
    )  # fmt: skip
    run_launches([*launches, *attend], q.device)
    tensors = [x for x in codes if isinstance(x, Tensor)]
    return _Split(
        partial(run_launches, launches, q.device), partial(run_launches, attend, q.device),
        [*tensors, out, lse], out,
    )  # fmt: skip


# Backends whose quantized attention is two steps; elsewhere one operator does both.
_PARTS: dict[str, Callable[[ForwardCall], _Split]] = {
    "cuda_sage": _cuda_sage,
    "triton": _triton,
}


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, so that what went wrong on it is known here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
