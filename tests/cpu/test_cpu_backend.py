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
from far_memory import far_view
from oracle import Case, Result, attention_oracle, check_against_oracle
from problems import require_backend
from token_masks import causal_tokens
from torch import Tensor

from video_attn import BlockMask, attention, native
from video_attn.backends import cpu
from video_attn.registry import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _backend_is_here() -> None:
    require_backend("cpu")


@pytest.fixture
def threads():
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_case(
    *,
    heads: int = 2,
    kv_heads: int = 2,
    length: int = 300,
    head_dim: int = 40,
    block_size: int = 16,
    keep: float = 0.4,
    dtype: torch.dtype = torch.float32,
    with_lens: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """q, k, v that want gradients, and a mask with other lists for every head."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, length, head_dim, generator=g).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    blocks = -(-length // block_size)
    lens = None
    if with_lens:
        lens = torch.randint(0, block_size + 1, (2, blocks), generator=g, dtype=torch.int32)
    mask = BlockMask.from_dense(
        torch.rand(2, heads, blocks, blocks, generator=g) < keep,
        block_size, block_size, lens, lens, q_len=length, kv_len=length,
    )  # fmt: skip
    return q, k, v, mask


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, **options: bool) -> list[Tensor]:
    """out, lse, dq, dk, dv of the C++ backend for the loss sum(out * weight) + sum(lse)."""
    out, lse = attention(q, k, v, mask, return_lse=True, backend="cpu", **options)
    weight = torch.linspace(-1, 1, out.shape[-1]).to(out.dtype).expand(out.shape)
    seen = lse.masked_fill(lse.isneginf(), 0).sum()
    grads = torch.autograd.grad((out * weight).sum().float() + seen, (q, k, v))
    return [out.detach(), lse.detach(), *grads]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit."""
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert torch.equal(x, y), f"{name} differs by up to {(x - y).abs().max()}"
        assert not x.isnan().any(), name


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


# -- what is never read ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_changes_nothing(dtype: torch.dtype):
    """NaN in unlisted key blocks and past valid lengths: the same bits as with ordinary numbers."""
    size, length = 24, 300
    q, k, v, mask = random_case(length=length, block_size=size, dtype=dtype, with_lens=True)
    keep = mask.to_dense()
    keep[..., 3] = keep[..., 7] = False  # key blocks that nobody lists
    mask = BlockMask.from_dense(
        keep, size, size, mask.q_block_lens, mask.kv_block_lens, q_len=length, kv_len=length
    )
    expected = run(q, k, v, mask)
    seen = mask.to_token_mask()
    keys_unread = ~seen.any(-2).any(1)
    queries_invalid = torch.arange(length) % size >= mask.q_lens().repeat_interleave(size, 1)[
        :, :length
    ]  # fmt: skip
    assert keys_unread.any() and queries_invalid.any()
    k, v = (
        x.detach().masked_fill(keys_unread[:, None, :, None], torch.nan).requires_grad_()
        for x in (k, v)
    )
    q = q.detach().masked_fill(queries_invalid[:, None, :, None], torch.nan).requires_grad_()
    assert_same(run(q, k, v, mask), expected)


def test_nan_key_reaches_only_its_queries():
    q, k, v, mask = random_case(heads=1, kv_heads=1, keep=0.3)
    k = k.detach().clone()
    k[1, 0, 40] = torch.nan
    out, lse = attention(q.detach(), k, v.detach(), mask, return_lse=True, backend="cpu")
    touched = mask.to_token_mask()[:, 0, :, 40] & torch.tensor([False, True])[:, None]
    assert touched.any() and not touched.all()
    assert torch.equal(out.isnan().all(-1)[:, 0], touched)
    assert torch.equal(out.isnan().any(-1)[:, 0], touched)
    assert torch.equal(lse.isnan()[:, 0], touched)


# -- strides, offsets, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "head", "row"])
def test_offsets_past_2_31(far: int):
    """Inputs and outputs whose elements lie further apart than 32 bits can say."""
    dtype = torch.bfloat16
    near = [torch.randn(2, 2, 40, 16).to(dtype) for _ in range(3)]
    mask = random_case(length=40, block_size=16)[3]
    scale, sizes = 0.25, (None, None, 16, 16)
    lists = (mask.kv_num_blocks, mask.kv_indices)
    out, lse = torch.empty(2, 2, 40, 16, dtype=dtype), torch.empty(2, 2, 40)
    op = torch.ops.video_attn.cpu_attention_forward
    op(*near, *lists, *sizes, scale, False, out, lse)
    grads = [torch.empty_like(x) for x in near]
    backward = torch.ops.video_attn.cpu_attention_backward
    transposed = mask.transposed()
    backward(near[0], None, *near, out, lse, *transposed, *sizes, scale, False, *grads)

    def in_far_memory(x: Tensor) -> Tensor:
        return far_view((2, 2, 40, 16), far, dtype).copy_(x)

    for n in range(3):  # one far tensor at a time: each is 4 GiB of addresses
        inputs = list(near)
        inputs[n] = in_far_memory(near[n])
        far_lse = torch.empty_like(lse)
        far_out = in_far_memory(torch.zeros_like(out)) if n == 0 else torch.empty_like(out)
        op(*inputs, *lists, *sizes, scale, False, far_out, far_lse)
        assert torch.equal(far_out, out) and torch.equal(far_lse, lse)
        far_grads = [torch.empty_like(x) for x in near]
        far_grads[n] = in_far_memory(torch.zeros_like(near[n]))
        backward(near[0], None, *inputs, out, lse, *transposed, *sizes, scale, False, *far_grads)
        for x, y in zip(far_grads, grads, strict=True):
            assert torch.equal(x, y)


MEMORY_SCRIPT = """
import resource
import torch
from video_attn import BlockMask, attention

torch.set_num_threads(2)
attention(*(torch.randn(1, 1, 64, 128) for _ in range(3)), backend="cpu")  # loads everything
tokens, size = 2**33, 2**22
q = torch.randn(1, 1, 64, 128)
k, v = (torch.randn(1, 1, 1, 128).expand(1, 1, tokens, 128) for _ in range(2))
mask = BlockMask.from_indices(
    torch.tensor([3, 2047], dtype=torch.int32).view(1, 1, 1, 2), 64, size, q_len=64, kv_len=tokens,
    kv_block_lens=torch.full((1, 2048), 70, dtype=torch.int32),
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attention(q, k, v, mask, backend="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
torch.testing.assert_close(out, v[:, :, :64])  # the keys are all the same
"""


def test_memory_follows_the_attended_blocks():
    """8 billion keys, of which 2 blocks of 70 are seen: megabytes, not terabytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 64, f"{done.stdout.strip()} MiB more"


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


# -- bad lists -------------------------------------------------------------------------------------


def _with(**changes: object) -> Callable[[BlockMask], BlockMask]:
    return lambda mask: replace(mask, _transpose=None, **changes)


def _changed(name: str, value: int) -> Callable[[BlockMask], BlockMask]:
    def change(mask: BlockMask) -> BlockMask:
        lists = getattr(mask, name).clone()
        lists.view(-1)[1] = value
        return replace(mask, **{name: lists})

    return change


BAD_LISTS = {
    "index-too-large": (_changed("kv_indices", 4), r"kv_indices\[0, 0, 0, 1\].*below 4, got 4"),
    "index-negative": (_changed("kv_indices", -1), r"kv_indices\[0, 0, 0, 1\].*got -1"),
    "index-twice": (_changed("kv_indices", 0), r"ascending and below 4, got 0 after 0"),
    "count-too-large": (_changed("kv_num_blocks", 5), r"kv_num_blocks\[0, 0, 1\].*0 to 4, got 5"),
    "count-negative": (_changed("kv_num_blocks", -2), r"kv_num_blocks\[0, 0, 1\].*got -2"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_list_is_named(name: str):
    """Values of lists are read nowhere else: without this check they would be wild pointers."""
    change, message = BAD_LISTS[name]
    q, k, v, mask = random_case(length=64, block_size=16, keep=1.1)
    assert attention(q, k, v, mask, backend="cpu").isfinite().all()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        attention(q, k, v, change(mask), backend="cpu")


def test_bad_transpose_is_named():
    """Backward checks the lists that it reads itself."""
    q, k, v, mask = random_case(length=64, block_size=16, keep=1.1)
    counts, indices = mask.transposed()
    indices = indices.clone()
    indices[1, 1, 2, 3] = 9
    mask = replace(mask, _transpose=(counts, indices))
    out = attention(q, k, v, mask, backend="cpu")
    with pytest.raises(ValueError, match=r"q_indices\[1, 1, 2, 3\].*below 4, got 9 after 2"):
        out.sum().backward()


def test_direct_call_is_checked():
    """The operators do not trust their caller with memory."""
    q = torch.randn(1, 2, 32, 8)
    out, lse = torch.empty_like(q), torch.empty(1, 2, 32)
    none = (None, None, None, None, 0, 0)
    forward = torch.ops.video_attn.cpu_attention_forward
    forward(q, q, q, *none, 0.3, False, out, lse)
    bad = (
        ((q, q[:, :, :, :4], q), (out, lse), ValueError, "k must have the head_dim of q, 8, got 4"),
        ((q, q, q[:, :, :9]), (out, lse), ValueError, "v must have the heads and tokens of k"),
        ((q, q.mT.contiguous().mT, q), (out, lse), ValueError, "k must have stride 1"),
        ((q, q.half(), q), (out, lse), TypeError, "k must be Float, got Half"),
        ((q, q, q), (out[:, :1], lse), ValueError, "out must be"),
        ((q, q, q), (out, lse.double()), TypeError, "lse must be Float, got Double"),
        ((q, q, q), (out, lse[:, :1]), ValueError, "lse must be"),
        ((q.double(),) * 3, (out.double(), lse), TypeError, "float32, bfloat16 or float16"),
    )
    for inputs, outputs, error, message in bad:
        with pytest.raises(error, match=message):
            forward(*inputs, *none, 0.3, False, *outputs)
