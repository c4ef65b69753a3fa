"""Sample arguments for every operator of the package, for torch.library.opcheck.

Who adds an operator adds a generator here: test_ops.py fails for an operator without samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from problems import Built, Problem, require_backend

from video_attn import VideoLayout
from video_attn.open_sizes import register_table
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.quantize import QUANTIZED_PRECISIONS

Arguments = tuple[Any, ...]

_SPARSE = Problem(
    index=0, seed=5, kind="lists", dtype=torch.float32, batch=2, kv_heads=1, group=2, head_dim=16,
    head_dim_v=8, memory="bhsd", logits="normal", with_lse_grad=True, q_len=24, kv_len=40,
    q_block_size=8, kv_block_size=16, lens="per-batch", mask_heads=True, density=0.6,
)  # fmt: skip
_DENSE = Problem(
    index=1, seed=6, kind="dense", dtype=torch.float32, batch=1, kv_heads=2, group=1, head_dim=8,
    head_dim_v=8, memory="bshd", logits="normal", with_lse_grad=True, q_len=9, kv_len=9,
)  # fmt: skip


def _mask_arguments(built: Built) -> Arguments:
    if built.mask is None:
        return (*[None] * 6, 0, 0)
    m = built.mask
    return (
        m.kv_num_blocks, m.kv_indices, *m.transposed(), m.q_block_lens, m.kv_block_lens,
        m.q_block_size, m.kv_block_size,
    )  # fmt: skip


def attention_forward() -> Iterator[Arguments]:
    for built, causal in ((_SPARSE.build(), False), (_DENSE.build(), True)):
        for requires_grad in (False, True):
            q, k, v = (x.clone().requires_grad_(requires_grad) for x in (built.q, built.k, built.v))
            yield (q, k, v, *_mask_arguments(built), 0.3, causal, "native", False, None)
        # The sparse lists without their transpose, as forward-only calls pass them.
        kv_lists, lens = _mask_arguments(built)[:2], _mask_arguments(built)[4:]
        inputs = (built.q, built.k, built.v)
        yield (*inputs, *kv_lists, None, None, *lens, 0.3, causal, "native", True, "reference")


def attention_backward() -> Iterator[Arguments]:
    for built in (_SPARSE.build(), _DENSE.build()):
        inputs = (built.q, built.k, built.v)
        mask = _mask_arguments(built)
        out, lse = torch.ops.video_attn.attention_forward(
            *inputs, *mask, 0.3, False, "native", False, "reference"
        )
        for grad_lse in (None, built.grad_lse):
            yield (built.grad_out, grad_lse, *inputs, out, lse, *mask, 0.3, False, True, None)


def attention_tangent() -> Iterator[Arguments]:
    for built, causal in ((_SPARSE.build(), False), (_DENSE.build(), True)):
        inputs, mask = (built.q, built.k, built.v), _mask_arguments(built)
        _, lse = torch.ops.video_attn.attention_forward(
            *inputs, *mask, 0.3, causal, "native", False, "reference"
        )
        tangents = [torch.randn_like(x) for x in inputs]
        for some in (tangents, [tangents[0], None, None]):
            yield (*some, *inputs, lse, *mask, 0.3, causal)


def attention_in_tiles() -> Iterator[Arguments]:
    """A video and text in raster order, BHSD and BSHD in memory."""
    video = VideoLayout((2, 3, 5), (2, 2, 4), text_length=3)
    lists = sliding_tile_mask(video, ((1, 1, 1),), text_length=2).as_arguments(False)
    q, k, v = (torch.randn(1, heads, video.sequence_length, 16) for heads in (2, 1, 1))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for tensors in ((q, k, v), turned):
        yield (*tensors, *video.key, *lists, 0.3, "sage_fp16", "reference")


def cpu_attention_forward() -> Iterator[Arguments]:
    require_backend("cpu")
    for built, causal in ((_SPARSE.build(), False), (_DENSE.build(), True)):
        kv_lists, lens = _mask_arguments(built)[:2], _mask_arguments(built)[4:]
        out, lse = torch.empty_like(built.grad_out), torch.empty_like(built.grad_lse)
        yield (built.q, built.k, built.v, *kv_lists, *lens, 0.3, causal, out, lse)


def cpu_attention_backward() -> Iterator[Arguments]:
    require_backend("cpu")
    for built in (_SPARSE.build(), _DENSE.build()):
        inputs, mask = (built.q, built.k, built.v), _mask_arguments(built)
        out, lse = torch.ops.video_attn.attention_forward(
            *inputs, *mask, 0.3, False, "native", False, "reference"
        )
        grads = [torch.empty_like(x) for x in inputs]
        for grad_lse in (None, built.grad_lse):
            yield (
                built.grad_out, grad_lse, *inputs, out, lse, *mask[2:], 0.3, False, *grads,
            )  # fmt: skip


def cpu_quantized_forward() -> Iterator[Arguments]:
    for *inputs, out, lse in cpu_attention_forward():
        for precision in QUANTIZED_PRECISIONS:
            options = (precision, "per_thread", True, True, False, True)
            yield (*inputs, *options, out.clone(), lse.clone())


def cpu_description() -> Iterator[Arguments]:
    require_backend("cpu")
    yield ()


def block_mean() -> Iterator[Arguments]:
    lens = torch.tensor([[8, 3, 0]], dtype=torch.int32)
    for block_lens in (None, lens):
        yield (torch.randn(2, 2, 20, 4, requires_grad=True), block_lens, 8)


def block_mean_backward() -> Iterator[Arguments]:
    lens = torch.tensor([[8, 3, 4], [0, 8, 1]], dtype=torch.int32)
    for block_lens in (None, lens):
        yield (torch.randn(2, 2, 3, 4, requires_grad=True), block_lens, 8, 20)


def select_top_k() -> Iterator[Arguments]:
    lens = torch.tensor([[8, 0, 4]], dtype=torch.int32)
    for key_lens in (None, lens):
        yield (torch.randn(2, 2, 5, 3), 2, key_lens)


def table() -> Iterator[Arguments]:
    """A table of sizes left open: its name, the constants of its key, the sizes, and so on."""
    register_table("sample", lambda n, device: (torch.arange(n).to(device),), lambda n, _: ((n,),))
    yield "sample", "('?',)", [5], torch.int64, torch.device("cpu")


SAMPLES: dict[str, Callable[[], Iterator[Arguments]]] = {
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "attention_tangent": attention_tangent,
    "attention_in_tiles": attention_in_tiles,
    "cpu_attention_forward": cpu_attention_forward,
    "cpu_attention_backward": cpu_attention_backward,
    "cpu_quantized_forward": cpu_quantized_forward,
    "cpu_description": cpu_description,
    "block_mean": block_mean,
    "block_mean_backward": block_mean_backward,
    "select_top_k": select_top_k,
    "table": table,
}
# Launchers of CUDA kernels: only attention_forward calls them, and they exist on a GPU alone.
GPU_ONLY = {
    "sage_attention",
    "sage_quantize",
    *(f"hopper_{grain}_{way}" for grain in ("coarse", "fine") for way in ("forward", "backward")),
}
