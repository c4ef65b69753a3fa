"""DTensors in, DTensors out: placements say which tokens or heads a rank holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..attention import attention
from ..block_mask import BlockMask
from .job import heads_of_mask
from .request import Group, Request
from .shards import Shards


def attention_of_dtensors(
    attend: Callable[..., Any],
    request: Request,
    group: Group,
    kind: str,
    layout: str,
    check: bool,
    timeout: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Any:
    """``attend`` on the local parts of q, k, v, and the result as a DTensor placed like q.

    Sharded over the sequence, they take the way of ``kind``; sharded over the heads, each rank
    attends to its own heads and nothing moves.

    Raises:
        TypeError: some of q, k, v are no DTensors. ValueError: placements that differ, or are
            neither; arguments that the placements say already.
    """
    mesh, dim = _mesh_and_dim(q, k, v)
    if group is not None and group != mesh:
        raise ValueError(f"group must be None or the mesh of q, {mesh}, got {group!r}")
    if request.shards is not None or request.kv_shards is not None:
        raise ValueError("shards and kv_shards must be None: DTensors say what a rank holds")
    token_dim, head_dim = (2, 1) if layout == "bhsd" else (1, 2)
    local = [x.to_local() for x in (q, k, v)]  # type: ignore[attr-defined]
    if dim == token_dim:
        shards = Shards.chunked(q.shape[token_dim], mesh.size())
        kv_shards = Shards.chunked(k.shape[token_dim], mesh.size())
        request = dataclasses.replace(request, shards=shards, kv_shards=kv_shards)
        result = attend(request, mesh, kind, layout, check, timeout, *local)
    elif dim == head_dim:
        result = _own_heads(request, layout, q, k, mesh, head_dim, local)
    else:
        raise ValueError(
            f"q, k and v must be sharded over the sequence, Shard({token_dim}), or over the heads, "
            f"Shard({head_dim}), for layout {layout!r}; got Shard({dim})"
        )
    if isinstance(result, tuple):
        out, lse = result
        lse_dim = 2 if dim == token_dim else 1
        lse_shape = (q.shape[0], q.shape[head_dim], q.shape[token_dim])
        return _wrap(out, mesh, dim, (*q.shape[:3], v.shape[3])), _wrap(
            lse, mesh, lse_dim, lse_shape
        )
    return _wrap(result, mesh, dim, (*q.shape[:3], v.shape[3]))


def _mesh_and_dim(*tensors: Tensor) -> tuple[DeviceMesh, int]:
    for name, x in zip("qkv", tensors, strict=True):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name} must be a DTensor like the others, got {type(x).__name__}")
    q = tensors[0]
    assert isinstance(q, DTensor)
    for name, x in zip("qkv", tensors, strict=True):
        assert isinstance(x, DTensor)
        if x.device_mesh != q.device_mesh or x.placements != q.placements:
            raise ValueError(
                f"{name} must have the mesh and placements of q, {q.placements}, got {x.placements}"
            )
    (placement, *others) = q.placements
    if others or type(placement) is not Shard:
        raise ValueError(
            "q, k and v must be on a one-dimensional mesh and sharded over the sequence or the "
            f"heads, got placements {q.placements}; use redistribute() first"
        )
    return q.device_mesh, placement.dim % q.dim()


def _own_heads(
    request: Request,
    layout: str,
    q: Tensor,
    k: Tensor,
    mesh: DeviceMesh,
    head_dim: int,
    local: list[Tensor],
) -> Any:
    """Attention of each rank to its own heads."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    if request.mask is not None and not isinstance(request.mask, BlockMask):
        raise ValueError("mask must be a BlockMask or None where heads are sharded: use attend()")
    heads, kv_heads = q.shape[head_dim], k.shape[head_dim]
    if heads % ranks or kv_heads % ranks:
        raise ValueError(
            f"heads must be divisible by the {ranks} ranks where they are sharded, got {heads} "
            f"and {kv_heads}"
        )
    mask = request.mask
    if mask is not None:
        mask = heads_of_mask(mask, heads // ranks * rank, heads // ranks * (rank + 1))
    return attention(
        *local, mask, precision=request.precision, scale=request.scale,
        is_causal=request.is_causal, return_lse=request.return_lse, layout=layout,
        backend=request.backend, deterministic=request.deterministic,
        quantization=request.quantization,
    )  # type: ignore[call-overload]  # fmt: skip


def _wrap(local: Tensor, mesh: DeviceMesh, dim: int, shape: tuple[int, ...]) -> DTensor:
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape),
        stride=strides,
    )  # fmt: skip
