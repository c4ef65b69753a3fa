"""The compiled Hopper kernels on an H100 or H200: random problems, repetition, streams, graphs.

On other machines everything here is skipped; what lies above the kernels is tested without a GPU in
``test_hopper_backend.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hopper_problems import LEAPING_SCALE, PROBLEMS, LeapingScores
from machine import HAS_GPU
from oracle import Result, check_against_oracle
from problems import Problem, run_attention
from torch import Tensor

from video_attn import BlockMask, attention, native
from video_attn.device import device_info


def missing() -> str | None:
    """Why these tests cannot run here, or None."""
    if not HAS_GPU:
        return "needs a GPU: torch.cuda.is_available() is False"
    arch = device_info("cuda").arch
    if arch != "sm_90":
        return f"needs an H100 or H200 (sm_90), this is {arch}"
    unbuilt = [c for c in map(native.component, ("sta", "vsa")) if not c.record.get("built")]
    return "; ".join(str(c.reason) for c in unbuilt) or None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def test_components_are_loaded():
    for name in ("sta", "vsa"):
        component = native.component(name)
        assert component.loaded, component.reason


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problems(problem: Problem, gpu: torch.device):
    built = problem.build(gpu)
    check_against_oracle(run_attention(built, "hopper"), built, str(problem))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever torch allocates is NaN (integers: the largest), in C++ as well: the workspaces."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("problem", PROBLEMS[::7], ids=str)
def test_workspaces_are_not_trusted(problem: Problem, gpu: torch.device):
    built = problem.build(gpu)
    with poisoned_memory():
        assert torch.empty(64, dtype=torch.uint8, device=gpu).eq(255).all()
        got = run_attention(built, "hopper", deterministic=True)
    check_against_oracle(got, built, str(problem))


# -- one larger problem of each grain --------------------------------------------------------------

GRAINS = pytest.mark.parametrize("block_size", [64, 128, 384, None], ids=str)
CHANNELS = pytest.mark.parametrize("head_dim", [64, 128])
HEADS, KV_HEADS = 6, 3


class Work:
    """Tensors and a mask of many more tiles than the GPU has multiprocessors."""

    def __init__(
        self, block_size: int | None, device: torch.device, seed: int = 0, head_dim: int = 128
    ) -> None:
        self.block_size, self.length = block_size, 3000
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int) -> Tensor:
            x = torch.randn(2, heads, self.length, head_dim, generator=generator)
            return x.to(device, torch.bfloat16)

        self.q, self.grad = normal(HEADS), normal(HEADS)
        self.k, self.v = normal(KV_HEADS), normal(KV_HEADS)
        self.lists: tuple[Tensor, Tensor] | None = None
        if block_size is not None:
            blocks = -(-self.length // block_size)
            keep = torch.rand(2, HEADS, blocks, blocks, generator=generator) < 0.4
            keep[0, 0, 1] = False  # a row without keys
            keep[..., 2] = False  # a key block that nobody sees
            mask = BlockMask.from_dense(keep, block_size, block_size)
            self.lists = (mask.kv_num_blocks.to(device), mask.kv_indices.to(device))

    def mask(self) -> BlockMask | None:
        """A mask on the lists as they stand now."""
        if self.lists is None or self.block_size is None:
            return None
        size, length = self.block_size, self.length
        return BlockMask(*self.lists, size, size, q_len=length, kv_len=length)

    def run(self, **options: bool) -> Result:
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        out, lse = attention(q, k, v, self.mask(), return_lse=True, backend="hopper", **options)
        return Result(out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), self.grad))

    def copy_from(self, other: Work) -> None:
        """Other values and other lists into the same memory."""
        for name in ("q", "k", "v", "grad"):
            getattr(self, name).copy_(getattr(other, name))
        for mine, theirs in zip(self.lists or (), other.lists or (), strict=True):
            mine.copy_(theirs)


def differs(a: Result, b: Result) -> Tensor:
    """Whether any bit of any result differs, as a tensor: no synchronisation."""
    return torch.stack([(x != y).any() for x, y in zip(a, b, strict=True)]).any()


@contextmanager
def load(device: torch.device) -> Iterator[Callable[[], None]]:
    """Gives a function that starts a matrix product on a stream of its own."""
    stream, x = torch.cuda.Stream(device), torch.randn(2048, 2048, device=device)
    y = torch.empty_like(x)

    def disturb() -> None:
        with torch.cuda.stream(stream):
            torch.mm(x, x, out=y)

    yield disturb
    torch.cuda.synchronize(device)


@GRAINS
@CHANNELS
def test_a_thousand_times_the_same_bits(block_size, head_dim, gpu):
    """A race would show sooner or later; the other stream moves the kernels about."""
    work = Work(block_size, gpu, head_dim=head_dim)
    first = work.run(deterministic=True)
    wrong = torch.zeros((), dtype=torch.int64, device=gpu)
    with load(gpu) as disturb:
        for n in range(1000):
            if n % 3 == 0:
                disturb()
            wrong += differs(work.run(deterministic=True), first)
    assert wrong.item() == 0


@GRAINS
def test_two_streams(block_size, gpu):
    works = [Work(block_size, gpu, seed) for seed in (1, 2)]
    alone = [work.run(deterministic=True) for work in works]
    streams = [torch.cuda.Stream(gpu) for _ in works]
    torch.cuda.synchronize()
    wrong = []
    for _ in range(30):
        for work, stream, expected in zip(works, streams, alone, strict=True):
            with torch.cuda.stream(stream):
                wrong.append(differs(work.run(deterministic=True), expected))
    torch.cuda.synchronize()
    assert not torch.stack(wrong).any()


@GRAINS
def test_another_device_than_the_current_one(block_size, gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    with torch.cuda.device(here):
        expected = Work(block_size, here).run(deterministic=True)
        got = Work(block_size, there).run(deterministic=True)
        assert torch.cuda.current_device() == 0
    for x, y in zip(got, expected, strict=True):
        assert x.device == there and torch.equal(x.cpu(), y.cpu())


@GRAINS
@CHANNELS
def test_cuda_graph_with_other_values_and_lists(block_size, head_dim, gpu):
    """Captured once, on a side stream; the replay reads the lists as they are then."""
    work, other = (Work(block_size, gpu, seed, head_dim) for seed in (1, 2))
    expected = other.run(deterministic=True)
    stream = torch.cuda.Stream(gpu)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work.run(deterministic=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work.run(deterministic=True)
    graph.replay()
    torch.cuda.synchronize()
    assert differs(captured, expected).item()
    work.copy_from(other)
    graph.replay()
    torch.cuda.synchronize()
    assert not differs(captured, expected).item()


@GRAINS
def test_torch_compile(block_size, gpu):
    work = Work(block_size, gpu)
    expected = work.run()
    torch._dynamo.reset()

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, work.mask(), return_lse=True, backend="hopper")
        return out * 2.0, lse

    compiled = torch.compile(model, fullgraph=True)
    q, k, v = (x.detach().requires_grad_() for x in (work.q, work.k, work.v))
    out, lse = compiled(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), work.grad / 2.0)
    torch.testing.assert_close(out, expected.out * 2.0)
    torch.testing.assert_close(lse, expected.lse)
    for x, y in zip(grads, expected[2:], strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("block_size", [64, 128, 384])
def test_what_nobody_sees_is_exactly_zero(block_size, gpu):
    result = Work(block_size, gpu).run()
    hidden = slice(2 * block_size, 3 * block_size)
    for grad in (result.dk, result.dv):
        assert grad is not None and grad[:, :, hidden].eq(0).all() and not grad.eq(0).all()
    blind = slice(block_size, 2 * block_size)  # of the first head of the first batch
    assert result.lse is not None and result.dq is not None
    assert result.out[0, 0, blind].eq(0).all() and result.dq[0, 0, blind].eq(0).all()
    assert result.lse[0, 0, blind].eq(-torch.inf).all()


@pytest.mark.parametrize("block_size", [64, 128])
def test_lists_of_width_zero(block_size, gpu):
    work = Work(block_size, gpu)
    assert work.lists is not None
    work.lists = (torch.zeros_like(work.lists[0]), work.lists[1][..., :0])
    result = work.run()
    assert result.lse is not None and result.lse.eq(-torch.inf).all()
    for x in (result.out, *result[2:]):
        assert x is not None and x.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [None, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_leap(head_dim, block, dtype, gpu):
    case = LeapingScores(head_dim, block, dtype)
    q, k, v = (x.to(gpu) for x in (case.q, case.k, case.v))
    mask = None if case.mask is None else case.mask.to(gpu)
    case.check(*attention(q, k, v, mask, scale=LEAPING_SCALE, return_lse=True, backend="hopper"))


def test_offsets_that_need_64_bits(gpu):
    """The last tokens lie past 2**31 elements; only a few rows of that memory are used."""
    stride = 2**25 + 2**21
    near = torch.randn(1, 1, 128, 64, dtype=torch.bfloat16, device=gpu)
    storage = torch.empty(127 * stride + 64, dtype=torch.bfloat16, device=gpu)
    far = storage.as_strided(near.shape, (0, 0, stride, 1)).copy_(near)
    expected = attention(near, near, near, backend="hopper")
    assert torch.equal(attention(far, far, far, backend="hopper"), expected)


def test_a_call_does_not_synchronise(gpu):
    works = [Work(size, gpu) for size in (64, 384, None)]
    for work in works:
        work.run()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for work in works:
            work.run()
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def test_causal_attention_goes_to_triton(gpu):
    q = torch.randn(1, 1, 256, 64, dtype=torch.bfloat16, device=gpu)
    with pytest.raises(RuntimeError, match="'hopper'.*is_causal is not in these kernels"):
        attention(q, q, q, is_causal=True, backend="hopper")
