"""Sliding tile attention (STA): each tile of tokens sees a window of tiles around it.

On an axis of n tiles the window of w tiles at tile c is [lo, lo + w) with
lo = clamp(c - w//2, 0, n - w): it is shifted at the borders, so every tile sees exactly w tiles per
axis, and whole ones: no block of the attention matrix is mixed. After P. Zhang et al., "Fast Video
Generation with Sliding Tile Attention", 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any, cast

import torch
from torch import Tensor

from ..block_lists import dense_from_lists, lists_from_dense
from ..block_mask import BlockMask
from ..checks import as_int
from ..layout import LayoutKey, Triple, VideoLayout, as_triple
from ..static_cache import canonical_device, static_cache, static_object
from .valid_text import TextLength, ValidText, block_lens, check_text_length, listed_text_blocks

Windows = str | int | Sequence[int] | Sequence[Sequence[int]]


def sliding_tile_mask(
    layout: VideoLayout,
    windows: Windows,
    *,
    text_length: TextLength = None,
    device: torch.device | str = "cpu",
    transposed: bool = False,
) -> BlockMask:
    """The STA mask over the padded tile order of ``layout``, text after the video.

    Valid text keys are seen by all queries; valid text queries see everything; text past the valid
    length neither sees nor is seen. The lists are built once per (layout, windows, text, device)
    and kept.

    Args:
        windows: tiles (t, h, w) seen per axis, at most those there are; one window for all heads,
            or a sequence with one per query head.
        text_length: valid text tokens, the first ones: an int, one per batch item, or an integer
            tensor [B] on ``device`` (never read by the host). Default: all the text there is.
        transposed: also build, and keep, the lists that a backward pass needs.

    Raises:
        TypeError, ValueError: ``windows`` or ``text_length`` out of range; the message says which.
    """
    device = canonical_device(device)
    windows = check_windows(windows)
    valid = check_text_length(text_length, layout)
    if isinstance(valid, Tensor):
        return _build_mask(layout.key, windows, valid, device, transposed)
    return _kept_mask(layout.key, windows, valid, device, transposed)


def _build_mask(
    key: LayoutKey, windows: tuple[Triple, ...], valid: ValidText, device: torch.device,
    transposed: bool,
) -> BlockMask:  # fmt: skip
    layout = VideoLayout(*key)
    lens = block_lens(valid, layout, device)
    lists_key = (key, windows, listed_text_blocks(valid, layout), device)
    counts, indices = _lists(*lists_key)
    size, length = layout.tile_volume, layout.padded_length
    transpose = _transposed_lists(*lists_key) if transposed else None
    return BlockMask(counts, indices, size, size, length, length, lens, lens, transpose)


_kept_mask = static_object(_build_mask)


def check_windows(
    windows: Windows, heads: int | None = None, name: str = "windows"
) -> tuple[Triple, ...]:
    """The windows as triples: one for all heads, or one per head.

    Raises:
        TypeError, ValueError: not three integers >= 1, or not one per head.
    """
    if type(windows).__module__ == "numpy":
        windows = list(cast(Sequence[int], windows))
    if not isinstance(windows, Sequence) or (windows and _is_number(windows[0])):
        return (_window(cast("str | int | Sequence[int]", windows), name),)
    if len(windows) == 0 or (heads is not None and len(windows) != heads):
        number = "" if heads is None else f" ({heads})"
        raise ValueError(
            f"{name} must be one (t, h, w) in tiles, or a list with one per query head{number}; "
            f"got {len(windows)} of them"
        )
    return tuple([_window(cast(Sequence[int], window), name) for window in windows])


def _window(window: str | int | Sequence[int], name: str) -> Triple:
    t, h, w = as_triple(window, name)
    return index(t), index(h), index(w)  # constants, where torch.compile may leave them open


def _is_number(value: object) -> bool:
    return isinstance(value, (int, str)) or as_int(value) is not None


def _shapes(
    key: LayoutKey, windows: tuple[Triple, ...], text_blocks: int, device: torch.device
) -> list[tuple[int, ...]]:
    """Of lists for sizes that are left open: wide enough for the windows, clipped or not."""
    layout = VideoLayout(*key)
    heads = 1 if len(set(windows)) == 1 else len(windows)
    if layout.num_text_blocks > 0:
        longest = layout.num_tiles + text_blocks
    else:
        longest = torch.sym_min(max(math.prod(window) for window in windows), layout.num_tiles)
    return [(1, heads, layout.num_blocks), (1, heads, layout.num_blocks, longest)]


@static_cache(torch.int32, _shapes)
def _lists(
    key: LayoutKey, windows: tuple[Triple, ...], text_blocks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(kv_num_blocks, kv_indices) in closed form: a row's tiles are its first tile plus offsets.

    The offsets of a window's tiles from its first tile are the same in every row of a head.
    """
    layout = VideoLayout(*key)
    tiles, (tiles_t, tiles_h, tiles_w) = layout.num_tiles, layout.tile_grid
    windows = tuple((min(t, tiles_t), min(h, tiles_h), min(w, tiles_w)) for t, h, w in windows)
    if len(set(windows)) == 1:  # equal heads share one list
        windows = windows[:1]
    first = _first_tiles(layout, windows, device)
    wide = torch.tensor(windows, dtype=torch.int32, device=device)
    _, wide_h, wide_w = wide[:, :, None].unbind(1)
    seen = wide.prod(1, dtype=torch.int32)[:, None]
    longest = max(math.prod(window) for window in windows) + text_blocks
    if layout.num_text_blocks > 0:
        longest = tiles + text_blocks
    entry = torch.arange(longest, dtype=torch.int32, device=device)[None]
    offset = (
        entry // (wide_h * wide_w) * (tiles_h * tiles_w)
        + entry // wide_w % wide_h * tiles_w
        + entry % wide_w
    )
    after_video = torch.where(entry < seen + text_blocks, tiles + entry - seen, 0)
    offset = torch.where(entry < seen, offset, after_video)
    is_video = (entry < seen).int()
    rows = first.new_empty(len(windows), layout.num_blocks, longest)
    torch.addcmul(offset[:, None], first[:, :, None], is_video[:, None], out=rows[:, :tiles])
    rows[:, tiles:] = entry
    counts = seen.repeat(1, layout.num_blocks).add_(text_blocks)
    counts[:, tiles:] = longest
    return counts[None], rows[None]


