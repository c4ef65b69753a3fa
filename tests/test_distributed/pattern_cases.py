"""Patterns on ranks: against their own ``attend`` in one process."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import close, group_of, random_shards, scattered_shards, sum_of_copies
from torch import Tensor

from video_attn import VideoTokens
from video_attn.distributed import Shards, record_traffic, sequence_parallel_attention


def shards_of(how: str, tokens: VideoTokens, ranks: int, seed: int) -> Shards:
    rng = random.Random(seed)
    length = tokens.sequence_length
    if how == "text everywhere":
        return Shards.even(tokens.video_length, ranks).with_text(
            tokens.text_length, tokens.text_first
        )
    makers = {"even": lambda n, r, _: Shards.even(n, r), "random": random_shards}
    return (makers | {"scattered": scattered_shards})[how](length, ranks, rng)


def pattern(
    group: Any, pattern: Any, tokens: VideoTokens, kind: str, how: str, *, heads: int = 3,
    kv_heads: int = 3, batch: int = 1, gate: str = "none", seed: int = 0, layout: str = "bhsd",
    tile_order: bool = False, head_chunks: int | None = None,
) -> int:  # fmt: skip
    """out and gradients of this rank's part equal those of one process; the bytes it sent."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, channels: int) -> Tensor:
        shape = (batch, heads, tokens.sequence_length, channels)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    whole = [normal(heads, 16), normal(kv_heads, 16), normal(kv_heads, 24)]
    weights = {"tensor": normal(heads, 24), "heads": normal(heads, 1)[:, :, :1]}
    weight: Any = ({"none": None, "number": 0.5} | weights)[gate]
    whole += [weight] if gate in ("tensor", "heads") else []
    grad_out = normal(heads, 24)
    inputs = [x.clone().requires_grad_() for x in whole]
    expected = pattern.attend(
        *inputs[:3], tokens, gate=inputs[3] if len(inputs) > 3 else weight
    )  # fmt: skip
    wanted = torch.autograd.grad(expected, inputs, grad_out)
    if tile_order:
        order = tokens.layout(pattern.tile).tile_order()
        whole, wanted = (
            [x if x.shape[2] == 1 else x[:, :, order] for x in xs] for xs in (whole, wanted)
        )
        expected, grad_out = expected[:, :, order], grad_out[:, :, order]
    shards = shards_of(how, tokens, ranks, seed)

    def part(x: Tensor) -> Tensor:
        x = shards.take(x, rank, 2) if x.shape[2] > 1 else x
        x = x.transpose(1, 2) if layout == "bshd" else x
        return x.detach().clone().requires_grad_()

    own = [part(x) for x in whole]
    with record_traffic() as traffic:
        out = sequence_parallel_attention(
            *own[:3], pattern, tokens=tokens, tile_order=tile_order,
            gate=own[3] if len(own) > 3 else weight,
            group=group_of(group, kind), kind=kind, shards=shards, layout=layout,
            head_chunks=head_chunks,
        )  # fmt: skip
        count = torch.zeros(shards.length, dtype=torch.float64)
        for r in range(ranks):
            count[shards.positions(r)] += 1
        own_grad = shards.take(grad_out / count[:, None], rank, 2)
        own_grad = own_grad.transpose(1, 2) if layout == "bshd" else own_grad
        grads = torch.autograd.grad(out, own, own_grad)
    if layout == "bshd":
        out, *grads = (x.transpose(1, 2) for x in (out, *grads))
    close("out", out, shards.take(expected.detach(), rank, 2))
    for name, got, all_of_it in zip(("dq", "dk", "dv", "dgate"), grads, wanted, strict=False):
        if got.shape[2] == 1 and all_of_it.shape[2] == 1:  # one gate for all tokens
            dist.all_reduce(got, group=group)
            close(name, got, all_of_it)
            continue
        close(name, sum_of_copies(got, shards, rank, group), shards.take(all_of_it, rank, 2))
    return traffic.total
