"""Tokens for the demo: from a clip to q, k, v with real locality, and from an output to a clip.

A token is a patch of 8 x 8 pixels of one frame. Head c carries colour c: v is the 64 pixel values
of that colour, so the output of attention is a picture again, the patch averaged with the patches
it attends to (non-local means). q and k are one seeded random projection of the patch, brought to
one length, with 3-D rotary positions: patches that look alike or lie close score high, as in the
attention of video models. There are no learned weights in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...layout import Triple
from ..video import Clip

PATCH = 8
HEADS = 3  # red, green, blue
HEAD_DIM = PATCH * PATCH
_AXIS_DIMS = (16, 24, 24)  # of the 64 dimensions, how many turn with t, h and w
_ROTARY_BASE = 100.0
_SHARPNESS = 2.0  # of the softmax: a patch then attends to some 300 others in effect


class Tokens(NamedTuple):
    """q, k, v [1, 3, S, 64] in raster order over ``grid``, and the mean taken off the colours."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: Triple
    mean: Tensor


def tokens_of(clip: Clip, device: torch.device, dtype: torch.dtype) -> Tokens:
    """The tokens of a clip whose sides are multiples of 8."""
    frames, height, width, _ = clip.shape
    grid = (frames, height // PATCH, width // PATCH)
    pixels = torch.from_numpy(clip).to(device).float() / 127.5 - 1
    patches = pixels.view(frames, grid[1], PATCH, grid[2], PATCH, 3).permute(5, 0, 1, 3, 2, 4)
    v = patches.reshape(1, HEADS, math.prod(grid), HEAD_DIM)
    mean = v.mean((2, 3), keepdim=True)  # without it, every error would look small
    v = v - mean
    keys = _rotated(_descriptors(v), grid)
    queries = keys * _SHARPNESS
    return Tokens(queries.to(dtype), keys.to(dtype), v.to(dtype), grid, mean)


def clip_of(v: Tensor, tokens: Tokens) -> Clip:
    """The clip that values [1, 3, S, 64] in raster order show."""
    frames, rows, columns = tokens.grid
    patches = (v.float() + tokens.mean).view(HEADS, frames, rows, columns, PATCH, PATCH)
    pixels = patches.permute(1, 2, 4, 3, 5, 0).reshape(frames, rows * PATCH, columns * PATCH, HEADS)
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def _descriptors(v: Tensor) -> Tensor:
    """[1, 3, S, 64]: a random view per head of the whole patch, every row of length sqrt(64)."""
    patches = v.permute(0, 2, 1, 3).flatten(2)  # all colours: [1, S, 192]
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(HEADS, patches.shape[-1], HEAD_DIM, generator=generator).to(v.device)
    seen = patches[:, None] @ views / math.sqrt(patches.shape[-1])
    # One constant for all: even patches that do not look alike then share something, and the
    # rotary positions turn that into "close by".
    seen = seen / seen.std((2, 3), keepdim=True) + 1.0
    return normalize(seen, dim=-1) * math.sqrt(HEAD_DIM)


def _rotated(x: Tensor, grid: Triple) -> Tensor:
    """Rotary positions: the dimensions of each axis, in pairs, turned by the place on that axis."""
    places = torch.from_numpy(np.indices(grid).reshape(3, -1)).to(x.device)
    parts = []
    for place, part in zip(places, x.split(_AXIS_DIMS, dim=-1), strict=True):
        half = part.shape[-1] // 2
        speeds = _ROTARY_BASE ** (-torch.arange(half, device=x.device) / half)
        angles = place[:, None] * speeds
        cosine, sine = angles.cos(), angles.sin()
        first, second = part[..., :half], part[..., half:]
        parts += [first * cosine - second * sine, first * sine + second * cosine]
    return torch.cat(parts, dim=-1)
