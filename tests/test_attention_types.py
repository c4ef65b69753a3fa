"""The table of names: what each stands for, the order of its backends, calls by name."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from oracle import attention_oracle
from quantized_cases import ERROR_BOUND, check, problem, qkv, tokens_of
from torch import Tensor
from torch.nn import functional as F

from video_attn import (
    attention,
    attention_types,
    named_attention,
    resolve_attention_type,
    use_backend,
)
from video_attn.attention_types import ATTENTION_TYPES, TORCH_SDPA
from video_attn.quantize import QuantizationOptions
from video_attn.registry import Problem, backends, check_backend_name
from video_attn.tools import info

NAMES = ("sdpa", "sagev1", "fav2", "fav3", "fav3_fp8", "fav3_sage")
PRECISIONS = dict(
    zip(NAMES, ("native", "sage_fp16", "native", "native", "fp8", "sage_fp8"), strict=True)
)
DENSE = Problem("forward", "cpu", "cpu", torch.bfloat16, 64, 64)


def gpu(arch: str, **changes: Any) -> Problem:
    return dataclasses.replace(DENSE, device_type="cuda", arch=arch, **changes)


def pretend_everything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends say what they support, not what this machine has."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rows = [dataclasses.replace(row, available=lambda: None) for row in backends()]
    monkeypatch.setattr(attention_types, "registered_backends", lambda: rows)
    attention_types._first.cache_clear()


def test_the_table_has_the_names_that_people_use():
    assert tuple(ATTENTION_TYPES) == NAMES
    for name, row in ATTENTION_TYPES.items():
        assert resolve_attention_type(name) is row and row.name == name
        assert row.precision == PRECISIONS[name]
        assert (row.backends == (TORCH_SDPA,)) == (name == "sdpa")
        for backend in set(row.backends) - {TORCH_SDPA}:
            check_backend_name(backend)
        if name != "sdpa":
            assert row.backends[-1] == "reference", "something must serve it everywhere"


@pytest.mark.parametrize("name", ["sage", "SDPA", "", "fav3-fp8"])
def test_an_unknown_name_lists_all(name):
    with pytest.raises(ValueError, match=", ".join(NAMES)):
        resolve_attention_type(name)
    with pytest.raises(ValueError, match="attention_type must be one of"):
        named_attention(*qkv(), name)


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match="attention_type"):
        resolve_attention_type(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "arch", "expected"),
    [
        ("sagev1", "sm_80", "cuda_sage"),
        ("fav3_sage", "sm_89", "cuda_sage"),
        ("fav3_fp8", "sm_90", "cuda_sage"),
        ("fav2", "sm_90", "triton"),
        ("fav3", "sm_80", "triton"),
        ("fav2", "gfx942", "triton"),
    ],
)
def test_order_of_the_backends(name, arch, expected, monkeypatch):
    pretend_everything_is_built(monkeypatch)
    row = resolve_attention_type(name)
    assert row.choose(gpu(arch)) == expected
    verdicts = row.why_not(gpu(arch))
    assert [v.backend for v in verdicts] == list(row.backends)
    assert [v.backend for v in verdicts if v.chosen] == [expected]
    for verdict in verdicts[: row.backends.index(expected)]:
        assert verdict.reason
    attention_types._first.cache_clear()


def test_the_next_of_the_order_serves_and_says_why(caplog):
    attention_types._first.cache_clear()
    with caplog.at_level(logging.INFO, "video_attn"):
        chosen = resolve_attention_type("sagev1").choose(DENSE)
    assert chosen in ("cpu", "reference")
    assert f"sagev1 runs on {chosen}" in caplog.text and "cuda_sage: " in caplog.text


def test_nothing_serves_is_an_error_with_every_reason():
    question = dataclasses.replace(DENSE, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"(?s)'sagev1'.*cuda_sage: .*cpu: .*reference: .*float64"
    ):
        resolve_attention_type("sagev1").choose(question)


def test_a_forced_backend_has_more_authority():
    with use_backend("reference"):
        assert resolve_attention_type("fav2").choose(DENSE) == "reference"


def test_info_shows_the_names():
    rows = info.collect()["attention types"]
    assert [row["name"] for row in rows if row["on"] == "cpu"] == list(NAMES)
    by_name = {row["name"]: row for row in rows if row["on"] == "cpu"}
    assert by_name["sdpa"]["backend"] == TORCH_SDPA
    assert by_name["sagev1"]["precision"] == "sage_fp16:granularity=per_block"
    assert by_name["fav3"]["backend"] in ("cpu", "reference")
    assert any("hopper: " in reason for reason in by_name["fav3"]["why not those before"])


# -- calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", NAMES)
def test_dense_calls(name, layout, is_causal):
    q, k, v = qkv(heads=(4, 2), lengths=(90, 150))
    exact, _ = attention_oracle(q, k, v, tokens_of(None, q, k, is_causal), 0.2)
    inputs = [x.transpose(1, 2).contiguous() for x in (q, k, v)] if layout == "bshd" else [q, k, v]
    out = named_attention(*inputs, name, scale=0.2, is_causal=is_causal, layout=layout)
    out = out.transpose(1, 2) if layout == "bshd" else out
    bound = 1e-5 if PRECISIONS[name] == "native" else 1.4 * ERROR_BOUND[PRECISIONS[name]]
    check(PRECISIONS[name], out, exact, bound)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sdpa"])
def test_sparse_calls_are_attention_with_the_types_recipe(name):
    q, k, v, mask = problem("lists-64-gqa")
    row = ATTENTION_TYPES[name]
    out, lse = named_attention(q, k, v, name, mask, return_lse=True)
    expected = attention(
        q, k, v, mask, precision=row.precision, quantization=row.quantization, return_lse=True
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert mask is not None
    exact, _ = attention_oracle(q, k, v, mask.to_token_mask())
    bound = 1e-5 if row.precision == "native" else 1.5 * ERROR_BOUND[row.precision]
    check(row.precision, out, exact, bound)


def test_options_in_place_of_the_types_own():
    q, k, v = qkv()
    options = QuantizationOptions(smooth_k=False)
    got = named_attention(q, k, v, "sagev1", quantization=options)
    assert torch.equal(got, attention(q, k, v, precision="sage_fp16", quantization=options))
    assert not torch.equal(got, named_attention(q, k, v, "sagev1"))


@pytest.mark.parametrize(
    ("error", "match", "name", "options"),
    [
        (ValueError, "mask", "sdpa", {"mask": problem("lists-64")[3]}),
        (ValueError, "return_lse", "sdpa", {"return_lse": True}),
        (TypeError, "is_causal", "sdpa", {"is_causal": 1}),
        (ValueError, "layout", "sdpa", {"layout": "HND"}),
        (ValueError, "scale", "sdpa", {"scale": 0.0}),
        (TypeError, "mask", "fav2", {"mask": torch.ones(2, 2)}),
        (ValueError, "quantization", "fav2", {"quantization": QuantizationOptions()}),
        (TypeError, "quantization", "sagev1", {"quantization": "per_block"}),
        (TypeError, "precision", "sagev1", {"precision": "fp8"}),
    ],
)
def test_refusals(error, match, name, options):
    with pytest.raises(error, match=match):
        named_attention(*qkv(), name, **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "fav3", "fav3_sage"])
def test_fullgraph(name, dynamic):
    q, k, v = qkv()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return named_attention(q * 2, k, v, name)

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    out = compiled(q, k, v)
    assert torch.allclose(out, model(q, k, v), atol=1e-6)
    check(name, out, F.scaled_dot_product_attention(q * 2, k, v), 0.08)


def test_sdpa_has_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(heads=(2, 1)))
    named_attention(q, k, v, "sdpa").sum().backward()
    plain = F.scaled_dot_product_attention(*(x.detach() for x in (q, k, v)), enable_gqa=True)
    assert q.grad is not None and torch.equal(named_attention(q, k, v, "sdpa").detach(), plain)
