"""Quantized attention in C++ against its definition (tight), and against exact attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import oracle
import pytest
import torch
from cpu_quantized import OPTIONS, PRECISIONS, both, run
from quantized_cases import (
    ERROR_BOUND,
    MASKS,
    check,
    check_kernel,
    check_same,
    normal,
    problem,
    qkv,
    random_mask,
    relative_error,
    tokens_of,
)

from video_attn import BlockMask, VideoLayout, radial_mask, sliding_tile_mask
from video_attn.backends import cpu
from video_attn.quantize import GRANULARITIES, QUANTIZED_PRECISIONS, QuantizationOptions

# -- by definition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@PRECISIONS
def test_every_recipe_on_every_mask(precision, granularity, name):
    check_kernel("cpu", precision, name, QuantizationOptions(granularity=granularity))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("precision", ["sage_fp16", "sage_fp8"])
def test_without_means_every_code_is_the_same(precision, name):
    """Then only rounded weights may differ: one in thousands lies that near to a tie."""
    q, k, v, mask = problem(name)
    options = QuantizationOptions(smooth_k=False)
    check_same(*both(q, k, v, mask, precision=precision, quantization=options), bound=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@PRECISIONS
def test_every_option(precision, options, granularity):
    q, k, v = qkv(heads=(4, 2), lengths=(130, 200), dims=(48, 40))
    q, k, v = q + normal(48, seed=5), k + 3 * normal(48, seed=6), v + normal(40, seed=7)
    chosen = QuantizationOptions(**{**vars(options), "granularity": granularity})
    mask = random_mask((64, 64), (130, 200), 4, lens=True)
    for each in (None, mask):
        check_same(*both(q, k, v, each, precision=precision, quantization=chosen))


def video_mask(pattern: str) -> BlockMask:
    video = VideoLayout((6, 8, 10), (1, 1, 1) if pattern == "radial" else (2, 4, 4), text_length=20)
    if pattern == "sta":
        return sliding_tile_mask(video, (1, 2, 2), text_length=13)
    if pattern == "radial":
        return radial_mask(video, block_size=64, text_length=20)
    length = video.sequence_length
    blocks = -(-length // 32)
    chosen = normal(1, 2, blocks, blocks).topk(4, -1).indices.sort(-1).values.int()
    return BlockMask.from_indices(chosen, 32, 32, q_len=length, kv_len=length)


@pytest.mark.parametrize("pattern", ["sta", "vsa", "radial"])
@PRECISIONS
def test_video_patterns(precision, pattern):
    mask = video_mask(pattern)
    q, k, v = qkv(lengths=(mask.q_len, mask.kv_len), dims=(64, 64), dtype=torch.bfloat16)
    got, expected = both(q, k, v, mask, precision=precision)
    check_same(got, expected)
    exact, _ = oracle.attention_oracle(q, k, v, mask.to_token_mask())
    check(precision, got[0], exact, 1.3 * ERROR_BOUND[precision])


@pytest.mark.parametrize("dims", [(1, 1), (3, 255), (8, 8), (40, 96), (72, 40), (256, 17)])
@PRECISIONS
def test_head_dims(precision, dims):
    q, k, v = qkv(lengths=(70, 100), dims=dims)
    check_same(*both(q, k, v, precision=precision, quantization=QuantizationOptions()))


@PRECISIONS
def test_every_tail(precision):
    """kv_len from 1 to 65, dense and causal, and as a block's valid length."""
    for kv_len in range(1, 66):
        q, k, v = qkv(heads=(1, 1), lengths=(5, kv_len), dims=(16, 16))
        check_same(*both(q, k, v, precision=precision))
        if kv_len % 13 == 0:
            check_same(*both(q, k, v, precision=precision, is_causal=True))
            lens = torch.tensor([[kv_len - 1]], dtype=torch.int32)
            mask = BlockMask.from_dense(
                torch.ones(1, 1, 1, 1, dtype=torch.bool), 5, kv_len, None, lens,
                q_len=5, kv_len=kv_len,
            )  # fmt: skip
            check_same(*both(q, k, v, mask, precision=precision))


@pytest.mark.parametrize("lengths", [(100, 100), (70, 200), (200, 70), (65, 64), (1, 129)])
@PRECISIONS
def test_causal(precision, lengths):
    q, k, v = qkv(heads=(4, 2), lengths=lengths)
    got, expected = both(q, k, v, precision=precision, is_causal=True)
    check_same(got, expected)
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k, True))
    check(precision, got[0], exact, 1.3 * ERROR_BOUND[precision])
    assert torch.equal(got[1].isneginf(), exact_lse.isneginf())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@PRECISIONS
def test_error_on_normal_data(precision, dtype):
    q, k, v = qkv(lengths=(200, 512), dims=(128, 128), dtype=dtype)
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    out, lse = run(q, k, v, precision=precision)
    assert out.dtype == dtype
    check(precision, out, exact)
    assert (lse - exact_lse).abs().max() < 0.06
    for wrong in (torch.zeros_like(out), -out, out.roll(1, 2), out * 1.1):
        with pytest.raises(AssertionError):
            check(precision, wrong, exact)
        with pytest.raises(AssertionError):
            check_same((wrong, lse), (out, lse))


