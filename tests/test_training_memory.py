"""What video sparse attention keeps for its backward pass, and what it takes for a moment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from video_attn import BlockMask, VideoLayout, attention, ops
from video_attn.calls import BackwardCall, by_heads
from video_attn.functional import coarse
from video_attn.functional.vsa import compress_and_select
from vsa import video_sparse_attn

V, TILES, TOP = 64, 288, 29  # as many tokens of a block per tile as long videos have, and a tenth


def qkv(heads: int = 2, tiles: int = TILES, dim: int = 16) -> list[Tensor]:
    return [torch.randn(1, heads, tiles * V, dim).requires_grad_() for _ in range(3)]


def saved_bytes(function, *inputs: Tensor) -> int:
    """Bytes that autograd keeps, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(storages.values())


def test_training_keeps_hardly_more_than_dense_attention():
    """Neither a softmax of all tiles nor transposed lists of full width: means and short lists.

    With 16 channels lists weigh eight times what they weigh with 128.
    """
    inputs = qkv()
    dense = saved_bytes(attention, *inputs)
    gate = torch.zeros(())  # a tensor: the coarse branch is there, and its gradient
    sparse = saved_bytes(lambda q, k, v: video_sparse_attn(q, k, v, None, TOP, V, gate), *inputs)
    lists = 4 * 2 * TILES * (TOP + 1)
    means = 3 * 2 * TILES * 16 * 4
    assert sparse <= dense + 2 * lists + 2 * means + 4096
    assert sparse <= 1.15 * dense


class _Peak(TorchDispatchMode):
    """Bytes of the tensors that operators have made and that still live; the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = WeakTensorKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x._base is None:
                self.alive[x] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_scores_of_all_tiles_are_there_for_some_heads_only(monkeypatch):
    monkeypatch.setattr(coarse, "_LEAST_ROOM", 0)
    q, k, v = (x.detach() for x in qkv(heads=8, dim=64))
    with _Peak() as watch:
        selected, *_ = compress_and_select(
            q, k, v, None, None, block_size=V, top_k=TOP, scale=0.1, gate=None
        )
    one_head = TILES**2 * coarse._BYTES
    assert selected.shape == (1, 8, TILES, TOP)
    assert watch.peak <= 0.05 * sum(x.nbytes for x in (q, k, v)) + one_head + 8 * 2**20
    monkeypatch.setattr(coarse, "_LEAST_ROOM", 2**30)
    whole, *_ = compress_and_select(
        q, k, v, None, None, block_size=V, top_k=TOP, scale=0.1, gate=None
    )
    assert torch.equal(whole, selected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_by_groups_of_heads(kv_heads, monkeypatch):
    """Each group transposes its own lists and fills its part of the results, as in one piece."""
    keep = torch.rand(2, 4, 5, 6) > 0.4
    mask = BlockMask.from_dense(keep, 16, 16)
    q = torch.randn(2, 80, 4, 8).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, 96, 8) for _ in range(2))
    out, lse = attention(q, k, v, mask, return_lse=True)
    call = BackwardCall(torch.randn_like(out), None, q, k, v, out, lse, mask, 8**-0.5)
    assert not mask.keeps_transpose
    calls = []
    monkeypatch.setattr(ops, "by_heads", lambda *x: calls.extend(by_heads(*x)) or calls)
    monkeypatch.setattr(ops, "_TRANSPOSE_BYTES", 10**6)
    grads = ops.run_backward(call, None)
    assert len(calls) == kv_heads
    mask.transposed()
    for got, expected in zip(grads, ops.run_backward(call, None), strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    assert len(calls) == kv_heads


def test_coarse_gradients_are_those_of_the_plain_branch():
    """Made again from the means in the backward pass, group by group."""
    torch.manual_seed(0)
    lens = torch.tensor([[4, 0, 2, 4]], dtype=torch.int32)
    grads = []
    for function in (coarse._Average.apply, None):
        torch.manual_seed(1)
        q = torch.randn(2, 4, 5, 8, requires_grad=True)
        k, v = (torch.randn(2, 2, 4, 8, requires_grad=True) for _ in range(2))
        if function is None:
            out = coarse._average(coarse.block_scores(q, k, 0.3), v, lens)
        else:
            out = function(q, k, v, lens, 0.3)
        out.sin().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
def test_a_long_video_on_a_gpu(gpu):
    """118,800 tokens: saved memory at most 1.08 times that of dense attention, and the backward
    pass takes no more than a tenth of q, k and v above what dense attention takes.
    """
    layout = VideoLayout((33, 45, 80), (4, 4, 4))
    heads, lens = 4, layout.block_lens(gpu)
    shape = (1, heads, layout.num_blocks * V, 128)
    inputs = [torch.randn(shape, device=gpu, dtype=torch.bfloat16) for _ in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    size, top_k = sum(x.nbytes for x in inputs), layout.num_blocks // 10
    gate = torch.ones((), device=gpu, dtype=torch.bfloat16)

    def backward_peak(function) -> int:
        """Bytes at most in the backward pass, above what is there before the call."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = function(*inputs)
        torch.cuda.reset_peak_memory_stats()
        out.backward(torch.ones_like(out))
        for x in inputs:
            x.grad = None
        return torch.cuda.max_memory_allocated() - before

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return video_sparse_attn(q, k, v, lens, top_k, V, gate)

    assert saved_bytes(sparse, *inputs) <= 1.08 * saved_bytes(attention, *inputs)
    # The output of the sparse branch is kept, and the sum with the coarse one is another tensor.
    allowed = backward_peak(attention) + 0.1 * size + inputs[0].nbytes
    assert backward_peak(sparse) <= allowed
