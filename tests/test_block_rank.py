"""The fused first steps of video sparse attention against the same steps in plain torch.

Without a GPU the kernels run in Triton's interpreter, over CPU tensors that the torch code is given
too; on a GPU whole functions are compared with the CPU's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from video_attn import video_sparse
from video_attn.backends import reference_blocks, triton_blocks
from video_attn.calls import RankCall, Side
from video_attn.functional import ranking, vsa
from video_attn.functional.coarse import _average, block_scores
from video_attn.functional.vsa import _rounded_scores, add_coarse
from vsa import video_sparse_attn

F16, F32 = torch.float16, torch.float32
OPS = triton_blocks.BLOCK_OPS
# batch, query heads, key heads, query blocks, key blocks, block, head dims of k and v, dtype, lens
PROBLEMS = [
    (2, 2, 1, 3, 5, 4, 24, 40, F32, True),
    (1, 1, 1, 2, 35, 2, 64, 64, F16, False),
    (1, 1, 1, 33, 3, 2, 16, 8, F16, True),
]


def make(problem) -> tuple[list[Tensor], tuple[Side, Side]]:
    batch, heads, kv_heads, rows, keys, size, dim, dim_v, dtype, with_lens = problem
    torch.manual_seed(0)
    q = torch.randn(batch, heads, rows * size, dim).to(dtype)
    k = torch.randn(batch, kv_heads, keys * size, dim).to(dtype)
    v = torch.randn(batch, kv_heads, keys * size, dim_v).to(dtype)
    q_lens = kv_lens = None
    if with_lens:
        q_lens = torch.randint(0, size + 1, (batch, rows), dtype=torch.int32)
        kv_lens = torch.randint(0, size + 1, (1, keys), dtype=torch.int32)
        kv_lens[0, 0], kv_lens[0, 1] = size, 0
        q, k, v = poisoned(q, q_lens), poisoned(k, kv_lens), poisoned(v, kv_lens)
    return [q, k, v], (Side(size, rows * size, q_lens), Side(size, keys * size, kv_lens))


def poisoned(x: Tensor, lens: Tensor) -> Tensor:
    """NaN in every token past the valid ones of its block."""
    size = x.shape[2] // lens.shape[1]
    valid = (torch.arange(size) < lens[..., None]).flatten(1)
    return x.masked_fill(~valid[:, None, :, None], torch.nan)


@pytest.mark.parametrize("score_dtype", [None, F16])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_rank_is_what_torch_says(problem, score_dtype):
    """Means, choice and coarse part; without v there is no coarse part, and the same choice."""
    (q, k, v), sides = make(problem)
    scale, top_k = q.shape[3] ** -0.5, max(1, sides[1].tiles(sides[1].slot) // 3)
    got = OPS.rank(RankCall(q, k, v, *sides, top_k, scale, score_dtype))
    for x, mean, side in zip((q, k, v), got.means, (sides[0], sides[1], sides[1]), strict=True):
        expected = torch.empty_like(mean)
        reference_blocks._block_mean(x, expected, side)
        torch.testing.assert_close(mean, expected)
    q_mean, k_mean, v_mean = got.means
    scores = block_scores(q_mean, k_mean, scale)
    coarse = _average(scores, v_mean, sides[1].lens)
    torch.testing.assert_close(got.coarse, coarse.to(v.dtype), atol=1e-3, rtol=1e-3)
    if score_dtype is not None:
        scores = _rounded_scores(q_mean, k_mean, scale, score_dtype)
    selected = torch.empty_like(got.selected)
    reference_blocks._select_top_k(scores, selected, top_k, sides[1].lens)
    assert torch.equal(got.selected, selected)
    assert torch.equal(got.counts, torch.full_like(got.counts, top_k))
    alone = OPS.rank(RankCall(q, k, None, *sides, top_k, scale, score_dtype))
    assert alone.coarse is None and alone.means[2] is None
    assert torch.equal(alone.selected, selected)


def test_rank_when_all_keys_are_empty():
    """Then every block weighs the same, and all means are 0; the first blocks are chosen."""
    (q, k, v), (q_side, kv_side) = make(PROBLEMS[0])
    empty = kv_side._replace(lens=torch.zeros_like(kv_side.lens))
    got = OPS.rank(RankCall(q, k, v, q_side, empty, 3, 0.1))
    assert torch.equal(got.coarse, torch.zeros_like(got.coarse))
    assert torch.equal(got.selected, torch.arange(3, dtype=torch.int32).expand_as(got.selected))


def test_nan_shows_in_the_coarse_part_and_is_not_preferred():
    (q, k, v), sides = make(PROBLEMS[1])
    k[:, :, 2:4] = torch.nan
    got = OPS.rank(RankCall(q, k, v, *sides, 5, 0.1))
    assert bool(got.coarse.isnan().all())
    assert not bool((got.selected == 1).any())


@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=str)
@pytest.mark.parametrize("gate", ["one", "number", "head", "token", "element"])
def test_add_coarse_is_what_torch_says(problem, gate):
    """The coarse part goes to the valid rows; the others, and the text after them, stay."""
    (q, _, v), (side, _) = make(problem)
    batch, heads, length, dim = *q.shape[:3], v.shape[3]
    blocks = length // side.slot
    shapes = {
        "head": (1, heads, 1, 1), "token": (batch, 1, length + 5, 1),
        "element": (batch, heads, length + 5, dim),
    }  # fmt: skip
    weight = torch.rand(shapes[gate]).to(v.dtype) if gate in shapes else {"one": 1.0}.get(gate, 0.3)
    coarse = torch.randn(batch, heads, blocks, dim).to(v.dtype)
    out = torch.randn(batch, length + 5, heads, dim).to(v.dtype).transpose(1, 2)
    if side.lens is not None:
        out[:, :, :length] = poisoned(out[:, :, :length], side.lens).nan_to_num(nan=0)
    wide = weight.double() if isinstance(weight, Tensor) else weight
    expected = add_coarse(out.double(), coarse.double(), wide, side.slot, side.lens)
    OPS.add_coarse(out, coarse, weight, side)
    torch.testing.assert_close(out, expected.to(out.dtype))


@pytest.fixture
def fused(monkeypatch):
    """The functions take the fused kernels, in the interpreter."""
    calls = []

    def rank(call: RankCall):
        calls.append("rank")
        return OPS.rank(call)

    def add(*arguments):
        calls.append("add")
        OPS.add_coarse(*arguments)

    ops = reference_blocks.BLOCK_OPS._replace(rank=rank, add_coarse=add)

    def use() -> list[str]:
        monkeypatch.setattr(ranking, "select_block_ops", lambda device, backend: ops)
        return calls

    return use


@pytest.mark.parametrize("text", [0, 5])
def test_functions_and_their_gradients(fused, text, monkeypatch):
    """Fused or not, and by groups of heads: the same output, mask and gradients."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, h, 18 + text, 8, requires_grad=True) for h in (4, 2, 2))
    gate = torch.rand(1, 4, 1, 1, requires_grad=True)
    grad = torch.randn(1, 4, 18 + text, 8)
    options = {"top_k": 2, "tile": (2, 2, 2), "return_mask": True, "gate": gate}

    def run():
        out, mask = video_sparse(q, k, v, (2, 3, 3), **options)
        grads = torch.autograd.grad(out, (q, k, v, gate), grad)
        with torch.no_grad():
            again = video_sparse(q, k, v, (2, 3, 3), **options)[0]
        return out.detach(), again, *grads, mask.to_dense(), mask.kv_num_blocks

    expected = run()
    calls = fused()
    got = run()
    assert calls == ["rank", "rank", "add"]
    groups = [(slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))]
    monkeypatch.setattr(ranking, "head_groups", lambda *arguments: groups)
    for result in (got, run()):
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert calls.count("rank") == 2 + 4


