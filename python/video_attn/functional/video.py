"""What the functions over videos share: the layout of the sequence they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import Options, as_bhsd, attention, check_shapes, checked_call
from ..block_mask import BlockMask
from ..checks import check_bool, forward_mode_is_on, is_plain, wants_gradient
from ..layout import VideoLayout, as_triple
from ..registry import context_backend
from ..tile_order import attend_in_tiles

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


def attend_in_tile_order(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, video: VideoLayout, layout: str,
    options: Options,
) -> Tensor:  # fmt: skip
    """:func:`video_attn.attention` over a video in raster order, by a mask over its tile order."""
    if options.get("precision", "native") != "native" and _only_values(q, k, v):
        call = checked_call(q, k, v, None, layout=layout, **options)
        backend = options.get("backend")
        if backend is None and not torch.compiler.is_compiling():
            backend = context_backend()
        out = attend_in_tiles(call, mask, video, backend)
        return out.transpose(1, 2) if layout == "bshd" else out
    dim = TOKEN_DIM[layout]
    q, k, v = (video.to_tiles(x, dim) for x in (q, k, v))
    return video.from_tiles(attention(q, k, v, mask, layout=layout, **options), dim)


def _only_values(*tensors: Tensor) -> bool:
    """Whether nothing but the output is asked for: no derivative, no transform, no mode."""
    if wants_gradient(*tensors):
        return False
    return torch.compiler.is_compiling() or (is_plain(*tensors) and not forward_mode_is_on())
