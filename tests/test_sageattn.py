"""sageattn and sageattn_varlen: SDPA's answer, every argument honoured or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle import attention_oracle
from problems import require_backend
from quantized_cases import ERROR_BOUND, check, normal, qkv, relative_error, tokens_of
from token_masks import causal_tokens
from torch import Tensor
from torch.nn import functional as F

import video_attn
from video_attn import attention, native, sageattn, sageattn_varlen, use_backend
from video_attn.quantize import QuantizationOptions

BOUND = ERROR_BOUND["sage_fp8"]


def nhd(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


# -- sageattn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (40, 40), (96, 128), (160, 160)])
def test_is_sdpa_in_both_layouts(dims, dtype):
    q, k, v = qkv(batch=2, heads=(4, 2), lengths=(70, 200), dims=dims, dtype=dtype)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True)
    out = sageattn(q, k, v)
    assert out.dtype == dtype
    check("sage_fp8", out, expected)
    swapped = sageattn(*nhd(q, k, v), tensor_layout="NHD")
    assert swapped.is_contiguous() and torch.equal(swapped.transpose(1, 2), out)
    assert torch.equal(sageattn(q, k, v, "HND", False, None, False), out)  # by position


def test_causal_scale_and_lse():
    q, k, v = qkv(lengths=(150, 150))
    out, lse = sageattn(q, k, v, is_causal=True, sm_scale=0.3, return_lse=True)
    expected, expected_lse = attention_oracle(q, k, v, causal_tokens(150, 150), 0.3)
    check("sage_fp8", out, expected)
    assert lse.shape == (1, 2, 150) and lse.dtype == torch.float32
    assert (lse - expected_lse).abs().max() < 0.1
    plain = sageattn(q, k, v)
    for changed in ({"is_causal": True}, {"sm_scale": 0.3}):
        assert relative_error(sageattn(q, k, v, **changed), plain) > 0.1


def test_smooth_k_is_honoured_and_nothing_changes_in_place():
    q, k, v = qkv(lengths=(100, 300), dims=(128, 128))
    k[..., :8] += 12.0 * torch.tensor([1.0, -1.0] * 4)
    copies = [x.clone() for x in (q, k, v)]
    exact, _ = attention_oracle(q, k, v, tokens_of(None, q, k))
    smooth, rough = (
        relative_error(sageattn(q, k, v, smooth_k=chosen, precision="sage_fp16"), exact)
        for chosen in (True, False)
    )
    assert smooth < 0.02 and rough > 1.5 * smooth
    for x, copy in zip((q, k, v), copies, strict=True):
        assert torch.equal(x, copy)


def test_precision_is_the_best_that_a_kernel_serves(monkeypatch):
    q, k, v = qkv()
    with use_backend("reference"):
        assert torch.equal(sageattn(q, k, v), attention(q, k, v, precision="sage_fp8"))
    gone = native.Component("cpu", False, "component cpu is not part of this install")
    with monkeypatch.context() as patch:
        patch.setattr(native, "component", lambda name: gone)
        patch.setenv("TRITON_INTERPRET", "0")
        video_attn.registry.forget_choices()
        expected = attention(q, k, v, precision="sage_fp16", backend="reference")
        assert torch.equal(sageattn(q, k, v), expected)
    video_attn.registry.forget_choices()
    require_backend("cpu")
    exact = F.scaled_dot_product_attention(q, k, v)
    for chosen, precision in ((None, "sage_fp8"), ("sage_fp16", "sage_fp16")):
        expected = attention(q, k, v, precision=precision, backend="cpu")
        assert torch.equal(sageattn(q, k, v, precision=chosen), expected)
        check(precision, expected, exact)


def test_a_callers_mask_and_dropout_may_be_absent():
    q, k, v = qkv()
    out = sageattn(q, k, v, attn_mask=None, dropout_p=0)
    check("sage_fp8", out, F.scaled_dot_product_attention(q, k, v))


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "mask": (ValueError, "attn_mask", {"attn_mask": torch.ones(200, 200, dtype=torch.bool)}),
    "dropout": (ValueError, "dropout_p", {"dropout_p": 0.1}),
    "dropout type": (TypeError, "dropout_p", {"dropout_p": "none"}),
    "layout": (ValueError, "tensor_layout must be 'HND' or 'NHD'", {"tensor_layout": "BHSD"}),
    "mask as layout": (TypeError, "tensor_layout", {"tensor_layout": torch.ones(2)}),
    "scale": (ValueError, "scale", {"sm_scale": -1.0}),
    "causal": (TypeError, "is_causal", {"is_causal": 1}),
    "lse": (TypeError, "return_lse", {"return_lse": None}),
    "smooth_k": (TypeError, "smooth_k", {"smooth_k": 1}),
    "precision": (ValueError, "sage_fp8, sage_fp16", {"precision": "fp8"}),
    "backend": (ValueError, "backend", {"backend": "cuda"}),
    "scale by another name": (TypeError, "scale", {"scale": 0.3}),
    "gqa flag": (TypeError, "enable_gqa", {"enable_gqa": True}),
    "old option": (TypeError, "pv_accum_dtype", {"pv_accum_dtype": "fp32"}),
    "k": (TypeError, "k must be a Tensor", {"k": None}),
    "q": (ValueError, "q must be", {"q": torch.ones(200, 64)}),
    "v": (TypeError, "v must have the dtype of q", {"v": torch.ones(1, 2, 200, 64).half()}),
}


@pytest.mark.parametrize("name", BAD)
def test_sageattn_refuses(name):
    error, match, arguments = BAD[name]
    inputs = dict(zip("qkv", qkv(), strict=True))
    with pytest.raises(error, match=match):
        sageattn(**{**inputs, **arguments})


def test_gradients_are_refused_not_zero():
    q, k, v = (x.requires_grad_() for x in qkv())
    with pytest.raises(ValueError, match="no backward pass"):
        sageattn(q, k, v)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"tensor_layout": "NHD", "is_causal": True}])
def test_fullgraph(options, dynamic):
    q, k, v = nhd(*qkv(lengths=(90, 90))) if options else qkv(lengths=(90, 90))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sageattn(q * 2, k, v, **options) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    out = compiled(q, k, v)
    assert torch.equal(out, model(q, k, v))
    causal = options.get("is_causal", False)
    heads = [x.transpose(1, 2) for x in (q, k, v)] if options else [q, k, v]
    exact, _ = attention_oracle(
        heads[0] * 2, *heads[1:], tokens_of(None, heads[0], heads[1], causal)
    )
    check("sage_fp8", (out - 1).transpose(1, 2) if options else out - 1, exact)


# -- sageattn_varlen -------------------------------------------------------------------------------

LENGTHS = ((70, 1, 130, 0, 64), (90, 65, 64, 7, 0))  # of queries and keys; empty ones too


def packed(heads: tuple[int, int] = (4, 2)) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, v) of all sequences, and (cu_seqlens_q, cu_seqlens_k)."""
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in LENGTHS]
    tokens = [int(x[-1]) for x in starts]
    tensors = [
        normal(n, h, 64, seed=seed)
        for seed, (n, h) in enumerate(
            ((tokens[0], heads[0]), (tokens[1], heads[1]), (tokens[1], heads[1]))
        )
    ]
    return tensors, starts


