"""What the functions over videos share: the layout of the sequence they are given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..attention import as_bhsd, check_shapes
from ..checks import check_bool
from ..layout import VideoLayout, as_triple

TOKEN_DIM = {"bhsd": 2, "bshd": 1}


def video_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: str | Sequence[int],
    tile: str | Sequence[int],
    text_first: bool,
    layout: str,
    names: tuple[str, str] = ("grid", "tile"),
) -> VideoLayout:
    """Checks q, k, v and the grid against each other; what is longer than the video is text."""
    q, k, v = as_bhsd(layout, q=q, k=k, v=v)
    check_shapes(q, k, v)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the tokens of q, {q.shape[2]}, got {k.shape[2]}")
    grid, tile = as_triple(grid, names[0]), as_triple(tile, names[1])
    check_bool("text_first", text_first)
    length = grid[0] * grid[1] * grid[2]
    text = q.shape[2] - length
    if text < 0:
        raise ValueError(f"{names[0]} {grid} has {length} tokens, but q has only {q.shape[2]}")
    return VideoLayout(grid, tile, text, text_first)
