"""Bytes that ranks send, counted while they send them; run by the pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from rank_cases import group_of

from video_attn import BlockMask, VideoLayout, VideoSparse, VideoTokens, video_sparse
from video_attn.distributed import (
    Shards,
    record_traffic,
    sequence_parallel_attention,
    sequence_parallel_plan,
)

HEADS, KV_HEADS, D, DV = 4, 2, 8, 16
Counts = dict[str, int]


def tensors(tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((HEADS, D), (KV_HEADS, D), (KV_HEADS, DV))
    return [
        torch.randn(batch, heads, tokens, channels, generator=generator, dtype=dtype)
        for heads, channels in shapes
    ]


def sent(group: Any, mask: Any, kind: str, batch: int, shards: Shards, **options: Any) -> list[Any]:
    """(forward, forward and backward) bytes by label that this rank sent, and was planned to."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    parts = [shards.take(x, rank, 2).requires_grad_() for x in tensors(shards.length, batch)]
    with record_traffic() as traffic:
        out = sequence_parallel_attention(
            *parts,
            mask,
            group=group_of(group, kind),
            kind=kind,
            shards=shards,
            head_chunks=2,
            **options,
        )
        forward = traffic.by_label
        out.sum().backward()
    plan = sequence_parallel_plan(
        mask, (2, 2) if kind == "usp" else ranks, kind=kind, q_heads=HEADS, kv_heads=KV_HEADS,
        head_dim=D, head_dim_v=DV, batch=batch, dtype=torch.float32, shards=shards, **options,
    )  # fmt: skip
    planned = [dict(plan.forward[rank]), dict(plan.forward[rank] + plan.backward[rank])]
    measured = [{k: n for k, n in x.items() if n} for x in (forward, traffic.by_label)]
    assert measured == planned, f"sent {measured}, planned {planned}"
    return [traffic.total, plan.imbalance, str(plan), str(traffic)]


def selected(group: Any, grid: tuple[int, int, int], hot: bool) -> tuple[int, int, int]:
    """Key bytes of a ring of VideoSparse: sent, and what its own mask asks for; and of dense."""
    tile, top_k = (2, 2, 2), 3
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    video, tokens = VideoLayout(grid, tile), VideoTokens(grid)
    q, k, v = tensors(video.video_length)
    if hot:  # neighbours look alike, as in a video: tiles choose near ones
        place = torch.linspace(0, 3, video.video_length)[:, None]
        q, k = (x * 0.1 + torch.cat([place.cos(), place.sin()] * (D // 2), -1) * 4 for x in (q, k))
    order = video.tile_order()
    shards = Shards.even(video.video_length, ranks)
    parts = [shards.take(x[:, :, order], rank, 2) for x in (q, k, v)]
    with record_traffic() as traffic:
        sequence_parallel_attention(
            *parts, VideoSparse(top_k=top_k, tile=tile, gate=0), tokens=tokens, tile_order=True,
            group=group, kind="ring",
        )  # fmt: skip
    _, mask = video_sparse(q, k, v, grid, top_k=top_k, tile=tile, gate=0, return_mask=True)
    assert isinstance(mask, BlockMask)
    dense, lengths = mask.to_dense(), [n // 8 for n in shards.lengths]
    keep = dense.unflatten(1, (KV_HEADS, -1)).any(2).split(lengths, -1)[rank]
    wanted = [rows.any(2).sum() for r, rows in enumerate(keep.split(lengths, 2)) if r != rank]
    block = 8 * (D + DV) * 4
    keys = sum(n for label, n in traffic.by_label.items() if "keys" in label)
    return keys, int(sum(wanted)) * block, lengths[rank] * KV_HEADS * (ranks - 1) * block
