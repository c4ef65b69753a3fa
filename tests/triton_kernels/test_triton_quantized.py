"""The Triton forward kernel over codes against its definition and against exact attention.

Where there is no GPU they run in Triton's interpreter. Its products of codes are exact, and FP8
numbers are rounded before it converts them (its own conversion truncates); so it cannot show how
the matrix units of a chip sum FP8 products, nor how a chip converts.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from machine import ON_A_GPU_TOO
from quantized_cases import ERROR_BOUND, check, relative_error, tokens_of
from torch import Tensor
from triton_codes import DEVICE, FP8, SCALE, inputs_of, plan_of, problem, qkv, quantized

from video_attn import BlockMask, attention
from video_attn.backends import triton as triton_backend
from video_attn.backends.triton import quantized_launches
from video_attn.kernels import launch_tables
from video_attn.kernels.codes import Codes
from video_attn.kernels.launch import run_launches
from video_attn.kernels.launch_tables import LaunchRow
from video_attn.quantize import GRANULARITIES, QUANTIZED_PRECISIONS, QuantizationOptions
from video_attn.quantized_reference import TilePlan, attend
from video_attn.registry import Problem

pytestmark = ON_A_GPU_TOO

PROBLEMS = [
    "dense", "causal", "causal-more-queries", "one-key", "63-keys", "64-keys", "65-keys", "lists",
    "lists-lens", "lists-32", "gather", "gather-lens", "sta", "vsa",
]  # fmt: skip
# Steps that are the reference's tiles, in an order that a list can say. The others may share tiles
# out otherwise, so that weights are rounded relative to another maximum.
SAME_STEPS = [
    "dense", "causal", "causal-more-queries", "one-key", "63-keys", "64-keys", "65-keys", "lists",
    "lists-lens", "vsa",
]  # fmt: skip


def in_kernel_order(plan: TilePlan) -> TilePlan:
    """The lists with all full tiles first, as the kernel takes them."""
    tokens = plan.kv_tiling.tokens(torch.device("cpu"))
    full = (plan.kv_valid[:, tokens.clamp(min=0)] & (tokens >= 0)).all(-1)  # [B|1, tiles]
    batch = max(full.shape[0], plan.lists.shape[0])
    lists = plan.lists.expand(batch, -1, -1, -1)
    is_full = torch.stack(
        [full[min(b, len(full) - 1)][lists[b].clamp(min=0)] for b in range(batch)]
    )
    rank = torch.where(lists < 0, 2, 1 - is_full.int())
    return plan._replace(lists=lists.gather(-1, rank.argsort(dim=-1, stable=True)))


# -- attention over codes -------------------------------------------------------------------------


def attend_with_row(
    codes: Codes, q: Tensor, k: Tensor, dim_v: int, mask: BlockMask | None, is_causal: bool,
    row: LaunchRow,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out fp32, lse) of the forward kernel with these launch options, on the CPU."""
    out = torch.full((*q.shape[:3], dim_v), torch.nan, device=DEVICE)
    lse = torch.full(q.shape[:3], torch.nan, device=DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    launches = quantized_launches(
        codes, out, lse, mask, kv_len=k.shape[2], scale=SCALE, is_causal=is_causal, row=row
    )
    run_launches(launches, DEVICE)
    return out.cpu(), lse.cpu()


def compare(
    got: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    bound: float,
    lse_bound: float = 2e-5,
) -> None:
    """Outputs within ``bound``, the same rows blind, zeros exact."""
    (out, lse), (expected_out, expected_lse) = got, expected
    assert relative_error(out, expected_out) < bound
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    seen = expected_lse.isfinite()
    assert (lse[seen] - expected_lse[seen]).abs().max() < lse_bound
    assert (out[~seen] == 0).all()


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_follows_the_definition_and_is_near_exact_attention(name, precision):
    """From the same codes as the kernel, the reference differs by the order of sums only."""
    mask, shape = problem(name)
    q, k, v = qkv(**shape)
    plan, is_causal = plan_of(mask, shape["lengths"]), "causal" in name
    granularities = ("per_warp", "per_thread") if name in ("causal", "gather") else ("per_warp",)
    for granularity in granularities:
        codes = quantized(q, k, v, mask, precision, granularity=granularity)
        got = attend_with_row(codes, q, k, v.shape[3], mask, is_causal, LaunchRow(64, 64, 4, 1))
        inputs = inputs_of(codes, plan, (q.shape[3], v.shape[3]))
        order = in_kernel_order(plan) if name in SAME_STEPS else plan
        expected = attend(
            inputs, order, codes.options, precision=precision, scale=SCALE, is_causal=is_causal,
            fp8=FP8,
        )  # fmt: skip
        # A last bit of a score can move a weight to the next number of its type. The matrix units
        # of a GPU sum FP8 products with fewer digits than fp32 has.
        same, loose = (1e-4, 2e-3) if precision == "sage_fp16" else (1e-3, 0.04)
        few_digits = DEVICE.type == "cuda" and precision != "sage_fp16"
        bound = (5e-3 if few_digits else same) if name in SAME_STEPS else loose
        lse_bound = 5e-3 if DEVICE.type == "cuda" and precision == "fp8" else 2e-5
        compare(got, expected, bound, lse_bound)
        for wrong in (torch.zeros_like(got[0]), -got[0], got[0] * 1.05):
            with pytest.raises(AssertionError):
                compare((wrong, got[1]), expected, bound, lse_bound)
        tokens = tokens_of(mask, q, k, is_causal)
        exact, _ = oracle.attention_oracle(q.cpu(), k.cpu(), v.cpu(), tokens, SCALE)
        # A row that sees few keys averages few rounding errors.
        check(precision, got[0], exact, ERROR_BOUND[precision] * (1 if name == "dense" else 1.5))


@pytest.mark.parametrize(
    ("row", "name", "options"),
    [
        ((128, 64, 4, 1), "dense", {"granularity": "per_block"}),
        ((128, 32, 4, 1), "lists-lens", {"granularity": "per_head", "smooth_v": True}),
        ((32, 32, 4, 1), "lists", {"granularity": "per_block", "smooth_k": False}),
        ((64, 128, 4, 1), "causal", {"granularity": "per_warp"}),
        ((16, 32, 4, 1), "lists-32", {"granularity": "per_thread", "smooth_v": True}),
        ((64, 32, 4, 1), "gather", {"granularity": "per_head"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_every_way_to_cut_and_every_option(precision, row, name, options):
    mask, shape = problem(name)
    q, k, v = qkv(**shape)
    codes = quantized(q, k, v, mask, precision, **options)
    got = attend_with_row(codes, q, k, v.shape[3], mask, name == "causal", LaunchRow(*row))
    tokens = tokens_of(mask, q, k, name == "causal")
    exact, exact_lse = oracle.attention_oracle(q.cpu(), k.cpu(), v.cpu(), tokens, SCALE)
    check(precision, got[0], exact, 1.5 * ERROR_BOUND[precision])
    seen = exact_lse.isfinite()
    assert torch.equal(got[1].isfinite(), seen)
    assert (got[1][seen] - exact_lse[seen]).abs().max() < 0.1


def test_fp16_sums():
    """Sums in fp16 stay near the reference's and do not overflow, whatever step the row has."""
    q, k, v = qkv((64, 192))
    v = v.abs() * 1e5
    options = {"pv_accumulation": "fp16+fp32"}
    codes = quantized(q, k, v, None, "sage_fp16", **options)
    plan = plan_of(None, (64, 192))
    for step in (64, 128):
        row = LaunchRow(64, step, 4, 1)
        got = attend_with_row(codes, q, k, 32, None, False, row)
        inputs = inputs_of(codes, plan, (32, 32))
        expected = attend(inputs, plan, codes.options, precision="sage_fp16", scale=SCALE)
        compare(got, expected, 3e-3)
    plain = quantized(q, k, v, None, "sage_fp16")
    assert not torch.equal(attend_with_row(plain, q, k, 32, None, False, row)[0], got[0])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has one FP8 format; others test it")
@pytest.mark.parametrize("precision", ["sage_fp8", "fp8"])
def test_the_fp8_format_of_mi300(precision):
    """e4m3fnuz: half the range, and weights up to 2^7."""
    fp8 = torch.float8_e4m3fnuz
    mask, shape = problem("lists")
    q, k, v = qkv(**shape)
    codes = quantized(q, k, v, mask, precision, fp8=fp8)
    assert codes.v.dtype == fp8 and codes.v.float().abs().max() == 240
    plan = plan_of(mask, shape["lengths"])
    got = attend_with_row(codes, q, k, 32, mask, False, LaunchRow(64, 64, 4, 1))
    expected = attend(
        inputs_of(codes, plan, (32, 32)), in_kernel_order(plan), codes.options,
        precision=precision, scale=SCALE, fp8=fp8,
    )  # fmt: skip
    compare(got, expected, 1e-3)


def test_smoothing_repairs_biased_keys():
    q, k, v = qkv((64, 320), dims=(64, 64))
    k[..., :8] += 12.0 * torch.tensor([1.0, -1.0] * 4, device=DEVICE)
    exact, exact_lse = oracle.attention_oracle(q.cpu(), k.cpu(), v.cpu(), tokens_of(None, q, k))
    errors = {}
    for smooth_k in (True, False):
        out, lse = attention(
            q, k, v, precision="sage_fp16", return_lse=True, backend="triton",
            quantization=QuantizationOptions(smooth_k=smooth_k),
        )  # fmt: skip
        errors[smooth_k] = relative_error(out.cpu(), exact)
        assert (lse.cpu() - exact_lse).abs().max() < (0.02 if smooth_k else 0.2)
    assert errors[True] <= 0.02
    assert errors[False] > 2 * errors[True]


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_what_lies_past_a_valid_length_is_not_read(precision):
    mask, shape = problem("lists-lens")
    q, k, v = qkv(**shape)
    options = {"precision": precision, "backend": "triton", "return_lse": True}
    clean = attention(q, k, v, mask.to(DEVICE), **options)
    plan = plan_of(mask, shape["lengths"])
    for b in range(2):
        q_valid, kv_valid = plan.q_valid[b].to(DEVICE), plan.kv_valid[b].to(DEVICE)
        q[b, :, ~q_valid] = math.nan
        k[b, :, ~kv_valid] = math.inf
        v[b, :, ~kv_valid] = math.nan
    got = attention(q, k, v, mask.to(DEVICE), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonsense_in_shows_in_the_output(precision, name, value):
    tensors = dict(zip("qkv", qkv((64, 64)), strict=True))
    tensors[name][0, 0, 5, 7] = value
    out = attention(**tensors, precision=precision, backend="triton")
    assert not out[0, 0, 5].isfinite().all()
    assert out[0, 1].isfinite().all()


def test_nonsense_stays_with_the_rows_that_see_it():
    q, k, v = qkv((64, 128))
    k[:, :, 100] = math.nan
    options = QuantizationOptions(smooth_k=False, granularity="per_block")
    keep = torch.tensor([[[[True, False]]]])
    mask = BlockMask.from_dense(keep, 64, 64).to(DEVICE)
    out = attention(q, k, v, mask, precision="fp8", quantization=options, backend="triton")
    assert out.isfinite().all()
    causal = attention(
        q, k, v, is_causal=True, precision="sage_fp16", quantization=options, backend="triton"
    )
    assert causal.isfinite().sum() == 0  # row 0 sees key 64, whose tile shares its scale with 100
    causal = attention(
        q[:, :, :1], k[:, :, :65], v[:, :, :65], is_causal=True, precision="sage_fp16",
        quantization=options, backend="triton",
    )  # fmt: skip
    assert causal.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_values_beyond_fp16_stay_finite_and_right(precision, dtype):
    q, k, v = qkv((64, 128), dtype=dtype)
    large = 6e4 if dtype == torch.float16 else 3e6
    v[..., :4] = v[..., :4].clamp(-1, 1) * large
    exact, _ = oracle.attention_oracle(q.cpu(), k.cpu(), v.cpu(), tokens_of(None, q, k))
    out = attention(q, k, v, precision=precision, backend="triton").cpu()
    for channels in (slice(0, 4), slice(4, 32)):
        check(precision, out[..., channels].float(), exact[..., channels])


def test_strided_inputs_and_outputs_keep_their_layout():
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv((70, 90), dtype=torch.float16))
    out = attention(q, k, v, precision="sage_fp8", layout="bshd", backend="triton")
    assert out.dtype == torch.float16 and out.is_contiguous()
    plain = attention(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v)), precision="sage_fp8", backend="triton"
    )
    assert torch.equal(out.transpose(1, 2), plain)


def test_row_offsets_that_need_64_bits():
    """Rows whose last ones start past 2**31 elements; only touched pages are real."""
    stride = 2**25 + 2**21
    storage = torch.empty(63 * stride + 16, dtype=torch.float16, device=DEVICE)
    near = qkv((64, 64), dims=(16, 16), heads=(1, 1))[0].half()
    far = storage.as_strided((1, 1, 64, 16), (0, 0, stride, 1)).copy_(near)
    expected = attention(near, near, near, precision="sage_fp8", backend="triton")
    for tensors in ((far, near, near), (near, far, near), (near, near, far)):
        out = attention(*tensors, precision="sage_fp8", backend="triton")
        assert torch.equal(out, expected)


# -- operators and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_opcheck(precision):
    q, k, v = qkv((64, 70))
    arguments = (q, k, v, *(None,) * 6, 0, 0, 0.125, False, precision, False, "triton")
    torch.library.opcheck(torch.ops.video_attn.attention_forward, arguments)


def test_fullgraph():
    q, k, v = qkv((64, 70))
    chosen = {
        "precision": "sage_fp8",
        "quantization": QuantizationOptions(granularity="per_block"),
        "backend": "triton",
    }

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, **chosen) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), model(q, k, v))


