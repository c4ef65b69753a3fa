"""Attention in quantized precisions against exact attention: every precision on every mask."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from quantized_cases import (
    ERROR_BOUND,
    MASKS,
    check,
    normal,
    problem,
    qkv,
    random_mask,
    relative_error,
    tokens_of,
)
from torch import Tensor

from video_attn import attention
from video_attn.quantize import (
    GRANULARITIES,
    QUANTIZED_PRECISIONS,
    QuantizationOptions,
    quantize_inputs,
)
from video_attn.quantized_reference import attend, plan_tiles, quantized_attention_reference

# -- attention against exact attention ----------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_error_on_normal_data(precision, dim, granularity):
    q, k, v = qkv(lengths=(320, 512), dims=(dim, dim))
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    options = QuantizationOptions(granularity=granularity)
    out, lse = quantized_attention_reference(q, k, v, precision=precision, options=options)
    check(precision, out, exact)
    assert (lse - exact_lse).abs().max() < 0.06
    for wrong in (torch.zeros_like(out), -out, out.roll(1, 2), out * 1.1):
        with pytest.raises(AssertionError):
            check(precision, wrong, exact)


@pytest.mark.parametrize("accumulation", ["fp16+fp32", "fp32+fp16"])
def test_error_with_fp16_sums(accumulation):
    for precision in ["sage_fp16"] if accumulation == "fp16+fp32" else ["sage_fp8", "fp8"]:
        q, k, v = qkv(lengths=(130, 512))
        exact, _ = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
        options = QuantizationOptions(pv_accumulation=accumulation)
        out, _ = quantized_attention_reference(q, k, v, precision=precision, options=options)
        check(precision, out, exact)
        plain, _ = quantized_attention_reference(q, k, v, precision=precision)
        assert not torch.equal(out, plain)


def test_smoothing_repairs_biased_keys_and_nothing_else_does():
    q, k, v = qkv(lengths=(256, 1024), dims=(128, 128))
    k[..., :8] += 12.0 * torch.tensor([1.0, -1.0] * 4)
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    errors = {}
    for smooth_k in (True, False):
        options = QuantizationOptions(smooth_k=smooth_k)
        out, lse = quantized_attention_reference(q, k, v, precision="sage_fp16", options=options)
        errors[smooth_k] = relative_error(out, exact)
        assert (lse - exact_lse).abs().max() < (0.02 if smooth_k else 0.2)
    assert errors[True] <= 0.02
    assert errors[False] > 2 * errors[True]


def test_lse_is_corrected_exactly_for_the_mean():
    # Every key the same: K minus its mean is 0, all that is left of the scores is the correction.
    q, _, v = qkv(lengths=(70, 90))
    k = normal(1, 2, 1, 64, seed=4).expand(-1, -1, 90, -1) * 3
    _, exact = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    _, lse = quantized_attention_reference(q, k, v, precision="sage_fp8")
    assert torch.allclose(lse.double(), exact, atol=1e-4)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_every_mask_in_every_precision(precision, name):
    q, k, v, mask = problem(name)
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(mask, q, k))
    out, lse = attention(q, k, v, mask, precision=precision, return_lse=True, backend="reference")
    # A row that sees few keys averages few rounding errors: half as much again is allowed.
    check(precision, out, exact, 1.5 * ERROR_BOUND[precision])
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    seen = exact_lse.isfinite()
    assert (lse[seen] - exact_lse[seen]).abs().max() < 0.15


@pytest.mark.parametrize("lengths", [(100, 100), (70, 200), (200, 70), (65, 64)])
def test_causal_is_aligned_at_the_bottom_right(lengths):
    q, k, v = qkv(lengths=lengths)
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k, True))
    out, lse = attention(
        q, k, v, precision="sage_fp16", is_causal=True, return_lse=True, backend="reference"
    )
    check("sage_fp16", out, exact)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_what_lies_past_a_valid_length_is_not_read(precision):
    q, k, v = qkv(lengths=(256, 256))
    mask = random_mask((64, 64), (256, 256), 2, lens=True)
    clean, clean_lse = quantized_attention_reference(q, k, v, mask, precision=precision)
    plan = plan_tiles(mask, 256, 256, q.device)
    q, k, v = q.clone(), k.clone(), v.clone()
    q[:, :, ~plan.q_valid[0]] = math.nan
    k[:, :, ~plan.kv_valid[0]] = math.inf
    v[:, :, ~plan.kv_valid[0]] = math.nan
    options = QuantizationOptions(smooth_q=True, smooth_v=True)
    for chosen in (None, options):
        out, lse = quantized_attention_reference(q, k, v, mask, precision=precision, options=chosen)
        assert out.isfinite().all()
        if chosen is None:
            assert torch.equal(out, clean) and torch.equal(lse, clean_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_dtypes_and_memory_order_of_the_output(precision, dtype):
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv(dtype=dtype))
    out, lse = attention(
        q, k, v, precision=precision, layout="bshd", return_lse=True, backend="reference"
    )
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    exact, _ = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    check(precision, out.transpose(1, 2), exact)


@pytest.mark.parametrize("accumulation", ["fp32", "fp16+fp32"])
def test_values_beyond_fp16_stay_finite_and_right(accumulation):
    q, k, v = qkv(dtype=torch.bfloat16)
    v[..., :4] *= 3e6
    v[..., 4:8] *= 1e-9
    exact, _ = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    options = QuantizationOptions(pv_accumulation=accumulation)
    out, _ = quantized_attention_reference(q, k, v, precision="sage_fp16", options=options)
    for channels in (slice(0, 4), slice(4, 8), slice(8, 64)):
        check("sage_fp16", out[..., channels], exact[..., channels])


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonsense_in_shows_in_the_output(precision, name, value):
    tensors = dict(zip("qkv", qkv(), strict=True))
    tensors[name][0, 0, 5, 7] = value
    out, _ = quantized_attention_reference(**tensors, precision=precision)
    assert not out[0, 0, 5].isfinite().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("option", ["smooth_q", "hadamard", "smooth_v"])
def test_transformations_leave_attention_as_it_is(precision, option):
    q, k, v = qkv(lengths=(150, 300))
    q, v = q + 4 * normal(64, seed=9), v + 2 * normal(64, seed=8)
    k[..., 3] *= 20
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    plain, transformed = (
        quantized_attention_reference(q, k, v, precision=precision, options=chosen)
        for chosen in (QuantizationOptions(), QuantizationOptions(**{option: True}))
    )
    gain = relative_error(plain[0], exact) / relative_error(transformed[0], exact)
    # Rounding in floating point does not care for outliers, so a rotation gains nothing for FP8.
    bound = {"smooth_q": 2.0, "hadamard": 0.8 if precision == "fp8" else 2.0, "smooth_v": 0.99}
    assert gain > bound[option]
    assert (transformed[1] / exact_lse - 1).abs().max() < 0.1


def test_smooth_v_returns_constant_values_exactly():
    q, k, _ = qkv()
    v = normal(1, 2, 1, 64).expand(-1, -1, 200, -1)
    options = QuantizationOptions(smooth_v=True)
    out, _ = quantized_attention_reference(q, k, v, precision="fp8", options=options)
    assert torch.allclose(out, v[:, :, :1].expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_attend_is_softmax_of_the_codes(granularity):
    """The tile sequence against one plain softmax over what the codes stand for: only P is rounded,
    to fp16.
    """
    q, k, v = qkv(heads=(4, 2), lengths=(130, 260))
    options = QuantizationOptions(granularity=granularity, smooth_k=False)
    plan = plan_tiles(None, 130, 260, q.device)
    codes = quantize_inputs(q, k, v, "sage_fp16", options, scale=0.3)
    out, lse = attend(codes, plan, options, precision="sage_fp16", scale=0.3)
    stands_for = (
        codes.q.double() * codes.q_scale[..., codes.q_group, None],
        codes.k.double() * codes.k_scale[..., codes.k_group, None],
        codes.v.double() * codes.v_scale[:, :, None],
    )
    exact, exact_lse = oracle.attention_oracle(*stands_for, tokens_of(None, q, k), 0.3)
    assert relative_error(out, exact) < 5e-4
    assert (lse - exact_lse).abs().max() < 1e-4


# -- through attention() ------------------------------------------------------------------------


def test_attention_takes_the_options_and_passes_them_on():
    q, k, v = qkv()
    options = QuantizationOptions(granularity="per_thread", smooth_k=False, smooth_v=True)
    got = attention(q, k, v, precision="sage_fp8", quantization=options, backend="reference")
    expected, _ = quantized_attention_reference(q, k, v, precision="sage_fp8", options=options)
    default = attention(q, k, v, precision="sage_fp8", backend="reference")
    assert torch.equal(got, expected) and not torch.equal(got, default)


FP16_SUMS = QuantizationOptions(pv_accumulation="fp16+fp32")
FP8_FP16_SUMS = QuantizationOptions(pv_accumulation="fp32+fp16")
HADAMARD = QuantizationOptions(hadamard=True)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "precision", {"precision": "int8"}),
        (TypeError, "quantization", {"precision": "fp8", "quantization": {"smooth_k": True}}),
        (ValueError, "quantization", {"quantization": QuantizationOptions()}),
        (ValueError, "pv_accum", {"precision": "fp8", "quantization": FP16_SUMS}),
        (ValueError, "pv_accum", {"precision": "sage_fp16", "quantization": FP8_FP16_SUMS}),
        (ValueError, "hadamard", {"precision": "fp8", "quantization": HADAMARD}),
        (TypeError, "smooth_k", {"precision": "fp8", "smooth_k": True}),
    ],
)
def test_attention_refuses(error, match, arguments):
    q, k, v = qkv(dims=(40, 40))
    with pytest.raises(error, match=match):
        attention(q, k, v, **arguments)


def test_gradients_are_refused_not_zero():
    q, k, v = (x.requires_grad_() for x in qkv())
    with pytest.raises(ValueError, match="no backward pass"):
        attention(q, k, v, precision="sage_fp16")
    with torch.no_grad():
        assert attention(q, k, v, precision="sage_fp16").isfinite().all()


def test_double_precision_is_refused_by_name():
    q, k, v = (x.double() for x in qkv())
    with pytest.raises(RuntimeError, match="float64"):
        attention(q, k, v, precision="sage_fp16")


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_opcheck(precision):
    q, k, v = qkv(lengths=(70, 90))
    arguments = (q, k, v, *(None,) * 6, 0, 0, 0.125, False, precision, False, "reference")
    torch.library.opcheck(torch.ops.video_attn.attention_forward, arguments)


def test_fullgraph():
    q, k, v = qkv(lengths=(70, 90))
    chosen = {
        "precision": "sage_fp8",
        "quantization": QuantizationOptions(granularity="per_block"),
        "backend": "reference",
    }

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, **chosen) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), model(q, k, v))
