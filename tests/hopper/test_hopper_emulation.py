"""The Hopper kernels' own source, run on the CPU by host emulation and the bindings' own source.

What hardware leaves open is varied: copies and products take place at once or at the last moment,
and threads run in either order. Results must be right, and bitwise the same every time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import hopper_emulation
import pytest
import torch
from hopper_problems import LEAPING_SCALE, LeapingScores
from oracle import Result, check_against_oracle
from problems import Built, Problem, random_problems

from video_attn import BlockMask
from video_attn.backends import hopper
from video_attn.calls import BackwardCall, ForwardCall

pytestmark = pytest.mark.skipif(
    hopper_emulation.missing() is not None, reason=f"host emulation: {hopper_emulation.missing()}"
)
# Late copies, late products, and the last thread that becomes ready runs first.
ORDERS = list(itertools.product((True, False), repeat=3))
HEAD_DIMS = ((64, 64), (128, 128), (40, 40), (8, 8), (96, 96), (72, 72))
DTYPES = (torch.bfloat16, torch.float16)


def problems(count: int, seed: int, sizes: Sequence[tuple[int, int]]) -> list[Problem]:
    """Random problems that the backend serves; lists have the block ``sizes`` in turn."""
    drawn = random_problems(
        6 * count, seed=seed, dtypes=DTYPES, max_len=420, max_heads=4, head_dims=HEAD_DIMS
    )
    kept, turn = [], itertools.cycle(sizes)
    for problem in drawn:
        if problem.kind == "lists":
            q_size, kv_size = next(turn)
            problem = dataclasses.replace(problem, q_block_size=q_size, kv_block_size=kv_size)
        served = problem.kind in ("dense", "lists") or problem.q_block_size in (64, 128, 384)
        if served and problem.kind != "causal":
            kept.append(problem)
    return kept[:count]


COARSE = [(128, 128), (384, 384), (192, 320), (384, 128), (128, 256)]
PROBLEMS = problems(40, 20261120, [(64, 64), *COARSE])


@pytest.fixture(scope="module", autouse=True)
def emulation() -> None:
    """The operators on CPU tensors."""
    hopper_emulation.load()


def run_backend(built: Built, deterministic: bool = False) -> Result:
    """What ops.py does with the backend, without the choice of a backend."""
    q, k, v = built.kernel_inputs
    grad_out, grad_lse = built.kernel_grads
    if built.kernel_options.get("layout") == "bshd":
        q, k, v, grad_out = (x.transpose(1, 2) for x in (q, k, v, grad_out))
    scale = built.scale or q.shape[3] ** -0.5
    out, lse = hopper._forward(ForwardCall(q, k, v, built.mask, scale))
    grads = hopper._backward(
        BackwardCall(
            grad_out, grad_lse if built.problem.with_lse_grad else None, q, k, v, out, lse,
            built.mask, scale, deterministic=deterministic,
        )
    )  # fmt: skip
    return Result(out, lse, *grads)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_against_the_oracle(problem: Problem):
    built = problem.build()
    with hopper_emulation.options(*ORDERS[problem.index % 8]):
        result = run_backend(built, deterministic=problem.index % 3 == 0)
    check_against_oracle(result, built, str(problem))


@pytest.mark.parametrize("problem", PROBLEMS[:12], ids=str)
def test_what_hardware_leaves_open_changes_nothing(problem: Problem):
    built = problem.build()
    results = []
    for order in ORDERS:
        with hopper_emulation.options(*order):
            results.append(run_backend(built, deterministic=True))
    for other in results[1:]:
        for name, x, y in zip(Result._fields, results[0], other, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("lengths", "head_dim", "density"), [((300, 2000), 64, 0.3), ((79, 2338), 128, 0.9)]
)
def test_lists_far_longer_than_the_ring(lengths, head_dim, density):
    """Two rows of a tile that share some loads, little or nearly all, over many turns of the ring.

    A list that ended before the other lost its place there, and the producer of the second list,
    with few loads of its own, ran a whole turn ahead.
    """
    problem = Problem(
        index=0, seed=5, kind="lists", dtype=torch.bfloat16, batch=1, kv_heads=1, group=2,
        head_dim=head_dim, head_dim_v=head_dim, memory="bhsd", logits="normal",
        with_lse_grad=False, q_len=lengths[0], kv_len=lengths[1], q_block_size=64,
        kv_block_size=64, density=density,
    )  # fmt: skip
    built = problem.build()
    scale = head_dim**-0.5
    for order in ORDERS:
        with hopper_emulation.options(*order):
            out, lse = hopper._forward(ForwardCall(*built.kernel_inputs, built.mask, scale))
        check_against_oracle(Result(out, lse, None, None, None), built, str(problem))


def test_the_list_has_every_kind():
    kinds = {(p.kind, p.q_block_size) for p in PROBLEMS}
    assert {("dense", 0), ("lists", 64), ("lists", 128), ("lists", 192), ("lists", 384)} <= kinds
    assert any(p.kind in ("sliding", "selected") for p in PROBLEMS)
    assert {p.lens for p in PROBLEMS} == {"none", "shared", "per-batch"}
    assert any(p.group > 1 for p in PROBLEMS) and any(p.batch > 1 for p in PROBLEMS)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 64), (63, 65), (64, 1), (129, 127), (70, 500)])
@pytest.mark.parametrize("block", [None, 64, 128])
def test_short_and_odd_sequences(lengths, block):
    q_len, kv_len = lengths
    problem = Problem(
        index=0, seed=7, kind="dense" if block is None else "lists", dtype=torch.bfloat16, batch=1,
        kv_heads=1, group=2, head_dim=64, head_dim_v=64, memory="bhsd", logits="normal",
        with_lse_grad=True, q_len=q_len, kv_len=kv_len, q_block_size=block or 0,
        kv_block_size=block or 0, density=1.0,
    )  # fmt: skip
    built = problem.build()
    check_against_oracle(run_backend(built), built, str(problem))


@pytest.mark.parametrize("block", [64, 128])
def test_rows_and_keys_that_nobody_sees(block):
    """Exact zeros and minus infinity, whatever the tensors hold."""
    keep = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    keep[0, 0, 1, 2] = True  # one pair of blocks
    mask = BlockMask.from_dense(keep, block, block)
    q = torch.full((1, 1, 3 * block, 64), torch.nan, dtype=torch.bfloat16)
    k = torch.full((1, 1, 4 * block, 64), torch.nan, dtype=torch.bfloat16)
    v, grad_out = k.clone(), q.clone()
    rows, keys = slice(block, 2 * block), slice(2 * block, 3 * block)
    for x, seen in ((q, rows), (k, keys), (v, keys), (grad_out, rows)):
        x[:, :, seen] = torch.randn(1, 1, block, 64).bfloat16()
    out, lse = hopper._forward(ForwardCall(q, k, v, mask, 0.125))
    dq, dk, dv = hopper._backward(BackwardCall(grad_out, None, q, k, v, out, lse, mask, 0.125))
    for x, seen in ((out, rows), (dq, rows), (dk, keys), (dv, keys)):
        assert x[:, :, seen].isfinite().all() and x[:, :, seen].abs().amax() > 0
        x[:, :, seen] = 0
        assert (x == 0).all()
    assert lse[:, :, rows].isfinite().all()
    assert lse[:, :, :block].eq(-torch.inf).all() and lse[:, :, 2 * block :].eq(-torch.inf).all()


@pytest.mark.slow
def test_dense_attention_that_draws_its_tiles():
    """Twelve tiles of 128 steps, for the three multiprocessors of the emulation."""
    q, k, v = (torch.randn(1, 4, n, 8).bfloat16() for n in (384, 16384, 16384))
    out, lse = hopper._forward(ForwardCall(q, k, v, None, 0.35))
    scores = q.double() @ k.double().mT * 0.35
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-3, rtol=1e-4)
    expected = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 4.0])
def test_any_scale(scale):
    q, k, v = (torch.randn(1, 1, 100, 64).bfloat16() for _ in range(3))
    out, lse = hopper._forward(ForwardCall(q, k, v, None, scale))
    scores = q.double() @ k.double().mT * scale
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-3, rtol=1e-4)
    expected = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("block", [None, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_leap(block, head_dim):
    case = LeapingScores(head_dim, block, DTYPES[head_dim // 128])
    case.check(*hopper._forward(ForwardCall(case.q, case.k, case.v, case.mask, LEAPING_SCALE)))