@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen_is_attention_sequence_by_sequence(is_causal):
    (q, k, v), starts = packed()
    out = sageattn_varlen(q, k, v, *starts, 130, 90, is_causal, 0.2)
    assert out.shape == q.shape and out.dtype == q.dtype
    for n in range(len(LENGTHS[0])):
        rows, keys = (slice(int(x[n]), int(x[n + 1])) for x in starts)
        if LENGTHS[0][n] == 0:
            continue
        if LENGTHS[1][n] == 0:
            assert (out[rows] == 0).all()
            continue
        each = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        tokens = tokens_of(None, each[0], each[1], is_causal)
        exact, _ = attention_oracle(*each, tokens, 0.2)
        check("sage_fp8", out[rows].transpose(0, 1)[None], exact, 1.5 * BOUND)
    assert relative_error(sageattn_varlen(q, k, v, *starts, 130, 90), out) > 0.05


def test_varlen_honours_smooth_k_precision_and_backend():
    (q, k, v), starts = packed()
    k[..., :8] += 12.0
    plain = sageattn_varlen(q, k, v, *starts, 130, 90)
    rough = {"smooth_k": False}
    for options in (rough, {"precision": "sage_fp16"}, {"precision": "sage_fp16"} | rough):
        assert not torch.equal(sageattn_varlen(q, k, v, *starts, 130, 90, **options), plain)
    recipe = {"precision": "sage_fp16", "backend": "reference"}
    got = sageattn_varlen(q, k, v, *starts, 130, 90, **recipe)
    first = [x[None, :n] for x, n in ((q, 70), (k, 90), (v, 90))]
    expected = attention(*first, layout="bshd", quantization=QuantizationOptions(), **recipe)
    assert torch.equal(got[:70], expected[0])
    quick = sageattn_varlen(q, k, v, *starts, 130, 90, precision="sage_fp16")
    assert relative_error(quick, got) < 6e-3