def _first_tiles(layout: VideoLayout, windows: tuple[Triple, ...], device: torch.device) -> Tensor:
    """int32 [windows, num_tiles]: the lowest tile that each tile sees."""
    _, tiles_h, tiles_w = layout.tile_grid
    low = []
    for axis, tiles in enumerate(layout.tile_grid):
        wide = torch.tensor([w[axis] for w in windows], dtype=torch.int32, device=device)[:, None]
        at = torch.arange(tiles, dtype=torch.int32, device=device)
        low.append((at - wide // 2).clamp_min(0).minimum(tiles - wide))
    low_t, low_h, low_w = low
    first = (
        low_t[:, :, None, None] * (tiles_h * tiles_w)
        + low_h[:, None, :, None] * tiles_w
        + low_w[:, None, None, :]
    )
    return first.flatten(1)


def _transposed_shapes(key: LayoutKey, *rest: Any) -> list[tuple[int, ...]]:
    blocks = VideoLayout(*key).num_blocks
    counts, _ = _shapes(key, *rest)
    return [counts, (*counts, blocks)]


@static_cache(torch.int32, _transposed_shapes)
def _transposed_lists(
    key: LayoutKey, windows: tuple[Triple, ...], text_blocks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    lists = _lists(key, windows, text_blocks, device)
    dense = dense_from_lists(*lists, VideoLayout(*key).num_blocks)
    return lists_from_dense(dense.transpose(-1, -2))
