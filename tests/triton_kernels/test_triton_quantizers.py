"""The Triton quantizers against their definition, quantize.py; in the interpreter without a GPU."""

from __future__ import annotations

import oracle
import pytest
import torch
from machine import ON_A_GPU_TOO
from quantized_cases import ERROR_BOUND, check, tokens_of
from torch import Tensor
from triton_codes import FP8, SCALE, inputs_of, plan_of, problem, qkv, quantized

from video_attn import attention
from video_attn.quantize import (
    GRANULARITIES,
    QUANTIZED_PRECISIONS,
    QuantizationOptions,
    quantize_inputs,
)

pytestmark = ON_A_GPU_TOO


def check_codes(got: Tensor, expected: Tensor) -> None:
    """Equal but for numbers between two codes, which a last bit of a scale or mean moves."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, expected = got.float(), expected.float()
    assert (got - expected).abs().max() <= expected.abs().max() / 8  # the step of the largest FP8
    assert (got != expected).sum() <= 3 + got.numel() // 10000


# Every granularity with every precision, and with every problem.
QUANTIZER_CASES = [
    (name, QUANTIZED_PRECISIONS[(i + j) % 3], granularity)
    for i, name in enumerate(("causal-more-queries", "lists-lens", "gather-lens"))
    for j, granularity in enumerate(GRANULARITIES)
]


@pytest.mark.parametrize(("name", "precision", "granularity"), QUANTIZER_CASES)
def test_quantizers(name, precision, granularity):
    mask, shape = problem(name)
    q, k, v = qkv(**shape)
    plan = plan_of(mask, shape["lengths"])
    options = {"granularity": granularity, "smooth_v": granularity in ("per_head", "per_block")}
    compare(q, k, v, mask, plan, precision, options)


@pytest.mark.parametrize(
    ("dim", "precision", "granularity"),
    [(16, "sage_fp8", "per_block"), (48, "sage_fp16", "per_warp"), (96, "fp8", "per_thread"),
     (128, "sage_fp8", "per_thread"), (256, "fp8", "per_warp")],
)  # fmt: skip
def test_rotated_queries_and_keys(dim, precision, granularity):
    mask, shape = problem("lists-lens")
    q, k, v = qkv(**{**shape, "dims": (dim, 16)})
    options = {"granularity": granularity, "hadamard": True}
    compare(q, k, v, mask, plan_of(mask, shape["lengths"]), precision, options)


@pytest.mark.parametrize(
    ("name", "precision", "changes"),
    [("causal-more-queries", "sage_fp8", {"granularity": "per_thread"}),
     ("lists-lens", "sage_fp16", {"hadamard": True, "granularity": "per_block"}),
     ("gather-lens", "fp8", {"smooth_k": False})],
)  # fmt: skip
def test_queries_without_the_mean_of_their_tile(name, precision, changes):
    """Whole, partial and empty tiles; what the mean leaves out of the scores."""
    mask, shape = problem(name)
    q, k, v = qkv(**{**shape, "dims": (32, 16)})
    options = {"smooth_q": True, **changes}
    compare(q + 1, k, v, mask, plan_of(mask, shape["lengths"]), precision, options)


def compare(q, k, v, mask, plan, precision, options):
    """Codes and scales by the kernels with those of the definition."""
    before = [x.clone() for x in (q, k, v)]
    codes = quantized(q, k, v, mask, precision, **options)
    for x, y in zip((q, k, v), before, strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))
    got = inputs_of(codes, plan, (q.shape[3], v.shape[3]))
    expected = quantize_inputs(
        q.cpu(), k.cpu(), v.cpu(), precision, QuantizationOptions(**options), scale=SCALE, fp8=FP8,
        q_tiling=plan.q_tiling, kv_tiling=plan.kv_tiling, q_valid=plan.q_valid,
        kv_valid=plan.kv_valid,
    )  # fmt: skip
    for field in ("q", "k", "v"):
        check_codes(getattr(got, field), getattr(expected, field))
    for field, group in (("q_scale", got.q_group), ("k_scale", got.k_group)):
        used = group.unique()
        a, b = getattr(got, field)[..., used], getattr(expected, field)[..., used]
        assert torch.allclose(a, b, rtol=1e-5, atol=0, equal_nan=True), field
    assert torch.allclose(got.v_scale, expected.v_scale, rtol=1e-5, atol=0, equal_nan=True)
    if got.v_mean is not None:
        assert torch.allclose(got.v_mean, expected.v_mean, atol=1e-6)
    if got.lse_shift is not None:
        assert torch.allclose(got.lse_shift, expected.lse_shift, atol=1e-5)
    assert (got.score_shift is not None) == options.get("smooth_q", False)
    if got.score_shift is not None:
        tiles = plan.q_tiling.tile_and_row(torch.device("cpu"))[0].unique()
        a, b = got.score_shift[:, :, tiles], expected.score_shift[:, :, tiles]
        assert torch.allclose(a, b, atol=1e-5)


def test_padded_dims_of_codes_are_zero():
    q, k, v = qkv((70, 70), dims=(24, 40))
    for precision in QUANTIZED_PRECISIONS:
        codes = quantized(q, k, v, None, precision)
        v_codes = codes.v if precision == "sage_fp16" else codes.v.mT[:, :, :70]
        assert codes.q.shape[3] == 32 and v_codes.shape[3] == 64
        for x, dim in ((codes.q, 24), (codes.k, 24), (v_codes, 40)):
            assert (x.float()[..., dim:] == 0).all()


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_zeros_have_scale_zero(precision):
    q, k, v = qkv((64, 128))
    q[:, :, :16] = 0.0
    k[:, :, 64:] = 0.0
    v[..., 3] = 1e-33
    codes = quantized(q, k, v, None, precision, smooth_k=False)
    assert (codes.q_scale[:, :, 0] == 0).all() and (codes.k_scale[:, :, 1] == 0).all()
    assert (codes.v_scale[..., 3] == 0).all()
    assert (codes.q[:, :, :16].float() == 0).all() and (codes.k[:, :, 64:].float() == 0).all()
    out = attention(q, k, v, precision=precision, backend="triton")
    assert out.isfinite().all() and (out[..., 3] == 0).all()
    exact, _ = oracle.attention_oracle(q.cpu(), k.cpu(), v.cpu(), tokens_of(None, q, k))
    check(precision, out.cpu(), exact, 1.5 * ERROR_BOUND[precision])


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_numbers_that_are_not_finite(precision):
    """A NaN or inf is the scale of its group or channel, whose codes are 0; others stay right."""
    mask, shape = problem("lists-lens")
    q, k, v = qkv(**shape)
    q[0, 0, 3, 5], q[0, 1, 40, 2] = float("nan"), float("inf")
    v[0, 0, 7, 4], v[0, 0, 9, 1] = float("-inf"), float("nan")
    options = {"granularity": "per_warp", "smooth_k": False}
    compare(q, k, v, mask, plan_of(mask, shape["lengths"]), precision, options)
