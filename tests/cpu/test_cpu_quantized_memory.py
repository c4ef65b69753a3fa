"""Quantized attention in C++: what it reads, where that lies, and calls that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cpu_quantized import OPTIONS, PRECISIONS, both, run
from far_memory import far_view
from quantized_cases import (
    check_same,
    normal,
    problem,
    qkv,
    random_mask,
    relative_error,
)
from torch import Tensor

from video_attn import attention
from video_attn.quantize import QuantizationOptions
from video_attn.quantized_reference import plan_tiles
from video_attn.registry import Problem, select

# -- what is read, and where it lies ---------------------------------------------------------------


@PRECISIONS
def test_what_lies_past_a_valid_length_is_not_read(precision):
    q, k, v, mask = problem("batch-lens")
    assert mask is not None
    lens = random_mask((64, 64), (192, 256), 2, lens=True, batch=2)
    plan = plan_tiles(lens, 192, 256, q.device)
    for options in (QuantizationOptions(), *OPTIONS[1:3]):
        chosen = {"precision": precision, "quantization": options}
        clean, expected = both(q, k, v, lens, **chosen)
        check_same(clean, expected)
        dirty = [x.clone() for x in (q, k, v)]
        for x, valid, poison in zip(
            dirty, (plan.q_valid, plan.kv_valid, plan.kv_valid), (math.nan, math.inf, math.nan),
            strict=True,
        ):  # fmt: skip
            x.masked_fill_(~valid[:, None, :, None], poison)
        for x, y in zip(run(*dirty, lens, **chosen), clean, strict=True):
            assert torch.equal(x, y)


@PRECISIONS
def test_heads_inside_a_fused_tensor(precision):
    """q, k, v as views of one tensor, head sizes that are not padded, NaN around them."""
    store = torch.full((2, 90, 3, 3, 48), math.nan)
    q, k, v = (store[:, :, n, 1:, :40].transpose(1, 2) for n in range(3))
    for n, x in enumerate((q, k, v)):
        x.copy_(normal(2, 2, 90, 40, seed=n))
    copies = [x.contiguous() for x in (q, k, v)]
    got = run(q, k, v, precision=precision)
    check_same(got, run(*copies, backend="reference", precision=precision))
    for x, copy in zip((q, k, v), copies, strict=True):
        assert torch.equal(x, copy), "the caller's tensors do not change"


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "head", "row"])
def test_offsets_past_2_31(far):
    """Inputs and outputs whose elements lie further apart than 32 bits can say."""
    size, dtype = (2, 2, 40, 16), torch.bfloat16
    near = [normal(*size, seed=n, dtype=dtype) for n in range(3)]
    out, lse = torch.empty(size, dtype=dtype), torch.empty(size[:3])
    options = ("sage_fp8", "per_warp", True, False, False, False)
    op = torch.ops.video_attn.cpu_quantized_forward
    lists: tuple = (None,) * 4 + (0, 0, 0.25, False)
    op(*near, *lists, *options, out, lse)
    check_same((out, lse), run(*near, scale=0.25, precision="sage_fp8", backend="reference"))
    for n in range(3):  # one far tensor at a time: each is 4 GiB of addresses
        inputs = list(near)
        inputs[n] = far_view(size, far, dtype).copy_(near[n])
        far_out = far_view(size, far, dtype) if n == 0 else torch.empty_like(out)
        far_lse = torch.empty_like(lse)
        op(*inputs, *lists, *options, far_out, far_lse)
        assert torch.equal(far_out, out) and torch.equal(far_lse, lse)


@PRECISIONS
def test_number_of_threads_changes_nothing(precision):
    q, k, v = qkv(heads=(4, 2), lengths=(200, 2100), dims=(32, 32))
    mask = random_mask((64, 64), (200, 2100), 4)
    options = QuantizationOptions(granularity="per_head", smooth_q=True, smooth_v=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(q, k, v, mask, precision=precision, quantization=options))
    finally:
        torch.set_num_threads(before)
    chosen = {"precision": precision, "quantization": options, "backend": "reference"}
    check_same(results[0], run(q, k, v, mask, **chosen))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


# -- the choice of the backend, refusals -----------------------------------------------------------


def test_cpu_is_chosen_and_the_reference_serves_what_it_refuses():
    asked: dict[str, Any] = {"precision": "sage_fp16", "quantization": QuantizationOptions()}
    question = Problem("forward", "cpu", "cpu", torch.bfloat16, 72, 200, 100, 8, **asked)
    assert select(question).name == "cpu"
    half_sums = QuantizationOptions(pv_accumulation="fp16+fp32")
    asked["quantization"] = half_sums
    question = Problem("forward", "cpu", "cpu", torch.bfloat16, 72, 200, 100, 8, **asked)
    assert select(question).name == "reference"
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=r"pv_accumulation 'fp16\+fp32' is not 'fp32'"):
        run(q, k, v, precision="sage_fp16", quantization=half_sums)
    with pytest.raises(RuntimeError, match="float64"):
        run(*(x.double() for x in (q, k, v)), precision="sage_fp16")


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (
            ValueError,
            "precision must be sage_fp16, sage_fp8 or fp8, got int4",
            {"precision": "int4"},
        ),
        (ValueError, "granularity must be", {"granularity": "per_row"}),
        (ValueError, "lse must be", {"lse": torch.empty(1, 2, 3)}),
        (ValueError, "must be given together", {"kv_num_blocks": torch.ones(1, 1, 1).int()}),
        (TypeError, "k must be", {"k": torch.empty(1, 2, 200, 64, dtype=torch.int8)}),
    ],
)
def test_direct_calls_are_checked(error, match, changed):
    q, k, v = qkv()
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": v, "kv_num_blocks": None, "kv_indices": None, "q_block_lens": None,
        "kv_block_lens": None, "q_block_size": 0, "kv_block_size": 0, "scale": 0.1,
        "is_causal": False, "precision": "fp8", "granularity": "per_warp", "smooth_k": True,
        "smooth_q": False, "hadamard": False, "smooth_v": False, "out": torch.empty_like(q),
        "lse": torch.empty(q.shape[:3]),
    }  # fmt: skip
    torch.ops.video_attn.cpu_quantized_forward(**arguments)
    with pytest.raises(error, match=match):
        torch.ops.video_attn.cpu_quantized_forward(**{**arguments, **changed})


@PRECISIONS
def test_fullgraph(precision):
    q, k, v, mask = problem("lists-64-gqa")

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, mask, precision=precision, backend="cpu")

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), model(q, k, v))
    reference = attention(q * 2, k, v, mask, precision=precision, backend="reference")
    assert relative_error(compiled(q, k, v), reference) < 6e-3
