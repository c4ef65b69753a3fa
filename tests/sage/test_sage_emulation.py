"""The Sage attention kernels' own source, run on the CPU by host emulation, against the definition.

They differ from ``attend`` by the order of fp32 sums only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import sage_emulation
import token_masks
import torch
from sage_problems import (
    GRANULARITIES,
    SUMS,
    check,
    make_codes,
    normal,
    qkv,
    random_mask,
    relative_error,
    run,
)
from torch import Tensor

from video_attn import BlockMask
from video_attn.backends import cuda_sage
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions
from video_attn.quantized_reference import plan_tiles, quantized_attention_reference

pytestmark = pytest.mark.skipif(
    sage_emulation.missing() is not None, reason=f"host emulation: {sage_emulation.missing()}"
)
KERNELS = {"mma.sync": 89, "warpgroup": 90}


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which of the two attention kernels the launcher takes."""
    with sage_emulation.options(capability=KERNELS[request.param]):
        yield request.param


# -- attention against the definition, tightly -----------------------------------------------------


@pytest.mark.parametrize("accumulation", ["fp32", "fp16"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_every_variant(precision, dim, granularity, accumulation):
    options = QuantizationOptions(
        granularity=granularity,
        smooth_v=True,
        pv_accumulation="fp32" if accumulation == "fp32" else SUMS[precision],
    )
    check(*qkv(dims=(dim, dim)), precision=precision, options=options)


@pytest.mark.parametrize("kv_len", [1, 12, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_short_and_odd_sequences(precision, kv_len):
    for q_len in (1, 65):
        check(*qkv((q_len, kv_len)), precision=precision, options=QuantizationOptions())


@pytest.mark.parametrize("lengths", [(130, 130), (70, 200), (200, 70), (65, 64), (64, 129)])
@pytest.mark.parametrize("precision", ["sage_fp16", "sage_fp8"])
def test_causal(precision, lengths):
    check(*qkv(lengths), precision=precision, options=QuantizationOptions(), is_causal=True)


MASKS = {
    "64": ((64, 64), (200, 300), {}),
    "64-lens": ((64, 64), (200, 300), {"lens": True}),
    "64-batch-heads-lens": ((64, 64), (130, 200), {"lens": True, "batch": 2, "per_head": True}),
    "128": ((128, 128), (300, 260), {}),
    "128-64-lens": ((128, 64), (256, 200), {"lens": True}),
    "384-lens": ((384, 384), (500, 800), {"lens": True}),
    "192-320": ((192, 320), (400, 700), {"lens": True}),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_block_lists(precision, name):
    sizes, lengths, rest = MASKS[name]
    q, k, v = qkv(lengths, batch=rest.get("batch", 1))
    options = QuantizationOptions(granularity="per_thread", smooth_v=True)
    check(q, k, v, random_mask(sizes, lengths, **rest), precision=precision, options=options)


@pytest.mark.parametrize(
    "changes",
    [{"smooth_q": True}, {"smooth_q": True, "hadamard": True, "smooth_k": False}],
    ids=["smooth_q", "and-hadamard"],
)
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_shifted_scores(precision, changes):
    """Whole tiles, causal ones, and lists of one and three row tiles to a block."""
    options = QuantizationOptions(granularity="per_thread", **changes)
    check(*qkv((200, 260)), precision=precision, options=options)
    check(*qkv((130, 200)), precision=precision, options=options, is_causal=True)
    for name in ("64-batch-heads-lens", "384-lens"):
        sizes, lengths, rest = MASKS[name]
        q, k, v = qkv(lengths, batch=rest.get("batch", 1))
        check(q, k, v, random_mask(sizes, lengths, **rest), precision=precision, options=options)


def test_lists_of_more_tiles_than_a_warp_has_lanes():
    """Dense, and a list in which most of the first 32 entries have no valid key."""
    options = QuantizationOptions()
    q, k, v = qkv((70, 2300), (1, 1))
    check(q, k, v, precision="sage_fp8", options=options)
    keep = torch.ones(1, 1, 2, 36, dtype=torch.bool)
    lens = torch.full((1, 36), 64, dtype=torch.int32)
    lens[:, 1:31], lens[:, 35] = 0, 7
    mask = BlockMask.from_dense(keep, 64, 64, None, lens, q_len=70, kv_len=2300)
    check(q, k, v, mask, precision="sage_fp16", options=options)


def test_lists_that_are_views():
    """Lists with strides of their own, and one list expanded over heads."""
    mask = random_mask((64, 64), (200, 300))
    wide = torch.full((1, 1, 4, 2 * mask.kv_indices.shape[3]), 7, dtype=torch.int32)
    wide[..., ::2] = mask.kv_indices
    strided = BlockMask.from_indices(
        wide[..., ::2].expand(1, 2, -1, -1), 64, 64, q_len=200, kv_len=300,
        kv_num_blocks=mask.kv_num_blocks.expand(1, 2, -1),
    )  # fmt: skip
    q, k, v = qkv((200, 300))
    for got, expected in zip(run(q, k, v, strided), run(q, k, v, mask), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "dims", [(8, 8), (33, 65), (40, 40), (72, 96), (96, 128), (128, 24), (64, 128)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_head_dims_and_dtypes(dims, dtype):
    q, k, v = qkv(dims=dims, dtype=dtype)
    check(q, k, v, precision="sage_fp16", options=QuantizationOptions(smooth_v=True))


def test_grouped_heads():
    check(*qkv(heads=(6, 2)), precision="sage_fp8", options=QuantizationOptions())


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 40, 33])
def test_fused_views_are_read_in_place_and_nothing_around_them(dim, dtype):
    q, k, v = qkv((90, 90), (2, 2), (dim, dim), dtype=dtype)
    fused = torch.full((1, 92, 3, 2, dim + 3), math.nan, dtype=dtype)
    views = [fused[:, 1:91, i, :, :dim].transpose(1, 2) for i in range(3)]
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    before = fused.clone()
    out, lse = run(*views)
    plain, plain_lse = run(q, k, v)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    assert torch.equal(fused.isnan(), before.isnan()) and torch.equal(
        fused.nan_to_num(), before.nan_to_num()
    )
    assert out.stride(2) > out.stride(1) > out.stride(3)  # the memory order of q


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_what_lies_past_a_valid_length_is_not_read(precision):
    q, k, v = qkv((192, 256))
    mask = random_mask((64, 64), (192, 256), lens=True)
    plan = plan_tiles(mask, 192, 256, q.device)
    clean = run(q, k, v, mask, precision=precision)
    q[:, :, ~plan.q_valid[0]] = math.nan
    k[:, :, ~plan.kv_valid[0]] = math.inf
    v[:, :, ~plan.kv_valid[0]] = math.nan
    for got, expected in zip(run(q, k, v, mask, precision=precision), clean, strict=True):
        assert torch.equal(got, expected)


def test_offsets_beyond_32_bits():
    """Tokens, and rows of the output, more than 2^31 elements apart: only touched pages exist."""
    q, k, v = qkv((3, 4), (1, 1), (64, 64), dtype=torch.float16)
    stride = 2**31 // 2 + 64

    def spread(x: Tensor) -> Tensor:
        storage = torch.empty(stride * 3 + 64, dtype=x.dtype)
        view = storage.as_strided((1, 1, x.shape[2], 64), (0, 0, stride, 1))
        return view.copy_(x) if x.numel() else view

    far = [spread(x) for x in (q, k, v)]
    expected, expected_lse = run(q, k, v)
    codes = make_codes(
        *far, None, scale=64**-0.5, precision="sage_fp8", options=QuantizationOptions()
    )
    out, lse = spread(q), torch.empty(1, 1, 3)
    torch.ops.video_attn.sage_attention(
        *codes, None, None, None, None, 0, 0, 4, 64**-0.5, False, False, None, out, lse
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


# -- strange values --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_zeros_give_zeros(precision):
    q, k, v = qkv()
    v[..., 3] = 0
    out, _ = run(q, k, v, precision=precision)
    assert (out[..., 3] == 0).all() and out.isfinite().all()
    out, lse = run(q, torch.zeros_like(k), v, precision=precision)
    assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=0.02)
    assert torch.allclose(lse, torch.full_like(lse, math.log(130)), atol=1e-5)


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonsense_in_shows_in_the_output(precision, name, value):
    tensors = dict(zip("qkv", qkv(heads=(2, 2)), strict=True))
    tensors[name][0, 0, 5, 7] = value
    out, _ = run(**tensors, precision=precision, options=QuantizationOptions(smooth_v=True))
    assert not out[0, 0, 5].isfinite().all()
    assert out[0, 1].isfinite().all()


def test_values_beyond_fp16():
    q, k, v = qkv(dtype=torch.bfloat16)
    v[..., :4] *= 3e6
    v[..., 4:8] *= 1e-9
    for accumulation in ("fp32", "fp16+fp32"):
        options = QuantizationOptions(pv_accumulation=accumulation)
        check(q, k, v, precision="sage_fp16", options=options)


# -- end to end ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "bound"), [("sage_fp16", 0.02), ("sage_fp8", 0.05), ("fp8", 0.058)]
)
@pytest.mark.parametrize("dim", [64, 128])
def test_error_against_exact_attention(precision, bound, dim):
    q, k, v = (
        normal(1, 1, 192, dim, seed=1),
        normal(1, 1, 256, dim, seed=2),
        normal(1, 1, 256, dim, seed=3),
    )
    exact, exact_lse = oracle.attention_oracle(q, k, v, token_masks.dense_tokens(192, 256))
    out, lse = run(q, k, v, precision=precision)
    assert relative_error(out, exact) <= bound
    assert (lse - exact_lse).abs().max() < 0.06
    for wrong in (torch.zeros_like(out), -out):
        assert relative_error(wrong, exact) > bound


def test_lse_of_biased_keys():
    q, k, v = qkv((100, 200), dims=(128, 128))
    k[..., :8] += 12.0 * torch.tensor([1.0, -1.0] * 4)
    exact, exact_lse = oracle.attention_oracle(q, k, v, token_masks.dense_tokens(100, 200))
    errors = {}
    for smooth_k in (True, False):
        out, lse = run(
            q, k, v, precision="sage_fp16", options=QuantizationOptions(smooth_k=smooth_k)
        )
        errors[smooth_k] = (relative_error(out, exact), float((lse - exact_lse).abs().max()))
    assert errors[True][0] < 0.02 and errors[True][1] < 0.05
    assert errors[False][0] > 2 * errors[True][0]


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_kernel_and_definition_agree_without_each_others_codes(precision):
    q, k, v = qkv((130, 200), (2, 2), (64, 64), 2)
    options = QuantizationOptions(granularity="per_thread", smooth_v=True)
    got, got_lse = run(q, k, v, precision=precision, options=options)
    expected, lse = quantized_attention_reference(q, k, v, precision=precision, options=options)
    assert relative_error(got, expected) < 2e-3
    assert torch.allclose(got_lse, lse, atol=1e-3)


# -- how the emulation runs ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_the_order_of_threads_and_copies_does_not_matter(precision, kernel):
    """A missing barrier or wait shows as a difference, or as the NaN of fresh shared memory. There
    are more keys than the ring of stages holds."""
    names = ("late_copies", "late_products", "last_first")
    by_warpgroups = kernel == "warpgroup"
    orders = itertools.product((True, False), (True, False) if by_warpgroups else (True,),
                               (True, False))  # fmt: skip
    options = [dict(zip(names, order, strict=True)) for order in orders]
    q, k, v = qkv((130, 1000))
    mask = random_mask((64, 64), (130, 1000), lens=True)
    for chosen, causal in ((mask, False), (None, True)):
        results = []
        for order in options:
            with sage_emulation.options(**order):
                results.append(run(q, k, v, chosen, precision=precision, is_causal=causal))
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [(75, "sage_fp16", "8.0"), (80, "sage_fp8", "8.9"), (86, "fp8", "8.9")],
)
def test_the_launcher_refuses_what_a_device_lacks(capability, precision, message):
    with sage_emulation.options(capability=capability), pytest.raises(RuntimeError, match=message):
        run(*qkv(), precision=precision)


def test_the_binding_refuses_what_does_not_fit():
    q, k, v = qkv()
    codes = make_codes(
        q, k, v, None, scale=1.0, precision="sage_fp8", options=QuantizationOptions()
    )
    out, lse = torch.empty(1, 2, 100, 64), torch.empty(1, 2, 100)
    good: dict[str, Any] = codes._asdict() | {
        "kv_num_blocks": None, "kv_indices": None, "q_lens": None, "kv_lens": None,
        "q_block_size": 0, "kv_block_size": 0, "kv_len": 130, "scale": 1.0, "is_causal": False,
        "half_sums": False, "places": None, "out": out, "lse": lse,
    }  # fmt: skip
    attention = torch.ops.video_attn.sage_attention
    attention(*good.values())
    counts = torch.ones(1, 1, 1, dtype=torch.int32)
    for change, message in (
        ({"k": codes.k[:, :, :2]}, "k_codes"),
        ({"kv_len": 300}, "k_codes"),
        ({"q_scale": codes.q_scale[..., :3].contiguous()}, "q_scale"),
        ({"v_scale": codes.v_scale.half()}, "v_scale has the wrong dtype"),
        ({"lse": lse.double()}, "lse has the wrong dtype"),
        ({"lse": lse.transpose(1, 2).contiguous().transpose(1, 2)}, "lse must be contiguous"),
        ({"q_block_size": 100}, "multiple of 64"),
        ({"kv_num_blocks": counts}, "without kv_indices"),
        (
            {"kv_num_blocks": counts, "kv_indices": counts[..., None], "is_causal": True},
            "is_causal",
        ),
        ({"kv_num_blocks": counts, "kv_indices": counts[..., None].long()}, "int32"),
        ({"kv_num_blocks": counts, "kv_indices": counts[..., None], "q_block_size": 64}, "blocks"),
        ({"q_lens": torch.ones(1, 5, dtype=torch.int32)}, "q has size"),
    ):
        with pytest.raises(RuntimeError, match=message):
            attention(*(good | change).values())


@pytest.mark.parametrize("name", ["sage_quantize", "sage_attention"])
def test_opcheck(name):
    q, k, v = qkv((70, 70))
    options = QuantizationOptions()
    codes = cuda_sage.allocate_codes(q, k, v, "sage_fp16", options)
    arguments: tuple = (*codes, *(None,) * 4, 0, 0, 70, 0.1, False, False, None)
    arguments += (torch.empty(1, 2, 70, 64), torch.empty(1, 2, 70))
    if name == "sage_quantize":
        workspace = torch.empty(64 * (8 + 2))
        arguments = (q, k, v, None, None, None, 0, 0, 0.1, 512.0, False, *codes, workspace)
    else:
        codes = make_codes(q, k, v, None, scale=0.1, precision="sage_fp16", options=options)
        arguments = (*codes, *arguments[len(codes) :])
    torch.library.opcheck(getattr(torch.ops.video_attn, name), arguments)
