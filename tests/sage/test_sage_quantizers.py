"""The Sage quantizers' own source, run on the CPU by host emulation, against quantize.py.

They round like the definition, but for values that another order of the mean's sum moves over a
tie.
"""

from __future__ import annotations

import pytest
import sage_emulation
import torch
from sage_codes import inputs_of, plain_tokens, plain_values
from sage_problems import GRANULARITIES, check_codes, make_codes, qkv

from video_attn import BlockMask
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions, quantize_inputs
from video_attn.quantized_reference import plan_tiles

pytestmark = pytest.mark.skipif(
    sage_emulation.missing() is not None, reason=f"host emulation: {sage_emulation.missing()}"
)


@pytest.fixture(autouse=True, scope="module")
def emulation() -> None:
    sage_emulation.load()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((64, 64), torch.float16),
        ((40, 24), torch.bfloat16),
        ((128, 100), torch.float32),
        ((33, 65), torch.float16),
    ],
)
def test_codes_and_scales_are_those_of_the_definition(dims, dtype, precision, granularity):
    q, k, v = qkv((150, 200), (4, 2), dims, 2, dtype)
    lens = torch.tensor([[64, 3, 22], [64, 64, 1]], dtype=torch.int32)
    kv_lens = torch.tensor([[60, 64, 0, 8], [64, 1, 64, 5]], dtype=torch.int32)
    keep = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask = BlockMask.from_dense(keep, 64, 64, lens, kv_lens, q_len=150, kv_len=200)
    options = QuantizationOptions(granularity=granularity, smooth_v=True)
    plan = plan_tiles(mask, 150, 200, q.device)
    got = inputs_of(
        make_codes(q, k, v, mask, scale=0.2, precision=precision, options=options),
        options, plan, dims,
    )  # fmt: skip
    expected = quantize_inputs(
        q, k, v, precision, options, scale=0.2, q_tiling=plan.q_tiling, kv_tiling=plan.kv_tiling,
        q_valid=plan.q_valid, kv_valid=plan.kv_valid,
    )  # fmt: skip
    check_codes(got, expected)


@pytest.mark.parametrize("dim", [16, 48, 64, 96, 128])
@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("sage_fp16", {"hadamard": True}),
        ("sage_fp8", {"smooth_q": True, "granularity": "per_thread"}),
        ("fp8", {"hadamard": True, "smooth_q": True, "smooth_k": False}),
        ("sage_fp8", {"hadamard": True, "smooth_q": True, "granularity": "per_block"}),
    ],
)
def test_rotated_and_smoothed_queries(precision, changes, dim):
    """Rotations of every size, means of whole, partial and empty tiles, what they leave out."""
    q, k, v = qkv((150, 200), (4, 2), (dim, 24), 2)
    lens = torch.tensor([[64, 3, 22], [0, 64, 1]], dtype=torch.int32)
    kv_lens = torch.tensor([[60, 64, 0, 8]], dtype=torch.int32)
    keep = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask = BlockMask.from_dense(keep, 64, 64, lens, kv_lens, q_len=150, kv_len=200)
    options = QuantizationOptions(**changes)
    plan = plan_tiles(mask, 150, 200, q.device)
    codes = make_codes(q, k, v, mask, scale=0.2, precision=precision, options=options)
    expected = quantize_inputs(
        q, k, v, precision, options, scale=0.2, q_tiling=plan.q_tiling, kv_tiling=plan.kv_tiling,
        q_valid=plan.q_valid, kv_valid=plan.kv_valid,
    )  # fmt: skip
    check_codes(inputs_of(codes, options, plan, (dim, 24)), expected)


def test_many_tiles_of_queries_share_the_means_of_a_block():
    """More query tiles than a block of the score shift takes at a time, for both padded dims."""
    for dim in (64, 128):
        q, k, v = qkv((64 * 33 + 5, 70), (1, 1), (dim, dim))
        options = QuantizationOptions(smooth_q=True)
        codes = make_codes(q, k, v, None, scale=0.2, precision="sage_fp8", options=options)
        expected = quantize_inputs(q, k, v, "sage_fp8", options, scale=0.2).score_shift
        assert torch.allclose(codes.score_shift[..., :70], expected, rtol=1e-5, atol=1e-5)
        assert (codes.score_shift[..., 70:] == 0).all()


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_padding_of_codes_is_zero(precision):
    q, k, v = qkv((70, 65), (1, 1), (40, 50))
    codes = make_codes(q, k, v, None, scale=1.0, precision=precision, options=QuantizationOptions())
    for rows, length, dim in (
        (plain_tokens(codes.q), 70, 40),
        (plain_tokens(codes.k), 65, 40),
        (plain_values(codes.v), 65, 50),
    ):
        assert rows.shape[2:] == (128, 64)
        assert (rows[:, :, length:].float() == 0).all() and (rows[..., dim:].float() == 0).all()
        assert (rows[:, :, :length, :dim].float() != 0).float().mean() > 0.9
