"""What the compile matrix compiles: cases, the launch of each, and which cases there are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from video_attn import BlockMask
from video_attn.backends.triton import (
    backward_launches,
    chosen_row,
    forward_launches,
    quantize_launches,
    quantized_launches,
)
from video_attn.kernels.launch import Launch, Saved, Side
from video_attn.kernels.launch_tables import (
    CODE_KERNELS,
    GRAINS,
    HEAD_DIMS,
    ITEMSIZES,
    KERNELS,
    SHARED_MEMORY,
    LaunchRow,
    launch_row,
    unsupported_precision,
)
from video_attn.quantize import QuantizationOptions, fp8_dtype

LENGTH, HEADS = 6400, 24
DTYPES = {1: torch.bfloat16, 2: torch.bfloat16, 4: torch.float32}  # of q, k, v
VARIANTS = ("steps", "lens", "gather", "dense", "causal", "odd", "offset")
CODE_VARIANTS = (
    *VARIANTS[:-1],
    "per_thread",
    "fp16_sums",
    "smooth_q",
)  # the last three are "lens" with an option
POOL_KERNELS = (
    *("block_mean", "block_mean_backward", "select_top_k", "step_lists"),
    *("block_means", "block_scores", "add_coarse"),
)
QUANTIZERS = ("channel_statistics", "quantize_tokens", "quantize_channels", "score_shift")


class Case(NamedTuple):
    """One compile.

    Args:
        kernel: one of the attention kernels (the forward kernel over codes by its precision),
            "prepare", or one of ``POOL_KERNELS`` or ``QUANTIZERS``.
        itemsize: bytes of a number; 1 for codes.
        variant: of the mask: "steps" (slots that are steps), "lens" (with valid lengths), "gather"
            (slots of 100 tokens), "dense", "causal"; "odd" is "lens" with a padded head
            dim; "offset" too, but the tensors are not read in vectors, and the head dim of v is 16.
            For codes also "per_thread", the scales with most groups, "fp16_sums" and "smooth_q".
    """

    arch: str
    kernel: str
    itemsize: int = 2
    head_dim: int = 128
    grain: int = 64
    variant: str = "lens"


def case_launch(case: Case, row: LaunchRow | None = None) -> Launch:
    """The launch of a case, as the backend makes it."""
    if case.kernel in POOL_KERNELS:
        return _pool_launch(case)
    if case.kernel in QUANTIZERS:
        return _quantizer_launch(case)
    slot = None if case.variant in ("dense", "causal") else case.grain
    slot = 100 if case.variant == "gather" else slot
    head_dim = case.head_dim - (8 if case.variant == "odd" else 0)
    q = _meta(1, HEADS, LENGTH, head_dim, dtype=DTYPES[case.itemsize])
    out, lse = torch.empty_like(q), _meta(1, HEADS, LENGTH)
    with_lens = case.variant not in ("steps", "gather")
    mask = None if slot is None else _mask(slot, with_lens)
    options: dict[str, Any] = {"scale": 0.1, "is_causal": case.variant == "causal"}
    if case.kernel in CODE_KERNELS:
        row = row or launch_row(case.arch, case.kernel, case.head_dim, 1, case.grain)
        codes, _ = _quantized(case, q, mask)
        launches = quantized_launches(codes, out, lse, mask, kv_len=LENGTH, row=row, **options)
        return attention_launch(launches, "forward")
    v = q
    if case.variant == "offset":
        q, v = (_offset(1, HEADS, LENGTH, x, dtype=q.dtype) for x in (head_dim, 16))
        out = torch.empty_like(v)
    rows = {name: chosen_row(name, mask, q, v, arch=case.arch) for name in KERNELS}
    if row is not None:
        rows[case.kernel] = row
    if case.kernel == "forward":
        launches = forward_launches(q, q, v, out, lse, mask, row=rows["forward"], **options)
    else:
        saved = Saved(q, q, v, out, lse, out, lse)
        options |= {"dq_row": rows["dq"], "dkv_row": rows["dkv"]}
        launches = backward_launches(saved, (q, q, v), mask, **options)
    return attention_launch(launches, case.kernel)


def attention_launch(launches: Sequence[Launch], kernel: str) -> Launch:
    """The launch of an attention kernel, without what must run before it."""
    name = "attention_fwd_kernel" if kernel == "forward" else f"attention_bwd_kernel_{kernel}"
    return next(x for x in launches if x.kernel.__name__ == name)


def _quantized(case: Case, q: Tensor, mask: BlockMask | None) -> tuple[Any, list[Launch]]:
    """Codes of q as all three of q, k, v, and the launches of the quantizers."""
    precision = case.kernel if case.kernel in CODE_KERNELS else "sage_fp16"
    if case.kernel in QUANTIZERS and unsupported_precision(case.arch, "fp8") is None:
        precision = "fp8"
    options = QuantizationOptions(
        granularity="per_thread" if case.variant == "per_thread" else "per_warp",
        pv_accumulation="fp16+fp32" if case.variant == "fp16_sums" else "fp32",
        smooth_v=case.variant == "odd",
        smooth_q=case.variant == "smooth_q" or case.kernel == "score_shift",
    )
    fp8 = fp8_dtype(case.arch)
    return quantize_launches(
        q, q, q, mask, scale=0.1, precision=precision, options=options, fp8=fp8
    )


def _quantizer_launch(case: Case) -> Launch:
    q = _meta(1, HEADS, LENGTH, case.head_dim, dtype=DTYPES[case.itemsize])
    _, launches = _quantized(case, q, _mask(case.grain, True))
    return next(x for x in launches if x.kernel.__name__ == f"{case.kernel}_kernel")


def _pool_launch(case: Case) -> Launch:
    from video_attn.kernels import block_pool, block_rank, step_lists

    x = _meta(1, HEADS, LENGTH, case.head_dim, dtype=DTYPES[case.itemsize])
    side = Side(case.grain, LENGTH, _meta(1, LENGTH // case.grain, dtype=torch.int32))
    mean = x[:, :, : LENGTH // case.grain]
    if case.kernel == "block_mean":
        return block_pool.block_mean(x, mean, side)
    if case.kernel == "block_mean_backward":
        return block_pool.block_mean_backward(mean, x, side)
    if case.kernel == "block_means":
        return block_rank.block_means((x, x, x), (mean, mean, mean), side, side)
    if case.kernel == "block_scores":
        scores = _meta(*mean.shape[:3], mean.shape[2])
        amd = case.arch.startswith("gfx")
        return block_rank.block_scores((mean, mean, mean), scores, mean, side.lens, 0.1, amd=amd)
    if case.kernel == "add_coarse":
        return block_rank.add_coarse(x, mean, x, side)
    if case.kernel == "select_top_k":
        scores = _meta(1, HEADS, 10, LENGTH, dtype=x.dtype)
        lens = _meta(1, LENGTH, dtype=torch.int32)
        return block_pool.select_top_k(scores, _meta(1, HEADS, 10, 76), 76, lens)
    mask = _mask(case.grain, True)
    args = (mask.kv_num_blocks, mask.kv_indices, side, case.grain // 2)
    return step_lists.split_slots(*args)[1]


def _mask(slot: int, with_lens: bool) -> BlockMask:
    blocks = LENGTH // slot
    lens = _meta(1, blocks, dtype=torch.int32) if with_lens else None
    lists = _meta(1, HEADS, blocks, blocks, dtype=torch.int32)
    return BlockMask.from_indices(
        lists, slot, slot, q_len=LENGTH, kv_len=LENGTH, q_block_lens=lens, kv_block_lens=lens
    )


def _offset(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor at an address that 16 does not divide."""
    return _meta(math.prod(shape) + 8, dtype=dtype)[3:-5].view(shape)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# -- which cases ----------------------------------------------------------------------------------


