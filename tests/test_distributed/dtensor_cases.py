"""DTensors on ranks; run by the pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from rank_cases import close
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from video_attn import BlockMask, attention
from video_attn.distributed import sequence_parallel_attention


def like_one_process(group: Any, layout: str, dim: int, kind: str) -> None:
    """out, lse and gradients, sharded over ``dim``, equal those of plain tensors."""
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(0)
    shape = (2, 4, 21, 8) if layout == "bhsd" else (2, 21, 4, 8)
    plain = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    keep = torch.rand(1, 4, 6, 6) > 0.4
    mask = BlockMask.from_dense(keep, 4, 4, q_len=21, kv_len=21)
    expected = attention(*plain, mask, layout=layout, return_lse=True)
    grad = torch.randn_like(expected[0])
    wanted = torch.autograd.grad(expected[0], plain, grad)
    parts = [distribute_tensor(x.detach(), mesh, [Shard(dim)]).requires_grad_() for x in plain]
    out, lse = sequence_parallel_attention(*parts, mask, kind=kind, layout=layout, return_lse=True)
    assert isinstance(out, DTensor) and out.placements == (Shard(dim),) and out.shape == grad.shape
    grads = torch.autograd.grad(out, parts, distribute_tensor(grad, mesh, [Shard(dim)]))
    close("out", out.full_tensor(), expected[0])
    close("lse", lse.full_tensor(), expected[1])
    for name, got, want in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        close(name, got.full_tensor(), want)


def refusals(group: Any) -> list[str]:
    mesh = DeviceMesh.from_group(group, "cpu")
    x = torch.randn(1, 4, 8, 8)
    sharded = distribute_tensor(x, mesh, [Shard(2)])
    messages = []
    for tensors, options in (
        ((sharded, x, sharded), {}),
        ((sharded, distribute_tensor(x, mesh, [Shard(1)]), sharded), {}),
        ((distribute_tensor(x, mesh, [Replicate()]),) * 3, {}),
        ((distribute_tensor(x, mesh, [Shard(3)]),) * 3, {}),
        ((sharded,) * 3, {"group": group}),
    ):
        try:
            sequence_parallel_attention(*tensors, **options)
            messages.append("none")
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    dist.barrier(group)
    return messages
