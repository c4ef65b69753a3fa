"""What is special to the C++ backend: capabilities, threads, strides, memory, what is never read.

Its numbers are tested in test_attention.py, on the random problems of all backends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu_cases import DTYPES, assert_same, random_case, run
from oracle import Case, Result, attention_oracle, check_against_oracle
from token_masks import causal_tokens

from video_attn import BlockMask, attention, native
from video_attn.backends import cpu
from video_attn.registry import Problem

TESTS = Path(__file__).parents[1]


@pytest.fixture
def threads():
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- capabilities ----------------------------------------------------------------------------------

CAPABILITY_SCRIPT = """
import sys
import torch
from oracle import check_against_oracle
from problems import random_problems, run_attention
from quantized_cases import MASKS, check_kernel
from video_attn.backends import cpu
from video_attn.quantize import QUANTIZED_PRECISIONS

torch.set_num_threads(1)
dtypes = (torch.float32, torch.bfloat16, torch.float16)
for problem in random_problems(18, seed=7, dtypes=dtypes, max_len=200, max_heads=2):
    built = problem.build()
    check_against_oracle(run_attention(built, "cpu"), built, str(problem))
for n, name in enumerate(MASKS):
    check_kernel("cpu", QUANTIZED_PRECISIONS[n % 3], name)
print(torch.backends.cpu.get_cpu_capability(), "|", cpu.description())
"""


@pytest.mark.parametrize("wish", ["default", "avx2"])
def test_lesser_capability(wish: str):
    """The kernels for lesser CPUs are right too, and run when torch is told to run its own."""
    here = torch.backends.cpu.get_cpu_capability()
    if here not in ("DEFAULT", "AVX2", "AVX512") or (wish == "avx2" and here == "DEFAULT"):
        pytest.skip(f"this CPU has no capability {wish} below its own, {here}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": wish, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_SCRIPT],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    of_torch, ours = done.stdout.strip().splitlines()[-1].split(" | ")
    assert of_torch == wish.upper()
    as_float = ("bfloat16 multiplied", "float16", "int8 codes", "float8 codes")
    assert ours == f"{of_torch}, " + ", ".join(f"{name} as float32" for name in as_float)


def test_description_follows_torch():
    capability = torch.backends.cpu.get_cpu_capability()
    known = capability in ("AVX2", "AVX512")
    assert cpu.description().startswith(capability if known else "DEFAULT")


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, from flags()
def test_without_mkldnn():
    """Where torch may not use oneDNN, bf16 goes through fp32 products; the result is as good."""
    q, k, v, mask = random_case(dtype=torch.bfloat16)
    expected = run(q, k, v, mask)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "bfloat16 multiplied as float32" in cpu.description()
        got = run(q, k, v, mask)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=0.03, rtol=0.03)


def test_supports_is_pure():
    problem = Problem("forward", "cpu", "cpu", torch.bfloat16, 72, 200, 100, 8)
    assert cpu._supports(problem) is None
    assert cpu._supports(replace(problem, device_type="cuda")) == "device cuda is not cpu"
    for changed, words in (
        (replace(problem, precision="fp8", direction="backward"), "precision 'fp8'"),
        (replace(problem, dtype=torch.float64), "dtype torch.float64"),
    ):
        assert words in str(cpu._supports(changed))


def test_absent_component_is_the_reason(monkeypatch: pytest.MonkeyPatch):
    gone = native.Component("cpu", False, "component cpu is not part of this install")
    monkeypatch.setattr(native, "component", lambda name: gone)
    assert cpu._available() == gone.reason
    with pytest.raises(RuntimeError, match="not part of this install"):
        cpu.description()


# -- repeatable ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bitwise_repeatable(dtype: torch.dtype, kv_heads: int, threads: Callable[[int], None]):
    threads(4)  # the keys of a head are cut among them: 4 sums of dq are added
    q, k, v, mask = random_case(length=520, kv_heads=kv_heads, dtype=dtype, with_lens=True)
    expected = run(q, k, v, mask)
    for _ in range(4):
        assert_same(run(q, k, v, mask), expected)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_number_of_threads(kv_heads: int, threads: Callable[[int], None]):
    """dq is summed in another order, everything else is the same bit by bit."""
    q, k, v, mask = random_case(heads=4, kv_heads=kv_heads, length=400, with_lens=True)
    threads(1)
    out, lse, dq, dk, dv = run(q, k, v, mask)
    for count in (2, 3, 5):
        threads(count)
        got = run(q, k, v, mask)
        torch.testing.assert_close(got[2], dq, atol=2e-6, rtol=2e-5)
        got[2] = dq
        assert_same(got, [out, lse, dq, dk, dv])


def test_callers_in_parallel():
    """Several Python threads at once, each with its own problem."""
    cases = [random_case(seed=seed, with_lens=True) for seed in range(4)]
    expected = [run(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for got, right in zip(
            pool.map(lambda case: run(*case), cases * 3), expected * 3, strict=True
        ):
            assert_same(got, right)


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (3, 255), (255, 3), (256, 17)])
def test_odd_head_dims(head_dim: int, head_dim_v: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(head_dim)
    q, k, v, grad = (
        torch.randn(1, 2, 90, d, generator=g).to(dtype)
        for d in (head_dim, head_dim, head_dim_v, head_dim_v)
    )
    _, _, _, mask = random_case(length=90, block_size=30)
    keep = mask.to_dense()[:1]
    mask = BlockMask.from_dense(keep, 30, 30, q_len=90, kv_len=90)
    check_case(Case(q, k, v, mask.to_token_mask(), None, grad), mask)


@pytest.mark.parametrize(("q_len", "kv_len"), [(130, 200), (200, 130), (65, 9), (1, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal(q_len: int, kv_len: int, dtype: torch.dtype):
    """Aligned at the bottom right; queries before the first key see nothing."""
    g = torch.Generator().manual_seed(q_len)
    q, k, v, grad = (
        torch.randn(1, 2, n, 24, generator=g).to(dtype) for n in (q_len, kv_len, kv_len, q_len)
    )
    check_case(Case(q, k, v, causal_tokens(q_len, kv_len), None, grad), None, is_causal=True)


def check_case(case: Case, mask: BlockMask | None, **options: bool) -> None:
    """The rule of tests/oracle.py, forward and backward."""
    q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = attention(q, k, v, mask, return_lse=True, backend="cpu", **options)
    grads = torch.autograd.grad(out, (q, k, v), case.grad_out)
    check_against_oracle(Result(out.detach(), lse.detach(), *grads), case, str(tuple(q.shape)))


@pytest.mark.parametrize("scale", [1e-50, 1e-30, 3.0, 200.0])
def test_extreme_scales(scale: float):
    q, k, v, mask = random_case(keep=0.5)
    out, lse = attention(q, k, v, mask, scale=scale, return_lse=True, backend="cpu")
    expected, expected_lse = attention_oracle(q, k, v, mask.to_token_mask(), scale)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)
