"""Quantized recipes: their options, and the quantizers against their definition."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

import video_attn
from video_attn.quantize import (
    FP8_DTYPES,
    GRANULARITIES,
    QUANTIZED_PRECISIONS,
    QuantizationOptions,
    Tiling,
    encode,
    fp8_dtype,
    hadamard_rotation,
    p_exponent,
    parse_recipe,
    quantize_channels,
    quantize_inputs,
    quantize_tokens,
    recipe_text,
    scale_groups,
    v_limit,
)
from video_attn.quantized_reference import quantized_attention_reference

FN = torch.float8_e4m3fn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (TypeError, {"smoothing": True}),
        (TypeError, {"smooth_k": 1}),
        (TypeError, {"granularity": None}),
        (ValueError, {"granularity": "per_token"}),
        (ValueError, {"pv_accumulation": "fp16"}),
    ],
)
def test_options_refuse_what_they_do_not_know(error, options):
    with pytest.raises(error, match=next(iter(options))):
        QuantizationOptions(**options)


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_recipe_text_is_undone_by_parse_recipe(precision):
    for options in (None, QuantizationOptions()):
        assert recipe_text(precision, options) == precision
    for granularity, smooth_k, hadamard in itertools.product(GRANULARITIES, *[(True, False)] * 2):
        options = QuantizationOptions(granularity, smooth_k, hadamard=hadamard)
        assert parse_recipe(recipe_text(precision, options)) == (precision, options)


def test_native_has_no_options():
    assert parse_recipe("native") == ("native", None)
    with pytest.raises(ValueError, match="takes no options"):
        parse_recipe("native:smooth_k=False")


@pytest.mark.parametrize(
    ("text", "error"), [("fp8:smoothk=True", TypeError), ("fp8:smooth_k=1", TypeError)]
)
def test_parse_recipe_refuses(text, error):
    with pytest.raises(error):
        parse_recipe(text)


def test_fp8_format_follows_the_matrix_units():
    assert fp8_dtype("gfx942") is torch.float8_e4m3fnuz
    assert {fp8_dtype(arch) for arch in ("gfx950", "sm_90", "sm_120", "cpu")} == {FN}


# -- quantizers ---------------------------------------------------------------------------------


def test_int8_rounds_ties_to_even_and_keeps_the_sign():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]).view(1, 1, 1, 8)
    codes, scale = quantize_tokens(x, torch.zeros(1, dtype=torch.int64), 1, torch.int8)
    assert scale.item() == 1.0
    assert codes.flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("role", ["q", "k"])
def test_int8_is_within_half_a_step_of_its_group(role, granularity):
    x, tiling = normal(2, 3, 150, 40), Tiling(150, 150)
    group, groups = scale_groups(role, granularity, tiling, x.device)
    codes, scale = quantize_tokens(x, group, groups, torch.int8)
    step = scale[..., group, None]
    assert ((codes * step - x).abs() <= 0.5001 * step).all()
    for g in group.unique():
        assert torch.equal(scale[..., g], x[:, :, group == g].abs().amax((2, 3)) / 127)


def test_groups_are_those_of_the_tensor_core_lanes():
    tiling = Tiling(200, 200)
    q_group, q_groups = scale_groups("q", "per_thread", tiling, torch.device("cpu"))
    k_group, k_groups = scale_groups("k", "per_thread", tiling, torch.device("cpu"))
    assert (q_groups, k_groups) == (4 * 32, 4 * 4)
    for token in range(200):
        assert q_group[token] == token // 16 * 8 + token % 8
        assert k_group[token] == token // 64 * 4 + token % 8 // 2


@pytest.mark.parametrize(
    ("length", "slot"), [(1, 1), (64, 64), (200, 200), (300, 100), (290, 128), (50, 16)]
)
def test_tiles_start_afresh_in_every_slot(length, slot):
    tiling = Tiling(length, slot)
    tile, row = tiling.tile_and_row(torch.device("cpu"))
    expected = [
        list(range(t, min(t + 64, s + slot, length)))
        for s in range(0, length, slot)
        for t in range(s, min(s + slot, length), 64)
    ]
    assert tiling.num_tiles == len(expected)
    tokens = tiling.tokens(torch.device("cpu"))
    for i, members in enumerate(expected):
        assert tokens[i][tokens[i] >= 0].tolist() == members
        assert tile[members].tolist() == [i] * len(members)
        assert row[members].tolist() == list(range(len(members)))


@pytest.mark.parametrize("dtype", [torch.int8, *FP8_DTYPES])
@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-31, math.inf, math.nan])
def test_strange_groups(dtype, value):
    x = torch.zeros(1, 1, 2, 4)
    x[0, 0, 0, 1] = value
    x[0, 0, 1] = 3.0
    codes, scale = quantize_tokens(x, torch.arange(2), 2, dtype)
    assert (codes[0, 0, 0].float() == 0).all()
    if math.isfinite(value):
        assert scale[0, 0, 0] == 0
    else:
        assert not scale[0, 0, 0].isfinite()
    assert torch.allclose(codes[0, 0, 1].float() * scale[0, 0, 1], x[0, 0, 1])


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_fp8_uses_its_range_and_clamps(dtype):
    limit = torch.finfo(dtype).max
    x = normal(1, 2, 70, 32)
    codes, scale = quantize_tokens(x, torch.zeros(70, dtype=torch.int64), 1, dtype)
    assert (codes.float().abs().amax((2, 3)) == limit).all()
    error = (codes.float() * scale[..., None] - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale[..., None] * 2.0**-9)).all()
    assert encode(torch.tensor([1e9, -1e9, math.nan]), dtype).float().tolist() == [limit, -limit, 0]


@pytest.mark.parametrize("magnitude", [1e-20, 1e-4, 1.0, 7e4, 1e30])
def test_fp16_values_are_scaled_by_a_power_of_two(magnitude):
    v = normal(1, 2, 100, 24) * magnitude
    codes, scale = quantize_channels(v, "sage_fp16", QuantizationOptions(), FN)
    assert codes.dtype == torch.float16
    assert (scale.log2() == scale.log2().round()).all()
    largest = codes.float().abs().amax(2)
    assert ((largest >= 256) & (largest <= 512)).all()
    assert torch.allclose(codes.float() * scale[:, :, None], v, rtol=2.0**-11, atol=0.0)


@pytest.mark.parametrize("precision", ["sage_fp16", "sage_fp8"])
def test_channels_of_zeros_and_of_nonsense(precision):
    v = normal(1, 1, 10, 4)
    v[..., 0], v[..., 1, 1], v[..., 1, 2] = 0.0, math.inf, math.nan
    codes, scale = quantize_channels(v, precision, QuantizationOptions(), FN)
    assert scale[0, 0, 0] == 0 and not scale[0, 0, 1:3].isfinite().any() and scale[0, 0, 3] > 0
    assert (codes[..., :3].float() == 0).all()


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_sums_in_fp16_cannot_overflow_and_waste_no_code(fp8):
    largest_p = 2.0 ** p_exponent("sage_fp8", fp8)
    assert largest_p <= torch.finfo(fp8).max < 2 * largest_p
    limit = v_limit("sage_fp8", "fp32+fp16", fp8)
    assert encode(torch.tensor(limit), fp8).float() == limit
    assert 64 * largest_p * limit <= 65504
    assert 64 * largest_p * limit * 17 / 16 > 65504 - 4096


def test_hadamard_is_a_rotation():
    for dim in (16, 48, 64, 128, 96):
        x = normal(3, dim)
        rotated = hadamard_rotation(x)
        assert torch.allclose(rotated @ rotated.T, x @ x.T, atol=1e-4)
        spike = hadamard_rotation(torch.eye(dim)[:1])
        assert spike.abs().max() == pytest.approx((dim & -dim) ** -0.5, rel=1e-5)


def test_the_callers_tensors_stay_as_they_are():
    fused = normal(1, 150, 3, 2, 64)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    before = fused.clone()
    options = QuantizationOptions(smooth_q=True, hadamard=True, smooth_v=True)
    for precision in QUANTIZED_PRECISIONS:
        quantize_inputs(q, k, v, precision, options, scale=0.1)
        quantized_attention_reference(q, k, v, precision=precision)
    assert torch.equal(fused, before)


def test_options_are_public_and_plain():
    assert video_attn.quantize.QuantizationOptions is QuantizationOptions
    assert [f.name for f in dataclasses.fields(QuantizationOptions)] == [
        "granularity", "smooth_k", "smooth_q", "hadamard", "smooth_v", "pv_accumulation",
        "straight_through",
    ]  # fmt: skip
