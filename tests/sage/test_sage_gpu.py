"""The Sage kernels on a GPU: every recipe against the definition, streams, graphs, far memory.

On other machines everything here is skipped; the emulation runs the same source there.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from far_memory import far_view
from fp8_sums import lse_bounds
from machine import HAS_GPU
from sage_codes import inputs_of
from sage_problems import (
    SUMS,
    check_codes,
    make_codes,
    qkv,
    random_mask,
    relative_error,
    walked_tiles,
)
from torch import Tensor

from video_attn import BlockMask, VideoLayout, attention, native, sliding_tile
from video_attn.backends import cuda_sage
from video_attn.backends.cuda_sage import SageCodes
from video_attn.device import device_info
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.quantize import (
    QUANTIZED_PRECISIONS,
    QuantizationOptions,
    QuantizedInputs,
    quantize_inputs,
)
from video_attn.quantized_reference import attend, plan_tiles
from video_attn.registry import Problem


def missing() -> str | None:
    """Why these tests cannot run here, or None."""
    if not HAS_GPU:
        return "needs a GPU: torch.cuda.is_available() is False"
    question = Problem("forward", "cuda", device_info("cuda").arch, torch.float16, 64, 64,
                       precision="fp8")  # fmt: skip
    return cuda_sage._supports(question) or cuda_sage._built(question)


def has_warpgroups() -> bool:
    """Whether the warpgroup kernel serves. A build for "90" has mma.sync alone, which so runs on an
    H100 as it does on an Ampere or Ada card."""
    built = native.component("sage").record.get("architectures", [])
    return HAS_GPU and device_info("cuda").arch == "sm_90" and "90a" in built


HAS_WARPGROUPS = has_warpgroups()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

LISTS = {
    "64": ((64, 64), (200, 300), {}),
    "64-batch-heads-lens": ((64, 64), (700, 900), {"lens": True, "batch": 2, "per_head": True}),
    "128-64-lens": ((128, 64), (256, 200), {"lens": True}),
    "384-lens": ((384, 384), (1000, 1500), {"lens": True}),
}


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None, **rest: Any) -> Any:
    return attention(q, k, v, mask, backend="cuda_sage", return_lse=True, **rest)


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None, *, precision: str,
    options: QuantizationOptions, is_causal: bool = False,
) -> None:  # fmt: skip
    """The kernel against ``attend``, on the CPU, on the codes that the GPU made.

    Sums of INT8 products are exact. What tensor cores leave out of sums of FP8 products stands in
    ``fp8_sums.py``; of P V that is less than 2^-11 of the result.
    """
    scale = q.shape[3] ** -0.5
    on_gpu = [x.cuda() for x in (q, k, v)]
    gpu_mask = None if mask is None else mask.to("cuda")
    codes = make_codes(*on_gpu, gpu_mask, scale=scale, precision=precision, options=options)
    out, lse = (
        x.cpu()
        for x in run(
            *on_gpu, gpu_mask, precision=precision, quantization=options, is_causal=is_causal
        )
    )
    plan = plan_tiles(mask, q.shape[2], k.shape[2], q.device)
    on_cpu = SageCodes(*(None if x is None else x.cpu() for x in codes))
    by_warpgroups = HAS_WARPGROUPS and options.pv_accumulation == "fp32"
    inputs = inputs_of(on_cpu, options, plan, (q.shape[3], v.shape[3]))
    expected, expected_lse = attend(
        inputs,
        plan._replace(lists=walked_tiles(plan)), options, precision=precision, scale=scale,
        is_causal=is_causal, tiles_per_step=2 if by_warpgroups else 1,
    )  # fmt: skip
    blind = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind) and (out[blind] == 0).all()
    check_lse(lse, expected_lse, inputs, scale if precision == "fp8" else None)
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[q.dtype]
    sums = 2e-4 if precision == "sage_fp16" and options.pv_accumulation == "fp32" else 2.0**-9
    assert relative_error(out, expected) <= rounding + sums


def check_lse(
    lse: Tensor, expected: Tensor, inputs: QuantizedInputs, fp8_scale: float | None
) -> None:
    """Rounding of fp32, and for scores from FP8 codes what their sums leave out."""
    seen = ~expected.isneginf()
    error = torch.where(seen, lse - expected, 0.0).abs()
    rounding = 1e-5 + 1e-6 * torch.where(seen, expected, 0.0).abs()
    if fp8_scale is None:
        assert (error <= rounding).all()
        return
    group = inputs.q.shape[1] // inputs.k.shape[1]
    for b, h in itertools.product(*map(range, inputs.q.shape[:2])):
        most, typical = lse_bounds(
            inputs.q[b, h], inputs.k[b, h // group], inputs.q_scale[b, h, inputs.q_group],
            inputs.k_scale[b, h // group, inputs.k_group], fp8_scale,
        )  # fmt: skip
        assert (error[b, h] <= most + rounding[b, h]).all()
        assert error[b, h].square().mean().sqrt() <= typical.square().mean().sqrt() + 1e-5


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((128, 128), torch.bfloat16), ((64, 40), torch.float16), ((40, 72), torch.float32),
     ((100, 33), torch.bfloat16)],
)  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"hadamard": True, "smooth_q": True}])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_codes_are_those_of_the_definition(precision, dims, dtype, changes):
    """Several chunks of statistics, whole and partial tiles, key blocks without a valid key."""
    if changes and dims[0] % 16:
        pytest.skip("hadamard needs a head_dim that is a multiple of 16")
    q, k, v = qkv((300, 1200), (4, 2), dims, 2, dtype)
    mask = random_mask((64, 64), (300, 1200), lens=True, batch=2)
    options = QuantizationOptions(granularity="per_thread", smooth_v=True, **changes)
    plan = plan_tiles(mask, 300, 1200, q.device)
    codes = make_codes(
        *(x.cuda() for x in (q, k, v)), mask.to("cuda"), scale=0.2, precision=precision,
        options=options,
    )  # fmt: skip
    on_cpu = SageCodes(*(None if x is None else x.cpu() for x in codes))
    expected = quantize_inputs(
        q, k, v, precision, options, scale=0.2, q_tiling=plan.q_tiling, kv_tiling=plan.kv_tiling,
        q_valid=plan.q_valid, kv_valid=plan.kv_valid,
    )  # fmt: skip
    check_codes(inputs_of(on_cpu, options, plan, dims), expected)


@pytest.mark.parametrize("sums", ["fp32", "fp16"])
@pytest.mark.parametrize("granularity", ["per_block", "per_warp", "per_thread"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 72)])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_every_variant(precision, dims, granularity, sums):
    options = QuantizationOptions(
        granularity=granularity, smooth_v=True,
        pv_accumulation="fp32" if sums == "fp32" else SUMS[precision],
    )  # fmt: skip
    check(*qkv((200, 333), (4, 2), dims), precision=precision, options=options)


@pytest.mark.parametrize("changes", [{}, {"hadamard": True, "smooth_k": False}])
@pytest.mark.parametrize("sums", ["fp32", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_shifted_scores(precision, dim, sums, changes):
    """smooth_q: whole and causal tiles, and lists of one and of several query tiles to a block."""
    options = QuantizationOptions(
        smooth_q=True, pv_accumulation="fp32" if sums == "fp32" else SUMS[precision], **changes
    )
    check(*qkv((200, 333), (4, 2), (dim, dim)), precision=precision, options=options)
    causal = qkv((130, 900), (2, 1), (dim, dim))
    check(*causal, precision=precision, options=options, is_causal=True)
    for name in ("64-batch-heads-lens", "384-lens"):
        sizes, lengths, rest = LISTS[name]
        tensors = qkv(lengths, (2, 1), (dim, dim), rest.get("batch", 1), torch.bfloat16)
        check(*tensors, random_mask(sizes, lengths, **rest), precision=precision, options=options)


@pytest.mark.parametrize("lengths", [(1, 1), (65, 63), (64, 65), (1, 64), (300, 12), (257, 1000)])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_short_and_odd_sequences(precision, lengths):
    check(*qkv(lengths), precision=precision, options=QuantizationOptions())


@pytest.mark.parametrize("lengths", [(130, 130), (70, 200), (200, 70), (64, 129), (500, 900)])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_causal(precision, lengths):
    check(*qkv(lengths), precision=precision, options=QuantizationOptions(), is_causal=True)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_block_lists(precision, name):
    sizes, lengths, rest = LISTS[name]
    tensors = qkv(lengths, (2, 1), (128, 128), rest.get("batch", 1), torch.bfloat16)
    mask = random_mask(sizes, lengths, **rest)
    check(*tensors, mask, precision=precision, options=QuantizationOptions())


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(("text", "first"), [(0, False), (300, False), (70, True)])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_raster_order_is_read_and_written_in_place(precision, text, first, layout, gpu):
    """Partial tiles, text, and not a bit that differs from tokens that were moved."""
    video = VideoLayout((7, 18, 20), (6, 8, 8), text, first)
    lengths = (video.sequence_length,) * 2
    q, k, v = (x.to(gpu, torch.bfloat16) for x in qkv(lengths, (4, 2), (128, 64), 2))
    mask = sliding_tile_mask(video, ((1, 3, 1),), text_length=text // 2 or None, device=gpu)
    moved, _ = run(*(video.to_tiles(x) for x in (q, k, v)), mask, precision=precision)
    expected = video.from_tiles(moved)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = sliding_tile(
        q, k, v, video.grid, (1, 3, 1), text_length=text // 2 or None, text_first=first,
        layout=layout, precision=precision, backend="cuda_sage",
    )  # fmt: skip
    assert torch.equal(out if layout == "bhsd" else out.transpose(1, 2), expected)


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_a_thousand_times_the_same_bits(precision, gpu):
    tensors = [x.to(gpu, torch.bfloat16) for x in qkv((512, 2048), (4, 2), (128, 128))]
    first, first_lse = run(*tensors, precision=precision)
    different = torch.zeros((), dtype=torch.int64, device=gpu)
    for _ in range(1000):
        out, lse = run(*tensors, precision=precision)
        different += (out != first).sum() + (lse != first_lse).sum()
    assert int(different) == 0


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_the_current_stream_is_used(precision, gpu):
    """Work on another stream waits for what was queued there, not for the default stream."""
    q, k, v = (x.to(gpu, torch.bfloat16) for x in qkv((512, 512), (2, 2), (64, 64)))
    expected, _ = run(q, k, v, precision=precision)
    late, stream = torch.zeros_like(q), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out, _ = run(late, k, v, precision=precision)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_a_graph_replays_with_new_data_and_new_lists(precision, gpu):
    q, k, v = (x.to(gpu, torch.bfloat16) for x in qkv((256, 512), (2, 2), (128, 128)))
    mask, other = (
        BlockMask.from_indices(x.int().to(gpu), 64, 64, q_len=256, kv_len=512)
        for x in (torch.arange(3).expand(1, 1, 4, 3), torch.arange(4, 7).expand(1, 1, 4, 3))
    )
    run(q, k, v, mask, precision=precision)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(q, k, v, mask, precision=precision)
    mask.kv_indices.copy_(other.kv_indices)
    q.mul_(0.5)
    graph.replay()
    expected, expected_lse = run(q, k, v, other, precision=precision)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("far", [1, 2])
def test_offsets_beyond_32_bits(far, gpu):
    tensors = [far_view((1, 3, 70, 64), far, torch.float16) for _ in range(3)]
    on_gpu = [_far_copy(x, gpu) for x in tensors]
    expected, expected_lse = run(*(x.contiguous() for x in on_gpu), precision="sage_fp8")
    out, lse = run(*on_gpu, precision="sage_fp8")
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def _far_copy(x: Tensor, device: torch.device) -> Tensor:
    storage = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    view = torch.empty(storage, dtype=x.dtype, device=device).as_strided(x.shape, x.stride())
    return view.copy_(x)


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nonsense_in_shows_in_the_output(precision, name, gpu):
    tensors = dict(zip("qkv", (x.to(gpu) for x in qkv(heads=(2, 2))), strict=True))
    tensors[name][0, 0, 5, 7] = math.nan
    out, _ = run(**tensors, precision=precision)
    assert not out[0, 0, 5].isfinite().all() and out[0, 1].isfinite().all()