def test_padded_function(fused):
    """Sizes of blocks, more query heads than key heads, and the gate without gradients."""
    torch.manual_seed(2)
    q, k, v = torch.randn(1, 2, 12, 8), torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8)
    sizes, q_sizes = torch.tensor([4, 3, 0, 1, 4]), torch.tensor([4, 0, 2])
    expected = video_sparse_attn(q, k, v, sizes, q_sizes, 3, 4, 0.5)
    calls = fused()
    got = video_sparse_attn(q, k, v, sizes, q_sizes, 3, 4, 0.5)
    torch.testing.assert_close(got, expected)
    assert calls == ["rank", "add"]


def test_others_who_watch_see_torch(fused):
    """Forward-mode, torch.func, fake tensors and fp64 take the way that has rules for them."""
    calls = fused()
    q = torch.randn(1, 1, 32, 8)
    run = lambda x: video_sparse_attn(x, x, x, None, 2, 8)  # noqa: E731
    torch.func.jvp(run, (q,), (q,))
    torch.func.vmap(run)(q[None])
    run(q.double())
    run(q.to("meta"))
    assert calls == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, F16, F32], ids=str)
@pytest.mark.parametrize("with_lens", [False, True])
def test_gpu_is_what_torch_says(gpu, dtype, with_lens, monkeypatch):
    """Compiled kernels against the same steps by torch, on the same card: output and gradients."""
    problem = (2, 6, 3, 90, 100, 64, 128, 64, dtype, with_lens)
    (q, k, v), sides = make(problem)
    q, k, v = (x.to(gpu) for x in (q, k, v))
    sizes = [None if s.lens is None else s.lens.to(gpu) for s in sides]
    grad = torch.randn(2, 6, 90 * 64, 64, device=gpu, dtype=dtype)

    def run():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = video_sparse_attn(*leaves, sizes[1], sizes[0], 100, 64, 0.5)
        with torch.no_grad():
            again = video_sparse_attn(q, k, v, sizes[1], sizes[0], 100, 64, 0.5)
        return out.detach(), again, *torch.autograd.grad(out, leaves, grad)

    got = run()
    for module in (ranking, vsa):
        monkeypatch.setattr(module, "fused_block_ops", lambda *arguments: None)
    for name, a, b in zip(("out", "again", "dq", "dk", "dv"), got, run(), strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < (1e-5 if dtype == F32 else 0.01), (name, float(error))


@pytest.mark.gpu
def test_gpu_chooses_as_torch_where_scores_are_apart(gpu):
    """Scores that no rounding brings together: the kernel's choice is torch's, block for block."""
    rows, keys, dim = 70, 150, 128
    generator = torch.Generator().manual_seed(4)
    order = torch.stack([torch.randperm(keys, generator=generator) for _ in range(8)]).float()
    q = torch.eye(8)[torch.arange(rows) % 8]  # row i has the scores of row i % 8 of `order`
    q = torch.nn.functional.pad(q, (0, dim - 8))[None, None].to(gpu, torch.bfloat16)
    k = torch.nn.functional.pad(order.T, (0, dim - 8))[None, None].to(gpu, torch.bfloat16)
    call = RankCall(q, k, k, Side(1, rows), Side(1, keys), 40, 1.0)
    got = OPS.rank(call)
    expected = order[torch.arange(rows) % 8].topk(40).indices.sort(-1).values.int()
    assert torch.equal(got.selected[0, 0].cpu(), expected)
