"""Problems for the Sage kernels, run by host emulation, and the check against the definition."""

from __future__ import annotations

from typing import Any

import sage_emulation
import torch
from sage_codes import inputs_of
from torch import Tensor

from video_attn import BlockMask
from video_attn.backends import cuda_sage
from video_attn.backends.cuda_sage import SageCodes
from video_attn.calls import ForwardCall
from video_attn.quantize import QuantizationOptions, QuantizedInputs
from video_attn.quantized_reference import TilePlan, attend, plan_tiles

GRANULARITIES = ("per_block", "per_warp", "per_thread")
SUMS = {"sage_fp16": "fp16+fp32", "sage_fp8": "fp32+fp16", "fp8": "fp32+fp16"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(
    lengths: tuple[int, int] = (100, 130),
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (64, 64),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(batch, heads[0], lengths[0], dims[0], seed=1)
    k = normal(batch, heads[1], lengths[1], dims[0], seed=2) + 2 * normal(dims[0], seed=4)
    v = normal(batch, heads[1], lengths[1], dims[1], seed=3) + normal(dims[1], seed=5)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None, **changes: Any) -> Any:
    """(out, lse) of the kernels."""
    return cuda_sage._forward(forward_call(q, k, v, mask, **changes))


def forward_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    options: QuantizationOptions | None = None,
    **changes: Any,
) -> ForwardCall:
    """A call in "sage_fp8" with the default scale and options, but for ``changes``."""
    fields = {"precision": "sage_fp8", "scale": q.shape[3] ** -0.5} | changes
    return ForwardCall(q, k, v, mask, quantization=options or QuantizationOptions(), **fields)


def make_codes(*tensors: Any, **changes: Any) -> SageCodes:
    """The codes of :func:`forward_call` by the kernels."""
    return cuda_sage.quantize(forward_call(*tensors, **changes))


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    precision: str,
    options: QuantizationOptions,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Kernel against ``attend`` on the kernel's own codes: the order of fp32 sums is all.

    The warpgroup kernel takes two tiles at a time, whose scores share one maximum.
    """
    scale = 0.7 * q.shape[3] ** -0.5
    codes = make_codes(q, k, v, mask, scale=scale, precision=precision, options=options)
    plan = plan_tiles(mask, q.shape[2], k.shape[2], q.device)
    inputs = inputs_of(codes, options, plan, (q.shape[3], v.shape[3]))
    by_warpgroups = sage_emulation.capability() == 90 and options.pv_accumulation == "fp32"
    expected, expected_lse = attend(
        inputs, plan._replace(lists=walked_tiles(plan)), options, precision=precision, scale=scale,
        is_causal=is_causal, tiles_per_step=2 if by_warpgroups else 1,
    )  # fmt: skip
    out, lse = run(
        q, k, v, mask, precision=precision, options=options, is_causal=is_causal, scale=scale
    )
    assert out.dtype == q.dtype and out.shape == expected.shape
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    blind = expected_lse.isneginf()
    assert (out[blind] == 0).all()
    seen = ~blind
    assert torch.allclose(lse[seen], expected_lse[seen], atol=1e-5, rtol=1e-6)
    # A weight next to a tie of its rounding may fall on the other side of it.
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[q.dtype]
    weights = 1e-4 if precision == "sage_fp16" else 2e-3
    assert relative_error(out, expected) <= rounding + weights
    median = (out.float() - expected).abs()[seen].median() / expected.abs().mean()
    assert median <= rounding + 1e-6
    return out, lse


def check_codes(got: QuantizedInputs, expected: QuantizedInputs) -> None:
    """Codes and scales of the quantizers against the definition's: another order of the mean's sum
    moves a few values over a tie.
    """
    for name in ("q_scale", "k_scale", "v_scale", "v_mean", "lse_shift", "score_shift"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is None:
            continue
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name
    for name in ("q", "k", "v"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert (a.float() != b.float()).float().mean() < 2e-3, name
        assert torch.allclose(a.float(), b.float(), rtol=1 / 7, atol=1.01), name


def walked_tiles(plan: TilePlan) -> Tensor:
    """The lists without the tiles that the kernels leave out: those with no valid key."""
    tokens = plan.kv_tiling.tokens(plan.lists.device)
    valid = (plan.kv_valid[:, tokens.clamp(min=0)] & (tokens >= 0)).any(-1)
    batches = max(len(valid), len(plan.lists))
    lists, valid = plan.lists.expand(batches, -1, -1, -1), valid.expand(batches, -1)
    batch = torch.arange(batches)[:, None, None, None]
    walked = (lists >= 0) & valid[batch, lists.clamp(min=0)]
    order = torch.argsort(walked.logical_not().byte(), dim=-1, stable=True)
    return torch.where(walked, lists, -1).gather(-1, order)


def random_mask(
    sizes: tuple[int, int],
    lengths: tuple[int, int],
    lens: bool = False,
    batch: int = 1,
    per_head: bool = False,
) -> BlockMask:
    """Random lists, the first row empty, a block of keys without a valid one."""
    generator = torch.Generator().manual_seed(sum(sizes) + sum(lengths))
    (q_size, kv_size), nq, nk = sizes, -(-lengths[0] // sizes[0]), -(-lengths[1] // sizes[1])
    keep = torch.rand(batch, 2 if per_head else 1, nq, nk, generator=generator) < 0.6
    keep[:, 0, 0] = False
    q_lens = kv_lens = None
    if lens:
        q_lens = torch.randint(0, q_size + 1, (batch, nq), generator=generator, dtype=torch.int32)
        kv_lens = torch.randint(1, kv_size + 1, (1, nk), generator=generator, dtype=torch.int32)
        kv_lens[:, nk // 2] = 0
    return BlockMask.from_dense(
        keep, q_size, kv_size, q_lens, kv_lens, q_len=lengths[0], kv_len=lengths[1]
    )
