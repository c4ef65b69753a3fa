"""The model of FP8 sums is the measured one, and the bounds for lse hold for it."""

from __future__ import annotations

import pytest
import torch
from fp8_sums import lse_bounds, truncated_scores
from sage_problems import qkv

from video_attn.quantize import QuantizationOptions, Tiling, quantize_inputs

MEASURED = {64: (1.65e-4, 2.0**-8.6), 128: (3.4e-4, 2.0**-7.7)}  # rms and largest, on an H100


@pytest.mark.parametrize("length", MEASURED)
def test_the_model_errs_as_the_card_does(length: int):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, length, generator=generator) for n in (512, 256))
    q, k = ((x * (448 / x.abs().amax())).to(torch.float8_e4m3fn).double() for x in (q, k))
    largest = (q[:, None] * k).abs().amax(-1)
    error = (truncated_scores(q, k) - q @ k.mT) / largest
    rms, most = MEASURED[length]
    assert 0.8 < error.square().mean().sqrt() / rms < 1.1
    assert 0.7 < error.abs().max() / most < 1.3


@pytest.mark.parametrize(("lengths", "dims"), [((130, 130), (64, 64)), ((200, 256), (128, 128))])
def test_lse_is_within_its_bounds(lengths: tuple[int, int], dims: tuple[int, int]):
    """Causal, as where the tests on a GPU were first too strict: short rows average nothing."""
    q, k, v = qkv(lengths, (1, 1), dims)
    scale, tilings = dims[0] ** -0.5, [Tiling(n, n) for n in lengths]
    codes = quantize_inputs(
        q, k, v, "fp8", QuantizationOptions(), scale=scale, fp8=torch.float8_e4m3fn,
        q_tiling=tilings[0], kv_tiling=tilings[1],
        q_valid=torch.ones(1, lengths[0], dtype=torch.bool),
        kv_valid=torch.ones(1, lengths[1], dtype=torch.bool),
    )  # fmt: skip
    a, b = codes.q[0, 0].float(), codes.k[0, 0].float()
    scales = codes.q_scale[0, 0, codes.q_group], codes.k_scale[0, 0, codes.k_group]
    factor = scales[0][:, None] * scales[1] * scale
    hidden = torch.ones(lengths).triu(lengths[1] - lengths[0] + 1).bool()
    exact, cut = (
        (scores * factor).masked_fill(hidden, -torch.inf).logsumexp(-1)
        for scores in (a.double() @ b.double().mT, truncated_scores(a, b))
    )
    most, typical = lse_bounds(a, b, *scales, scale)
    error = (cut - exact).abs()
    assert (error <= most).all()
    assert error.square().mean().sqrt() <= typical.square().mean().sqrt()
    assert error.max() > 1e-4 > 100 * torch.finfo(torch.float32).eps  # no rounding of fp32
