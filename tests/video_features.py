"""q, k, v as video models have them: slow waves over frames and pixels, fine detail, keys with a
bias per channel, a few channels far larger than the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRID = (6, 12, 16)  # frames, rows, columns of tokens


def waves(dim: int, generator: torch.Generator, detail: float = 0.3) -> Tensor:
    """Six waves per channel over GRID, of variance 1/2 together, and noise: [tokens, dim]."""
    places = [torch.arange(n, dtype=torch.float32) for n in GRID]
    at = torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1).reshape(-1, 3)
    x = detail * torch.randn(len(at), dim, generator=generator)
    for _ in range(6):
        speed = torch.rand(3, dim, generator=generator) * torch.tensor([0.3, 0.5, 0.5])[:, None]
        phase = 2 * math.pi * torch.rand(dim, generator=generator)
        x += torch.sin(at @ speed + phase) / math.sqrt(6)
    return x


def video_qkv(
    bias: float = 8.0, outliers: int = 4, size: float = 8.0, dim: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v [1, 1, tokens, dim] in fp32 and a scale by which scores vary by 2.5.

    Args:
        bias: of the keys, in standard deviations; of every channel another one.
        outliers, size: how many channels of q and k are that much larger.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (waves(dim, generator) for _ in range(3))
    large = torch.randperm(dim, generator=generator)[:outliers]
    for x in (q, k):
        x[:, large] *= size
    spread = (q @ (k - k.mean(0)).T).std()
    k += bias * k.std(0) * torch.randn(dim, generator=generator)
    v += 0.5 * torch.randn(dim, generator=generator)
    return q[None, None], k[None, None], v[None, None], 2.5 / float(spread)
