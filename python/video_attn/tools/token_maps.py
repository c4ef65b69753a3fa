"""Attention maps of window patterns, token by token, from the library's own masks; small grids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..layout import Triple, VideoLayout
from ..patterns.sliding_tile import sliding_tile_mask
from . import UsageError

MAX_TOKENS = 4096

TokenMap = NDArray[np.bool_]  # [queries, keys]


def check_sizes(grid: Triple, tile: Triple, window: Triple) -> None:
    """Refuses sizes that make no picture.

    Raises:
        UsageError: too many tokens, or a window that is no whole number of tiles.
    """
    tokens = int(np.prod(grid))
    if tokens > MAX_TOKENS:
        raise UsageError(
            f"--grid {_text(grid)} has {tokens} tokens, a picture shows up to {MAX_TOKENS}; "
            "choose a smaller grid"
        )
    if any(w % t for w, t in zip(window, tile, strict=True)):
        raise UsageError(
            f"--window {_text(window)} is in tokens and must be a whole number of tiles of "
            f"{_text(tile)} on every axis"
        )


def sliding_tile_map(layout: VideoLayout, window: Triple) -> TokenMap:
    """STA with a ``window`` in tokens; queries and keys in tile order, without padding."""
    tiles = tuple(w // t for w, t in zip(window, layout.tile, strict=True))
    mask = sliding_tile_mask(layout, tiles)
    slots = layout.padded_slots()
    return mask.to_token_mask()[0, 0][slots][:, slots].numpy()


def sliding_window_map(grid: Triple, window: Triple) -> TokenMap:
    """Sliding window attention: every query has its own window, shifted at the border.

    It is STA with tiles of one token. Queries and keys are in raster order.
    """
    return sliding_tile_map(VideoLayout(grid, (1, 1, 1)), window)


def _text(size: Triple) -> str:
    return "x".join(map(str, size[1:] if size[0] == 1 else size))