def starts(*values: int) -> Tensor:
    return torch.tensor(values)


BAD_VARLEN: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "mask": (ValueError, "attn_mask", {"attn_mask": torch.ones(2, 2)}),
    "unknown": (TypeError, "return_lse", {"return_lse": True}),
    "q": (ValueError, r"q must be \[tokens, heads, D\]", {"q": torch.ones(1, 265, 4, 64)}),
    "v": (ValueError, "v must have as many tokens as k", {"v": torch.ones(225, 2, 64)}),
    "dtype": (TypeError, "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0.0, 265.0])}),
    "list": (TypeError, "cu_seqlens_k", {"cu_seqlens_k": [0, 226]}),
    "shape": (ValueError, "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([[0, 226]])}),
    "start": (ValueError, "must ascend", {"cu_seqlens_q": starts(1, 70, 71, 201, 201, 265)}),
    "end": (ValueError, "must ascend", {"cu_seqlens_q": starts(0, 70, 71, 201, 201, 266)}),
    "order": (ValueError, "must ascend", {"cu_seqlens_q": starts(0, 70, 60, 201, 201, 265)}),
    "count": (ValueError, "as many", {"cu_seqlens_k": starts(0, 90, 226), "max_seqlen_k": 136}),
    "longest q": (ValueError, "max_seqlen_q must be at least 130", {"max_seqlen_q": 129}),
    "longest k": (ValueError, "max_seqlen_k must be at least 90", {"max_seqlen_k": 64}),
    "longest": (TypeError, "max_seqlen_k", {"max_seqlen_k": 90.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VARLEN)
def test_varlen_refuses(name):
    error, match, changed = BAD_VARLEN[name]
    (q, k, v), (starts_q, starts_k) = packed()
    arguments = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k,
        "max_seqlen_q": 130, "max_seqlen_k": 90,
    }  # fmt: skip
    sageattn_varlen(**arguments)
    with pytest.raises(error, match=match):
        sageattn_varlen(**{**arguments, **changed})


# -- calls as other programs make them -------------------------------------------------------------


def test_varlen_takes_longest_lengths_of_any_kind():
    q = normal(1, 2, 67, 16)[0].transpose(0, 1)
    starts = torch.tensor([0, 30, 67])
    expected = sageattn_varlen(q, q, q, starts, starts, 37, 37)
    for longest in (torch.tensor(37), np.int64(37), np.int32(40)):
        assert torch.equal(sageattn_varlen(q, q, q, starts, starts, longest, longest), expected)
    for bad in (37.0, torch.tensor(37.0), True, torch.tensor(True), np.bool_(True), "37"):
        with pytest.raises(TypeError, match="max_seqlen_q must be a whole number"):
            sageattn_varlen(q, q, q, starts, starts, bad, 37)


SAGE = {
    "sageattn_qk_int8_pv_fp16_triton": ("sage_fp16", {"granularity": "per_block"}),
    "sageattn_qk_int8_pv_fp16_cuda": ("sage_fp16", {"granularity": "per_thread"}),
    "sageattn_qk_int8_pv_fp8_cuda": ("sage_fp8", {"granularity": "per_thread"}),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": ("sage_fp8", {"granularity": "per_thread"}),
}


@pytest.mark.parametrize("name", SAGE)
def test_names_of_sage_kernels(name):
    function, (precision, options) = getattr(video_attn, name), SAGE[name]
    q = normal(1, 2, 67, 16)
    choices = video_attn.quantize.QuantizationOptions(**options)
    expected = attention(q, q, q, precision=precision, quantization=choices, return_lse=True)
    for got, wanted in zip(function(q, q, q, return_lse=True), expected, strict=True):
        assert torch.equal(got, wanted)
    turned = q.transpose(1, 2)
    got = function(turned, turned, turned, tensor_layout="NHD", sm_scale=0.1, is_causal=True)
    wanted = attention(
        q, q, q, precision=precision, quantization=choices, scale=0.1, is_causal=True
    )
    assert torch.equal(got.transpose(1, 2), wanted)
    with pytest.raises(TypeError, match="unexpected keyword"):
        function(q, q, q, dropout=0.1)
    for argument in ("pv_accum_dtype", "qk_quant_gran", "quantization_backend"):
        if argument in function.__annotations__:
            with pytest.raises(ValueError, match=f"{argument} must be '"):
                function(q, q, q, **{argument: "fp16"})


def test_sums_of_sage_kernels_are_honoured():
    q = normal(1, 2, 67, 16)
    function = video_attn.sageattn_qk_int8_pv_fp8_cuda
    with video_attn.use_backend("reference"):
        narrow = function(q, q, q, pv_accum_dtype="fp32+fp16")
        wide = function(q, q, q, pv_accum_dtype="fp32+fp32")
        assert not torch.equal(narrow, wide)
        assert torch.equal(function(q, q, q), narrow), "the default where it is served"


@pytest.mark.parametrize("shape", [(2, 67), (2, 1, 1, 67), (1, 67)])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_masks_of_key_padding_become_lengths(shape, layout):
    q = normal(1, 2, 67, 16).repeat(2, 1, 1, 1)
    lens = torch.tensor([67, 40])[: shape[0]]
    attn_mask = (torch.arange(67) < lens[:, None]).view(shape)
    dirty = q.clone()
    dirty[-1, :, int(lens[-1]) :] = torch.nan
    x = (q, dirty, dirty)
    x = tuple(y.transpose(1, 2) for y in x) if layout == "NHD" else x
    got = sageattn(*x, layout, attn_mask=attn_mask, precision="sage_fp16", backend="reference")
    got = got.transpose(1, 2) if layout == "NHD" else got
    for b in range(2):
        n = int(lens[min(b, len(lens) - 1)])
        part = q[b : b + 1]
        expected = sageattn(
            part, part[:, :, :n], part[:, :, :n], precision="sage_fp16", backend="reference"
        )
        torch.testing.assert_close(got[b : b + 1], expected, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(
    ("attn_mask", "message"),
    [
        (torch.ones(1, 67), "bool"),
        (torch.ones(1, 1, 67, 67, dtype=torch.bool), "one row of keys"),
        (torch.ones(1, 2, 1, 67, dtype=torch.bool), "one row of keys"),
        (torch.arange(67)[None] != 5, "Move the padding to the end"),
    ],
)
def test_other_masks_are_refused_with_what_to_do(attn_mask, message):
    q = normal(1, 2, 67, 16)
    with pytest.raises((TypeError, ValueError), match=message):
        sageattn(q, q, q, attn_mask=attn_mask)
    with pytest.raises(ValueError, match="is_causal"):
        sageattn(q, q, q, is_causal=True, attn_mask=torch.ones(1, 67, dtype=torch.bool))
