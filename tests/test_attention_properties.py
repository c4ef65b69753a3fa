"""What holds for attention() beside its values: repeatability, strides, huge offsets, extremes.

``test_hopper_gpu.py`` asks the same of the compiled kernels.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import oracle
import pytest
import token_masks
import torch
from everywhere import CPU, FEW, SMALL, assert_same_bits, bits, build, everywhere
from problem_masks import list_tensors
from problems import require_backend, run_attention

from video_attn import BlockMask, attention, ops
from video_attn.calls import by_heads

# -- repeatability ---------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("problem", FEW, ids=str)
def test_the_same_call_gives_the_same_bits(problem, backend, device):
    built = build(problem, backend, device)
    first = run_attention(built, backend, deterministic=True)
    second = run_attention(built, backend, deterministic=True)
    assert_same_bits(first, second, f"{backend} {problem}")


@everywhere
def test_the_default_is_repeatable_too(backend, device):
    """These backends sum in one order, asked for or not; `hopper` alone may do otherwise."""
    built = build(SMALL, backend, device)
    results = [run_attention(built, backend) for _ in range(3)]
    assert_same_bits(results[0], results[1], backend)
    assert_same_bits(results[0], results[2], backend)


# One head, many key blocks: with several threads the keys are cut, and each part sums its own dq.
CUT = replace(
    SMALL, batch=1, group=1, q_len=120, kv_len=400, q_block_size=16, kv_block_size=16, density=0.9
)


@pytest.mark.parametrize("problem", [*FEW, CUT], ids=str)
def test_cpu_threads_change_nothing_but_the_rounding_of_dq(problem):
    built, threads = build(problem, "cpu", CPU), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run_attention(built, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[2], results[3], "3 threads twice")
    for count, result in zip((2, 3), results[1:], strict=False):
        assert (result.dq - results[0].dq).abs().max() <= 1e-6 * results[0].dq.abs().max() or (
            problem.dtype != torch.float32
        )
        rest = result._replace(dq=results[0].dq)
        assert_same_bits(results[0], rest, f"1 thread against {count}")
    if problem is CUT:
        assert not torch.equal(results[0].dq, results[2].dq), "dq was not cut: choose another"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_calls_from_several_threads_at_once(backend):
    """No state is shared between calls, and one mask may serve them all."""
    built = build(SMALL, backend, CPU)
    expected = run_attention(built, backend)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run_attention(built, backend), range(16)))
    for result in results:
        assert_same_bits(expected, result, backend)


@everywhere
def test_memory_layout_does_not_change_a_bit(backend, device):
    """The same numbers at other strides go through the same arithmetic."""
    expected = run_attention(build(SMALL, backend, device), backend)
    for memory in ("bshd", "bshd-api", "offset", "slack"):
        built = build(replace(SMALL, memory=memory), backend, device)
        assert_same_bits(expected, run_attention(built, backend), memory)


@everywhere
@pytest.mark.parametrize("problem", [SMALL, *FEW[:3]], ids=str)
def test_deterministic_algorithms_of_torch(problem, backend, device, deterministic_algorithms):
    """torch then also fills at::empty in native code with NaN, which Python cannot poison."""
    built = build(problem, backend, device)
    oracle.check_against_oracle(run_attention(built, backend), built, backend)


# -- strides and offsets ---------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("memory", ["bhsd", "bshd", "slack"])
def test_out_has_the_memory_order_of_q(memory, backend, device):
    built = build(replace(SMALL, memory=memory, kv_heads=2), backend, device)
    q, k, v = (x.detach().requires_grad_() for x in built.kernel_inputs)
    out = attention(q, k, v, built.mask, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for name, x, like in (("out", out, q), *zip(("dq", "dk", "dv"), grads, (q, k, v), strict=True)):
        heads_first = x.stride(1) > x.stride(2)
        assert heads_first == (memory != "bshd"), f"{name} has strides {x.stride()}"
        assert x.shape[:3] == like.shape[:3] and x.dtype == like.dtype


@everywhere
def test_backward_of_some_heads_at_a_time(backend, device, monkeypatch):
    """Lists transposed in the backward pass are so for some heads: parts of larger tensors."""
    problem = replace(
        SMALL, dtype=torch.float16, kv_heads=3, head_dim=8, head_dim_v=8,
        q_block_size=8, kv_block_size=8,
    )  # fmt: skip
    built = build(problem, backend, device)
    of = built.mask
    lists = BlockMask.from_indices(
        of.kv_indices, 8, 8, q_len=of.q_len, kv_len=of.kv_len, kv_num_blocks=of.kv_num_blocks,
        q_block_lens=of.q_block_lens, kv_block_lens=of.kv_block_lens,
    )  # fmt: skip
    built = replace(built, mask=lists)
    heads = []

    def spy(*args):
        for part in by_heads(*args):
            heads.append(part.k.shape[1])
            yield part

    monkeypatch.setattr(ops, "by_heads", spy)
    oracle.check_against_oracle(run_attention(built, backend), built, backend)
    assert heads == [1, 1, 1]


@everywhere
def test_inputs_are_not_written(backend, device):
    built = build(SMALL, backend, device)
    tensors = [*built.kernel_inputs, *built.kernel_grads, built.mask.kv_indices]
    before = [bits(x).clone() for x in tensors]
    run_attention(built, backend)
    assert all(torch.equal(b, bits(x)) for b, x in zip(before, tensors, strict=True))


@everywhere
@pytest.mark.parametrize("block_size", [8, 48], ids=["many_blocks", "one_block"])
@pytest.mark.parametrize("axis", ["batch", "heads", "tokens", "start"])
def test_offsets_past_two_billion_elements(axis, block_size, backend, device):
    """The last element lies more than 2**31 elements from the first, each stride below that.

    The storage is never filled, so the system gives memory only for the few pages that are touched.
    """
    require_backend(backend)
    shape, far, head_dim = {"batch": 1, "heads": 1, "tokens": 48}, 3 * 2**30, 8
    if axis in ("batch", "heads"):
        shape[axis] = 3
    row = 4 * head_dim  # q, k, v and the gradient side by side
    strides = {"batch": 48 * row, "heads": 48 * row, "tokens": row}
    start = far if axis == "start" else 0
    if axis != "start":
        strides[axis] = far // (shape[axis] - 1)
        assert strides[axis] < 2**31
    size = start + sum((shape[a] - 1) * strides[a] for a in shape) + row
    storage = torch.empty(size, dtype=torch.float16, device=device)
    generator = torch.Generator().manual_seed(3)
    clean = [torch.randn(*shape.values(), head_dim, generator=generator).half() for _ in range(4)]
    clean = [x.to(device) for x in clean]
    q, k, v, grad_out = (
        storage.as_strided(x.shape, (*strides.values(), 1), start + head_dim * i).copy_(x)
        for i, x in enumerate(clean)
    )
    blocks = 48 // block_size
    lists = [[[{(3 * i) % blocks, (i + 1) % blocks, blocks - 1} for i in range(blocks)]]]
    counts, indices = (x.to(device) for x in list_tensors(lists, blocks))
    mask = BlockMask.from_indices(
        indices, block_size, block_size, q_len=48, kv_len=48, kv_num_blocks=counts
    )
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, mask, backend=backend, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    token_mask = token_masks.listed_tokens(lists, (block_size, block_size), (48, 48))
    case = oracle.Case(*clean[:3], token_mask, None, clean[3])
    result = oracle.Result(out.detach(), lse.detach(), *grads)
    oracle.check_against_oracle(result, case, f"{backend} {axis}")


# -- empty and extreme -----------------------------------------------------------------------------


@everywhere
def test_empty_tensors(backend, device):
    """No batch, no queries, no keys: zeros, -inf, and gradients of the right shape."""
    require_backend(backend)
    for batch, q_len, kv_len in ((0, 4, 4), (2, 0, 4), (2, 4, 0)):
        q, k, v = (
            torch.ones(batch, 2, n, 8, device=device, requires_grad=True)
            for n in (q_len, kv_len, kv_len)
        )
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
        assert out.shape == q.shape and not out.any()
        assert lse.shape == q.shape[:3] and lse.isneginf().all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(
            g.shape == x.shape and not g.any() for g, x in zip(grads, (q, k, v), strict=True)
        )


@everywhere
def test_all_lists_empty(backend, device):
    require_backend(backend)
    keep = torch.zeros(1, 1, 2, 3, dtype=torch.bool, device=device)
    mask = BlockMask.from_dense(keep, 16, 16)
    q, k, v = (
        torch.full((1, 2, n, 8), torch.nan, device=device, requires_grad=True) for n in (32, 48, 48)
    )
    out, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
    assert not out.any() and lse.isneginf().all()
    for grad in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert not grad.any()


@everywhere
def test_huge_scores_do_not_overflow(backend, device):
    """Scores of thousands: exp would overflow without the running maximum; lse is still exact."""
    require_backend(backend)
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, 1, 40, 16, generator=generator).to(device) for _ in range(3))
    q, k = q * 60, k * 60
    out, lse = attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    tokens = token_masks.dense_tokens(40, 40)
    oracle.check_against_oracle(oracle.Result(out, lse), oracle.Case(q, k, v, tokens, 1.0), backend)
    assert float(lse.abs().max()) > 1e4


@everywhere
def test_nan_and_infinity_stay_in_their_rows(backend, device):
    """A NaN query spoils its own row only; the kernel neither hides nor spreads it."""
    built = build(replace(SMALL, lens="none", mask_heads=False), backend, device)
    clean = attention(built.q, built.k, built.v, built.mask, backend=backend)
    sees = built.token_mask.any(-1).expand(2, 2, -1)
    row = int(sees[1, 1].nonzero()[3])
    q = built.q.clone()
    q[1, 1, row] = torch.nan
    out = attention(q, built.k, built.v, built.mask, backend=backend)
    assert out[1, 1, row].isnan().all()
    out[1, 1, row] = clean[1, 1, row]
    assert torch.equal(out, clean)


@everywhere
def test_default_scale_is_one_over_sqrt_of_head_dim(backend, device):
    built = build(SMALL, backend, device)
    scale = 1 / math.sqrt(SMALL.head_dim)
    given = attention(built.q, built.k, built.v, built.mask, scale=scale, backend=backend)
    assert torch.equal(given, attention(built.q, built.k, built.v, built.mask, backend=backend))