def full_matrix() -> Iterator[Case]:
    """Every row on every chip; rows for 16-bit numbers and head dim 128 in every variant."""
    for arch in SHARED_MEMORY:
        yield from _small_kernels(arch)
        for kernel, itemsize, head_dim, grain in product(KERNELS, ITEMSIZES, HEAD_DIMS, GRAINS):
            for variant in VARIANTS if (itemsize, head_dim) == (2, 128) else ("lens",):
                if grain == GRAINS[0] and variant in ("dense", "causal", "gather"):
                    continue  # no mask, and slots of 100, are the other grain's
                yield Case(arch, kernel, itemsize, head_dim, grain, variant)
        for kernel in code_kernels(arch):
            for head_dim, grain in product(HEAD_DIMS, GRAINS):
                for variant in CODE_VARIANTS if head_dim == 128 else ("lens",):
                    if grain == GRAINS[0] and variant in ("dense", "causal", "gather"):
                        continue
                    if variant != "fp16_sums" or has_fp16_sums(arch, kernel):
                        yield Case(arch, kernel, 1, head_dim, grain, variant)


def code_kernels(arch: str) -> list[str]:
    """The quantized precisions that a chip has."""
    return [x for x in CODE_KERNELS if unsupported_precision(arch, x) is None]


def has_fp16_sums(arch: str, kernel: str) -> bool:
    """Whether a chip sums the products of a quantized precision in fp16."""
    return kernel == "sage_fp16" and arch.startswith("sm_")