@pytest.mark.parametrize(
    ("name", "precision"),
    [("dense", "sage_fp8"), ("causal-more-queries", "fp8"), ("lists-lens", "sage_fp16"),
     ("gather-lens", "sage_fp8")],
)  # fmt: skip
def test_shifted_scores(name, precision):
    """smooth_q, by a launch row whose tiles are larger than those that have a mean."""
    mask, shape = problem(name)
    q, k, v = qkv(**shape)
    q += 1
    plan, is_causal = plan_of(mask, shape["lengths"]), "causal" in name
    codes = quantized(q, k, v, mask, precision, smooth_q=True, granularity="per_thread")
    row = LaunchRow(128, 64, 8, 1)
    got = attend_with_row(codes, q, k, v.shape[3], mask, is_causal, row)
    inputs = inputs_of(codes, plan, (q.shape[3], v.shape[3]))
    rest = {"precision": precision, "scale": SCALE, "is_causal": is_causal, "fp8": FP8}
    order = in_kernel_order(plan) if name in SAME_STEPS else plan
    expected = attend(inputs, order, codes.options, **rest)
    bound = 5e-3 if name in SAME_STEPS else 0.04
    compare(got, expected, bound, 5e-3 if DEVICE.type == "cuda" else 2e-5)
    unshifted = attend(inputs._replace(score_shift=None), order, codes.options, **rest)
    assert relative_error(got[0], unshifted[0]) > 0.1


