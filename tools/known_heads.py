"""Heads whose kind is known: they look near, along one axis, by content, or at everything.

For tests, pictures and benchmarks of ``video-attn calibrate``: the right choice for them is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Widths = tuple[float, float, float]
KINDS = ("local", "local in space", "local in time", "by content", "global")
_LOCAL: dict[str, Widths] = {
    "local": (2.0, 2.5, 2.5),
    "local in space": (math.inf, 2.5, 2.5),
    "local in time": (0.7, math.inf, math.inf),
}


def known_head(
    kind: str, grid: Grid, *, dim: int = 32, seed: int = 0, widths: Widths | None = None,
    device: torch.device | str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """q, k, v [1, 1, S, dim], fp32, of one head of a video of ``grid`` tokens.

    Args:
        kind: one of :data:`KINDS`. widths: tokens (t, h, w) that a local head looks around,
            infinite for an axis that does not matter.
    """
    length = math.prod(grid)
    if kind == "by content":
        q = _by_content(grid, dim, seed)
    elif kind == "global":
        q = torch.zeros(length, dim)
    else:
        q = _near(grid, dim, widths or _LOCAL[kind], seed)
    v = torch.randn(length, dim, generator=torch.Generator().manual_seed(seed + 99))
    return [x[None, None].to(device) for x in (q, q, v)]


def _positions(grid: Grid) -> Tensor:
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def _near(grid: Grid, dim: int, widths: Widths, seed: int) -> Tensor:
    """Attention falls off with distance: random Fourier features of a Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(3, dim // 2, generator=generator, dtype=torch.float64)
    angles = _positions(grid) / torch.tensor(widths, dtype=torch.float64) @ frequencies
    features = torch.cat([angles.cos(), angles.sin()], 1) * (2 / dim) ** 0.5
    return (features * (12 * dim**0.5) ** 0.5).float()


def _by_content(grid: Grid, dim: int, seed: int) -> Tensor:
    """Cubes of two tokens a side in six groups, scattered over the video, that see their group."""
    generator = torch.Generator().manual_seed(seed)
    cubes = [-(-n // 2) for n in grid]
    t, h, w = (_positions(grid) // 2).long().T
    group = torch.randint(0, 6, cubes, generator=generator)[t, h, w]
    return torch.nn.functional.one_hot(group, dim).float() * 8
