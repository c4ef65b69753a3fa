"""Token masks from their definitions: token coordinates and sets, bool [B|1, H|1, Sq, Sk].

True where a query sees a key. Nothing here comes from a BlockMask or a layout of the package: the
code under test cannot agree with itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[int, int, int]


def dense_tokens(q_len: int, kv_len: int) -> Tensor:
    """Every query sees every key."""
    return torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)


def causal_tokens(q_len: int, kv_len: int) -> Tensor:
    """Query i sees keys 0 .. i + kv_len - q_len: the last query sees every key."""
    rows = [[j <= i + kv_len - q_len for j in range(kv_len)] for i in range(q_len)]
    return torch.tensor(rows, dtype=torch.bool).view(1, 1, q_len, kv_len)


def listed_tokens(
    lists: Sequence[Sequence[Sequence[set[int]]]],
    block_sizes: tuple[int, int],
    lengths: tuple[int, int],
    q_block_lens: Sequence[Sequence[int]] | None = None,
    kv_block_lens: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """``lists[b][h][i]``: key blocks that query block i sees; lens: valid tokens ``[b][block]``.

    A leading list of one entry serves every batch (or head).
    """
    (q_size, kv_size), (q_len, kv_len) = block_sizes, lengths
    sizes = [len(x) for x in (lists, q_block_lens, kv_block_lens) if x is not None]
    batch, heads = max(sizes), len(lists[0])
    tokens = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i, seen in enumerate(lists[b % len(lists)][h]):
                q_end = q_size if q_block_lens is None else q_block_lens[b % len(q_block_lens)][i]
                for j in seen:
                    kv_end = (
                        kv_size
                        if kv_block_lens is None
                        else kv_block_lens[b % len(kv_block_lens)][j]
                    )
                    tokens[
                        b, h, i * q_size : i * q_size + q_end, j * kv_size : j * kv_size + kv_end
                    ] = True
    return tokens


def raster_coordinates(grid: Triple) -> list[Triple]:
    """The (t, h, w) of every token of a video, frames first, then rows, then columns."""
    return [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]


def tile_order_coordinates(grid: Triple, tile: Triple) -> list[Triple]:
    """The same tokens, tile after tile in raster order, and in raster order inside each tile."""

    def place(token: Triple) -> tuple[Triple, Triple]:
        return _tile_of(token, tile), token

    return sorted(raster_coordinates(grid), key=place)


def padded_coordinates(grid: Triple, tile: Triple) -> list[Triple | None]:
    """Tile order where every tile owns prod(tile) slots, its tokens first; None is padding."""
    volume = math.prod(tile)
    slots: list[Triple | None] = []
    previous: Triple | None = None
    for token in tile_order_coordinates(grid, tile):
        if previous is not None and _tile_of(token, tile) != previous:
            slots += [None] * (-len(slots) % volume)
        previous = _tile_of(token, tile)
        slots.append(token)
    return slots + [None] * (-len(slots) % volume)


def _tile_of(token: Triple, tile: Triple) -> Triple:
    return token[0] // tile[0], token[1] // tile[1], token[2] // tile[2]


def sliding_tile_tokens(
    coordinates: Sequence[Triple | None],
    grid: Triple,
    tile: Triple,
    windows: Sequence[Triple],
    text_length: int = 0,
    valid_text: int | None = None,
) -> Tensor:
    """Sliding tile attention over [video tokens at ``coordinates``, text], one window per head.

    On an axis of n tiles, a query in tile c sees the tiles [lo, lo + w), where
    lo = clamp(c - w//2, 0, n - w) and w is clipped to n. The first ``valid_text`` text tokens are
    seen by all and see everything; later ones neither see nor are seen.
    """
    valid_text = text_length if valid_text is None else valid_text
    video = torch.tensor([(-1, -1, -1) if c is None else c for c in coordinates]).view(-1, 3)
    real = video[:, 0] >= 0
    text = torch.arange(text_length) < valid_text
    heads = []
    for window in windows:
        near = real[:, None] & real[None, :]
        for axis in range(3):
            tiles = -(-grid[axis] // tile[axis])
            width = min(window[axis], tiles)
            at = video[:, axis] // tile[axis]
            low = (at - width // 2).clamp(0, tiles - width)
            near &= (at[None, :] >= low[:, None]) & (at[None, :] < low[:, None] + width)
        seen_by_video = torch.cat([near, real[:, None] & text[None, :]], 1)
        everything = torch.cat([real, text])
        seen_by_text = text[:, None] & everything[None, :]
        heads.append(torch.cat([seen_by_video, seen_by_text], 0))
    return torch.stack(heads)[None]


def selected_tile_tokens(
    q_tiles: Sequence[int],
    kv_tiles: Sequence[int],
    selected: Sequence[Sequence[Sequence[set[int]]]],
) -> Tensor:
    """Video sparse attention: a query sees the keys of the tiles selected for its own tile.

    ``q_tiles`` and ``kv_tiles`` give the tile number of every token, -1 for padding;
    ``selected[b][h][i]`` is the set of key tiles of query tile i.
    """
    count = 1 + max(
        [*kv_tiles, *(j for heads in selected for rows in heads for row in rows for j in row)]
    )
    q_tile, kv_tile = torch.tensor(q_tiles), torch.tensor(kv_tiles)
    table = torch.zeros(
        len(selected), len(selected[0]), len(selected[0][0]), count, dtype=torch.bool
    )
    for b, heads in enumerate(selected):
        for h, rows in enumerate(heads):
            for i, tiles in enumerate(rows):
                table[b, h, i, sorted(tiles)] = True
    tokens = table[:, :, q_tile.clamp_min(0)][..., kv_tile.clamp_min(0)]
    return tokens & (q_tile >= 0)[:, None] & (kv_tile >= 0)[None, :]