# -- what the recipes are for ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["sage_fp16", "sage_fp8"])
def test_smoothing_repairs_biased_keys(precision):
    """Channel offsets of +-12: the scores lose their digits without smoothing, none with it."""
    q, k, v = qkv(lengths=(256, 1024), dims=(128, 128))
    plain = relative_error(
        run(q, k, v, precision=precision)[0],
        oracle.attention_oracle(q, k, v, tokens_of(None, q, k))[0],
    )
    k[..., :8] += 12.0 * torch.tensor([1.0, -1.0] * 4)
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    errors, lse_errors = {}, {}
    for smooth_k in (True, False):
        chosen = QuantizationOptions(smooth_k=smooth_k)
        got, expected = both(q, k, v, precision=precision, quantization=chosen)
        check_same(got, expected)
        errors[smooth_k] = relative_error(got[0], exact)
        lse_errors[smooth_k] = float((got[1] - exact_lse).abs().max())
    assert errors[True] <= ERROR_BOUND[precision] and errors[True] < 1.1 * plain
    assert errors[False] ** 2 > plain**2 + 0.025**2  # the errors of P V are in all of them
    assert lse_errors[True] < 0.02 < lse_errors[False]


@PRECISIONS
def test_zero_channels_and_blocks_give_zero(precision):
    q, k, v = qkv(lengths=(128, 192), dims=(32, 32))
    q[:, :, 64:] = 0
    k[:, :, :64] = 0
    v[..., 5] = 0
    for options in (QuantizationOptions(), QuantizationOptions(smooth_k=False)):
        got, expected = both(q, k, v, precision=precision, quantization=options)
        check_same(got, expected)
        assert (got[0][..., 5] == 0).all() and got[0].isfinite().all()


@pytest.mark.parametrize("factor", [3e6, 1e-9, 1e30, 1e-30])
def test_values_beyond_fp16(factor):
    """Also such as only bf16 and fp32 hold; below 2^-100 a channel counts as zero."""
    q, k, v = qkv(dtype=torch.bfloat16)
    v[..., :4] *= factor
    exact, _ = oracle.attention_oracle(q, k, v, tokens_of(None, q, k))
    for precision in QUANTIZED_PRECISIONS:
        out, _ = run(q, k, v, precision=precision)
        for channels in (slice(0, 4), slice(4, 64)):
            check(precision, out[..., channels], exact[..., channels])


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [QuantizationOptions(), OPTIONS[0], OPTIONS[2]], ids=str)
@PRECISIONS
def test_nonsense_in_shows_in_the_output(precision, options, name, value):
    tensors = dict(zip("qkv", qkv(lengths=(64, 80), dims=(16, 16)), strict=True))
    tensors[name][0, 0, 5, 7] = value
    out, _ = run(*tensors.values(), precision=precision, quantization=options)
    assert not out[0, 0, 5].isfinite().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("precision", ["sage_fp8", "fp8"])
def test_small_codes_have_fewer_digits(precision):
    """An outlier that nobody sees makes all other values of V subnormal in FP8."""
    q, k, v = qkv(lengths=(64, 128), dims=(16, 16))
    v[:, :, 100] = 2e5
    keep = torch.tensor([True, False]).view(1, 1, 1, 2)
    mask = BlockMask.from_dense(keep, 64, 64, q_len=64, kv_len=128)
    options = QuantizationOptions(smooth_k=False)
    got, expected = both(q, k, v, mask, precision=precision, quantization=options)
    check_same(got, expected, bound=1e-3)
    exact, _ = oracle.attention_oracle(q, k, v, mask.to_token_mask())
    assert relative_error(got[0], exact) > 2 * ERROR_BOUND[precision]


# -- operands --------------------------------------------------------------------------------------


@contextmanager
def without_mkldnn() -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, from set_flags()
@PRECISIONS
def test_codes_as_floats_say_the_same(precision):
    """Where torch may not use oneDNN all codes are multiplied as fp32: exact as well."""
    q, k, v, mask = problem("lists-64-128-lens")
    quick = run(q, k, v, mask, precision=precision)
    with without_mkldnn():
        assert "int8 codes as float32, float8 codes as float32" in cpu.description()
        slow = run(q, k, v, mask, precision=precision)
    assert relative_error(slow[0], quick[0]) < 1e-5
    check_same(slow, run(q, k, v, mask, precision=precision, backend="reference"))


def test_int8_sums_are_exact_at_the_extremes():
    """All codes at +-127 and D = 256: the largest sums there are."""
    q, k = torch.ones(1, 1, 64, 256), -torch.ones(1, 1, 70, 256)
    k[:, :, ::2] *= -1
    v = normal(1, 1, 70, 8)
    chosen = {"precision": "sage_fp16", "quantization": QuantizationOptions(smooth_k=False)}
    got, expected = both(q, k, v, scale=1 / 1024, **chosen)
    check_same(got, expected)
    exact, exact_lse = oracle.attention_oracle(q, k, v, tokens_of(None, q, k), 1 / 1024)
    assert relative_error(got[0], exact) < 1e-3
    assert (got[1] - exact_lse).abs().max() < 1e-5
