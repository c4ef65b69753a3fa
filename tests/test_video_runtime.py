"""What the video functions cost: launches, copies, kept tables, compilation, graphs, no sync."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from video_cases import answer, random_qkv

from st_attn import sliding_tile_attention
from video_attn import VideoLayout, attention, sliding_tile, sliding_tile_mask, video_sparse
from video_attn import static_cache as module
from video_attn.functional import sta, vsa, vsa_padded
from video_attn.static_cache import clear_caches, static_cache
from vsa import video_sparse_attn

WINDOWS = [(3, 1, 2), (1, 2, 9), (2, 2, 3)]


pytestmark = pytest.mark.usefixtures("on_quick_backend")


def test_one_launch_without_a_copy(monkeypatch):
    """All heads, windows and the text go in one launch; q, k, v are passed as they are."""
    calls = []

    def spy(*arguments, **options):
        calls.append(arguments)
        return attention(*arguments, **options)

    monkeypatch.setattr(sta, "attention", spy)
    q, k, v, _ = random_qkv((2, 3, 64 + 12, 8))
    sliding_tile_attention(q, k, v, WINDOWS, 5, True, "4x4x4", tile_size=(2, 2, 2))
    (arguments,) = calls
    assert all(a is b for a, b in zip(arguments, (q, k, v), strict=False))
    mask = arguments[3]
    assert mask._transpose is None, "the lists of a backward pass are built only for one"


def test_equal_windows_share_one_list():
    """Heads with the same window, also after cutting it to the grid, keep one list in memory."""
    layout = VideoLayout((4, 4, 4), (2, 2, 2))
    assert sliding_tile_mask(layout, [(2, 9, 1)] * 24).kv_indices.shape[1] == 1
    assert sliding_tile_mask(layout, [(9, 2, 1), (2, 5, 1)]).kv_indices.shape[1] == 1
    assert sliding_tile_mask(layout, [(1, 2, 1), (2, 2, 1)]).kv_indices.shape[1] == 2


def test_masks_are_kept_by_their_full_key():
    """The same layout, windows, text and device share lists; any other has its own."""
    layout = VideoLayout((4, 4, 6), (2, 2, 2), 9)

    def lists(layout=layout, window=(1, 2, 1), text_length=4):
        return sliding_tile_mask(layout, window, text_length=text_length).kv_indices

    first = lists()
    assert lists() is first
    others = (
        lists(window=(1, 2, 3)),
        lists(text_length=9),
        lists(VideoLayout((4, 6, 4), (2, 2, 2), 9)),
        lists(VideoLayout((4, 4, 6), (2, 2, 3), 9)),
        lists(VideoLayout((4, 4, 6), (2, 2, 2), 8)),
    )
    assert all(other is not first for other in others)
    assert lists() is first


def test_kept_tables_are_bounded_and_fit_for_autograd(monkeypatch):
    """Caches drop the oldest by number and by size; tables built in inference mode can train."""
    clear_caches()
    monkeypatch.setattr(module, "MAX_ENTRIES", 3)
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    built = []

    @static_cache(torch.float32, lambda n, device: [(n,)])
    def table(n: int) -> Tensor:
        built.append(n)
        return torch.zeros(n, dtype=torch.uint8)

    for n in (1, 2, 3, 1, 4, 1, 2):  # 2 is the oldest when 4 comes
        table(n)
    assert built == [1, 2, 3, 4, 2]
    built.clear()
    clear_caches()
    assert module.kept_bytes() == 0
    for n in (60, 50, 50, 60, 200, 200):  # 60 and 50 are too much together; the newest stays
        table(n)
    assert built == [60, 50, 60, 200]
    monkeypatch.undo()

    grid = (3, 4, 7)  # of no other test
    with torch.inference_mode():
        sliding_tile(*(torch.randn(1, 1, 84, 8) for _ in range(3)), grid, (1, 1, 2), tile=(2, 2, 2))
    q = torch.randn(1, 1, 84, 8, requires_grad=True)
    sliding_tile(q, q, q, grid, (1, 1, 2), tile=(2, 2, 2)).sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())


class _LargestNew(TorchDispatchMode):
    """The largest tensor that an operator allocates, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("gate", [None, 0.5, "elementwise"])
def test_coarse_branch_is_never_repeated_in_memory(text, gate):
    """Without gradients the coarse rows are added in place; nothing as large as out is made."""
    out, coarse = torch.randn(2, 3, 4 * 8 + text, 8), torch.randn(2, 3, 4, 8)
    gate = torch.rand_like(out) if gate == "elementwise" else gate
    weight = 1 if gate is None else gate
    padded = torch.cat([coarse.repeat_interleave(8, 2), torch.zeros(2, 3, text, 8)], 2)
    expected = out + padded * weight
    with _LargestNew() as watch:
        got = vsa.add_coarse(out, coarse, gate, 8)
    torch.testing.assert_close(got, expected)
    assert got.data_ptr() == out.data_ptr()
    assert watch.largest <= coarse.numel()