GOOD = Problem("forward", "cuda", "sm_90", torch.bfloat16, 128, 128, 64, 64, precision="fp8")


def refusal(monkeypatch, options: dict | None = None, **changes) -> str | None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = QuantizationOptions(**(options or {}))
    return triton_backend._supports(Problem(**{**vars(GOOD), **changes, "quantization": chosen}))


@pytest.mark.parametrize("arch", sorted(launch_tables.SHARED_MEMORY))
def test_precisions_of_every_chip(arch, monkeypatch):
    has_fp8 = arch not in ("sm_80", "sm_86", "gfx90a", "gfx1100")
    for precision in QUANTIZED_PRECISIONS:
        reason = refusal(monkeypatch, arch=arch, precision=precision)
        if has_fp8 or precision == "sage_fp16":
            assert reason is None
            grain = 64
            assert launch_tables.launch_row(arch, precision, 256, 1, grain).step >= 32
        else:
            assert reason == f"precision {precision!r}: {arch} has no FP8 matrix units"


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"smooth_q": True, "granularity": "per_head"}, {}, "smooth_q with granularity 'per_head'"),
        ({"hadamard": True, "granularity": "per_head"}, {}, "hadamard with granularity 'per_head'"),
        ({"pv_accumulation": "fp32+fp16"}, {}, "Triton has no FP8 products with fp16 sums"),
        (
            {"pv_accumulation": "fp16+fp32"},
            {"precision": "sage_fp16", "arch": "gfx942"},
            "gfx942 has no fp16 products with fp16 sums",
        ),
        ({}, {"arch": "sm_75"}, "sm_75 is not one of"),
        ({}, {"head_dim_v": 257}, "head_dim of v 257 is larger than 256"),
        ({}, {"dtype": torch.float64}, "dtype torch.float64"),
    ],
)
def test_refusals(options, changes, reason, monkeypatch):
    assert reason in refusal(monkeypatch, options, **changes)


def test_the_backend_serves_every_granularity(monkeypatch):
    for granularity in GRANULARITIES:
        assert refusal(monkeypatch, {"granularity": granularity, "smooth_v": True}) is None
