"""Patterns on GPUs over NCCL, one rank per GPU, against one of them; run by torchrun."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from video_attn import Dense, Radial, SlidingTile, VideoSparse, VideoTokens
from video_attn.distributed import Shards, sequence_parallel_attention

TOKENS = VideoTokens((9, 20, 28), text_length=77, valid_text=50)
TILE = (4, 8, 8)
PATTERNS = {
    "sliding": SlidingTile((3, 3, 3), TILE),
    "sliding, per head": SlidingTile([(1, 3, 3), (3, 1, 3), (3, 3, 1), (1, 1, 1)] * 2, TILE),
    "selected": VideoSparse(top_k=6, tile=(4, 4, 4), gate=None),
    "radial": Radial(),
    "dense": Dense(),
}
MAX_ERROR = 0.02  # of bf16
MAX_ERROR_SELECTED = 0.05  # nearly equal scores may choose otherwise
HEADS, HEAD_DIM = 8, 64


def shards_of(how: str, ranks: int) -> Shards:
    """Even, or of odd lengths with all of the text on every rank."""
    if how == "even":
        return Shards.even(TOKENS.sequence_length, ranks)
    rng = random.Random(ranks)
    cuts = sorted(rng.randint(0, TOKENS.video_length) for _ in range(ranks - 1))
    ends = [0, *cuts, TOKENS.video_length]
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    return Shards.of_lengths(lengths).with_text(TOKENS.text_length)


def compare(name: str, kind: str, how: str, chunks: int | None, device: torch.device) -> None:
    """out and gradients of this rank's part are those of one GPU."""
    rank, ranks, pattern = dist.get_rank(), dist.get_world_size(), PATTERNS[name]
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, HEADS, TOKENS.sequence_length, HEAD_DIM)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    whole, grad = [normal().requires_grad_() for _ in range(3)], normal()
    expected = pattern.attend(*whole, TOKENS)
    wanted = torch.autograd.grad(expected, whole, grad)
    shards = shards_of(how, ranks)
    parts = [shards.take(x, rank, 2).detach().requires_grad_() for x in whole]
    out = sequence_parallel_attention(
        *parts, pattern, tokens=TOKENS, kind=kind, shards=shards, head_chunks=chunks
    )
    if how == "odd":  # copies of text share its gradient
        grad = grad.clone()
        grad[:, :, TOKENS.video_length :] /= ranks
    grads = torch.autograd.grad(out, parts, shards.take(grad, rank, 2))
    close(f"{name}, {kind}, {how}, {chunks}: out", out, shards.take(expected, rank, 2))
    for label, got, all_of_it in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        total = torch.zeros(shape, device=device)
        total[:, :, shards.positions(rank).to(device)] = got.float()
        dist.all_reduce(total)
        close(f"{name}, {kind}, {how}, {chunks}: {label}", total, all_of_it)


def close(label: str, got: Tensor, expected: Tensor) -> None:
    if expected.numel() == 0:
        return
    error = (
        got.detach().double() - expected.detach().double()
    ).norm() / expected.detach().double().norm()
    bound = MAX_ERROR_SELECTED if label.startswith("selected") else MAX_ERROR
    assert error.item() < bound, f"{label}: off by {error.item():.2e}"


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    done = 0
    for name in PATTERNS:
        for kind in ("ulysses", "ring"):
            options: list[tuple[str, Any]] = [("even", None), ("odd", 3)]
            for how, chunks in options:
                compare(name, kind, how, chunks, device)
                done += 1
    torch.cuda.synchronize()
    print(f"rank {dist.get_rank()}: {done} comparisons are right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