def cover() -> Iterator[Case]:
    """The part of it that is compiled for every change: minutes instead of an hour.

    Every kernel on every chip: head dims 64, 128, 128 and slots fine, coarse take turns from kernel
    to kernel and from chip to chip, so that each kernel has every kind of row somewhere. All rows
    up to head dim 128 on sm_90, where they are tuned most. Head dim 256, which no video model has,
    and fp32: the forward pass. Variants: on sm_90 and gfx942.
    """
    for number, arch in enumerate(SHARED_MEMORY):
        yield from _small_kernels(arch)
        for turn, kernel in enumerate((*KERNELS, *code_kernels(arch)), start=number):
            itemsize = 1 if kernel in CODE_KERNELS else 2
            if arch == "sm_90":
                yield from _rows(arch, kernel, itemsize)
            else:
                head_dim = HEAD_DIMS[min(turn % 3, 1)]
                yield Case(arch, kernel, itemsize, head_dim, GRAINS[turn % 2])
        kind = (GRAINS[1], "dense") if number % 2 else (GRAINS[0], "lens")
        yield Case(arch, "forward", 2, HEAD_DIMS[-1], *kind)
    for arch in ("sm_90", "gfx942"):
        yield Case(arch, "forward", 4, 64, GRAINS[0])
        yield Case(arch, "sage_fp8", 1, 128, GRAINS[1], "gather")
        for variant in ("gather", "causal", "offset"):
            for kernel in KERNELS:
                yield Case(arch, kernel, 2, 128, GRAINS[1], variant)
        for variant in ("steps", "odd"):
            yield Case(arch, "forward", 2, 128, GRAINS[1], variant)
    for variant in ("causal", "per_thread", "smooth_q"):
        yield Case("sm_90", "sage_fp8", 1, 128, GRAINS[1], variant)
    yield Case("sm_80", "sage_fp16", 1, 128, GRAINS[1], "fp16_sums")
    yield Case("sm_90", "sage_fp16", 1, 128, GRAINS[1], "fp16_sums")


def _rows(arch: str, kernel: str, itemsize: int) -> Iterator[Case]:
    """Every row of a kernel up to head dim 128, once."""
    for head_dim in HEAD_DIMS[:-1]:
        fine, coarse = (launch_row(arch, kernel, head_dim, itemsize, x) for x in GRAINS)
        yield Case(arch, kernel, itemsize, head_dim, GRAINS[0])
        if coarse != fine:
            yield Case(arch, kernel, itemsize, head_dim, GRAINS[1])


def _small_kernels(arch: str) -> Iterator[Case]:
    for kernel in ("prepare", *POOL_KERNELS, *QUANTIZERS):
        yield Case(arch, kernel)
