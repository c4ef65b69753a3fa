"""Sparsified models in DistributedDataParallel and FSDP2: two ranks over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from sparsity_cases import GRID, VideoModel, config, made, video
from torch import nn
from torch.distributed.fsdp import fully_shard

import video_attn.sparsity as mtsa


def _model() -> Any:
    model = mtsa.sparsify(made(VideoModel), config(ratio=0.25, video_shape=GRID))
    mtsa.add_gates(model)
    return model


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        for kind in ("ddp", "fsdp"):
            grads = _gradients(kind, rank)
            if rank == 0:
                save_file(grads, folder / f"{kind}.safetensors")
    finally:
        dist.destroy_process_group()


def _gradients(kind: str, rank: int) -> dict[str, torch.Tensor]:
    model = _model()
    if kind == "ddp":
        wrapped: Any = nn.parallel.DistributedDataParallel(model)
    else:
        for block in model.blocks:
            fully_shard(block)
        wrapped = fully_shard(model)
    wrapped(video(2)[rank : rank + 1], video(2, 5)[rank : rank + 1]).square().mean().backward()
    modules = mtsa.get_named_sparse_attention_modules(wrapped)
    assert modules[0][0] == "blocks.0.attn1"
    assert [m._sparse_attention.sparse_calls for _, m in modules] == [1, 0, 1, 0]
    grads: dict[str, Any] = {name: x.grad for name, x in model.named_parameters()}
    return {n: (g.full_tensor() if kind == "fsdp" else g).clone() for n, g in grads.items()}


def test_two_ranks(tmp_path: Path) -> None:
    """Gradients of two ranks with one video each are those of one process with both."""
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    model = _model()
    model(video(2), video(2, 5)).square().mean().backward()
    for kind in ("ddp", "fsdp"):
        got = load_file(tmp_path / f"{kind}.safetensors")
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(got[name], parameter.grad, rtol=1e-3, atol=1e-6), (kind, name)