# -- compiled, traced, captured --------------------------------------------------------------------


def _sta_raster(q, k, v, grid, text_length):
    return sliding_tile(q, k, v, grid, WINDOWS, tile=(2, 3, 2), text_length=text_length)


def _sta_tile_order(q, k, v, grid, text_length):
    return sliding_tile_attention(q, k, v, WINDOWS, text_length, True, grid, tile_size=(2, 3, 2))


def _vsa_raster(q, k, v, grid, text_length):
    return video_sparse(
        q, k, v, grid, top_k_ratio=0.3, tile=(2, 3, 2), text_length=text_length, gate=v
    )


def _vsa_padded(q, k, v, grid, text_length):
    sizes = torch.arange(q.shape[2] // 2, device=q.device) % 3
    return video_sparse_attn(q, k, v, sizes, sizes, 3, (1, 1, 2), v)


FUNCTIONS = pytest.mark.parametrize(
    "function", [_sta_raster, _sta_tile_order, _vsa_raster, _vsa_padded]
)


@FUNCTIONS
def test_compiles_whole(function):
    """torch.compile(fullgraph=True), forward and backward, also when sizes change between calls."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for grid, text_length, text in (
        ((5, 6, 7), 0, 0),
        ((4, 6, 4), torch.tensor([7, 0]), 10),
    ):
        q, k, v, grad = random_qkv((2, 3, math.prod(grid) + text, 8))

        def call(f, q, k, v, grid=grid, text_length=text_length):
            return f(q, k, v, grid, text_length)

        expected, got = (answer(partial(call, f), q, k, v, grad) for f in (function, compiled))
        for a, b in zip(got, expected, strict=True):
            assert a is None or torch.equal(a, b)


@FUNCTIONS
@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_host_never_reads_the_device(function, kind, monkeypatch):
    """With fake tensors there is nothing to read: forward and backward still trace.

    Values of block sizes are checked on a CPU only; here they count as being on a GPU.
    """
    monkeypatch.setattr(vsa_padded, "values_can_be_read", lambda x: False)
    grid = (3, 5, 4)  # of no other test: the tables are first built under the mode, and then used
    real = torch.randn(2, 3, 60 + 6, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.randn(2, 3, 60 + 6, 8, requires_grad=True) for _ in range(3))
        text_length = 3 if kind == "int" else torch.tensor([1, 4])
        out = function(q, k, v, grid, text_length)
        out.sum().backward()
    assert out.shape == q.shape and q.grad is not None
    assert bool(function(real, real, real, grid, 3).isfinite().all())


@pytest.mark.gpu
def test_one_cache_entry_for_both_names_of_a_gpu(gpu):
    """Masks for "cuda" and for "cuda:0" share their lists."""
    layout = VideoLayout((4, 4, 4), (2, 2, 2))
    by_name, by_index = (sliding_tile_mask(layout, (1, 2, 1), device=d) for d in ("cuda", gpu))
    assert by_name.kv_indices is by_index.kv_indices


@pytest.mark.gpu
@FUNCTIONS
def test_a_cuda_graph_captures_it(function, gpu):
    """Forward in a CUDA graph, replayed on other data and another text length."""
    qkv = random_qkv((2, 3, 4 * 6 * 8 + 8, 64), dtype=torch.float16)[:3]
    q, k, v = (x.to(gpu) for x in qkv)
    text_length = torch.tensor([8, 3], device=gpu)
    function(q, k, v, (4, 6, 8), text_length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(q, k, v, (4, 6, 8), text_length)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    text_length.copy_(torch.tensor([2, 7]))
    graph.replay()
    assert torch.equal(out, function(q, k, v, (4, 6, 8), text_length))


@pytest.mark.gpu
@FUNCTIONS
def test_no_synchronisation_on_a_gpu(function, gpu):
    """With torch's sync detector on, forward and backward run after their tables are built."""
    qkv = random_qkv((2, 3, 4 * 6 * 8 + 8, 64), dtype=torch.float16)[:3]
    q, k, v = (x.to(gpu).requires_grad_() for x in qkv)
    text_length = torch.tensor([8, 3], device=gpu)
    function(q, k, v, (4, 6, 8), text_length).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(q, k, v, (4, 6, 8), text_length).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(q.grad.isfinite().all())
