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
        q = _by_content(grid, dim, seed, device)
    elif kind == "global":
        q = torch.zeros(length, dim, device=device)
    else:
        q = _near(grid, dim, widths or _LOCAL[kind], seed, device)
    v = torch.randn(length, dim, generator=torch.Generator().manual_seed(seed + 99))
    return [x[None, None].to(device) for x in (q, q, v)]


def smooth_features(
    grid: Grid, dim: int, *, length: float = 8.0, seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """fp32 [S, dim]: random waves, so that tokens up to about ``length`` apart are alike, as those
    of a video are.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(3, dim, generator=generator) / length
    phases = torch.rand(dim, generator=generator) * 2 * math.pi
    positions = _positions(grid, device).float()
    return (positions @ frequencies.to(device) + phases.to(device)).cos() * 2**0.5


def _positions(grid: Grid, device: torch.device | str) -> Tensor:
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def _near(
    grid: Grid, dim: int, widths: Widths, seed: int, device: torch.device | str
) -> Tensor:  # fmt: skip
    """Attention falls off with distance: random Fourier features of a Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(3, dim // 2, generator=generator, dtype=torch.float64)
    scale = torch.tensor(widths, dtype=torch.float64, device=device)
    angles = _positions(grid, device) / scale @ frequencies.to(device)
    features = torch.cat([angles.cos(), angles.sin()], 1) * (2 / dim) ** 0.5
    return (features * (12 * dim**0.5) ** 0.5).float()


def _by_content(grid: Grid, dim: int, seed: int, device: torch.device | str) -> Tensor:
    """Cubes of two tokens a side in six groups, scattered over the video, that see their group."""
    generator = torch.Generator().manual_seed(seed)
    cubes = [-(-n // 2) for n in grid]
    t, h, w = (_positions(grid, device) // 2).long().T
    group = torch.randint(0, 6, cubes, generator=generator).to(device)[t, h, w]
    return torch.nn.functional.one_hot(group, dim).float() * 8
