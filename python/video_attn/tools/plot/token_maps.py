"""Attention maps of window patterns, token by token, from the library's own masks; small grids."""

from __future__ import annotations

import argparse
import math

import numpy as np
from numpy.typing import NDArray

from ...layout import Triple, VideoLayout
from ...patterns.sliding_tile import sliding_tile_mask
from .. import UsageError
from ..options import sizes

MAX_TOKENS = 4096

TokenMap = NDArray[np.bool_]  # [queries, keys]


def add_window_arguments(parser: argparse.ArgumentParser) -> None:
    """--grid, --tile and --window, in tokens."""
    size = sizes("HxW", "TxHxW")
    for name, default, what in (
        ("grid", (10, 10), "tokens of the image or video"),
        ("tile", (2, 2), "tokens of a tile"),
        ("window", (6, 6), "tokens of a window, whole tiles"),
    ):
        parser.add_argument(
            f"--{name}", type=size, default=default, metavar="[Tx]HxW",
            help=f"{what} (default {size_text(default)})",
        )  # fmt: skip


def window_arguments(args: argparse.Namespace) -> tuple[Triple, Triple, Triple]:
    """Grid, tile and window with their time axis, 1 for an image.

    Raises:
        UsageError: they differ in axes, there are too many tokens for a picture, or the window is
            no whole number of tiles.
    """
    grid, tile, window = (
        _as_volume(getattr(args, name), f"--{name}", args.grid)
        for name in ("grid", "tile", "window")
    )
    tokens = math.prod(grid)
    if tokens > MAX_TOKENS:
        raise UsageError(
            f"--grid {size_text(grid)} has {tokens} tokens, a picture shows up to {MAX_TOKENS}; "
            "choose a smaller grid"
        )
    if any(w % t for w, t in zip(window, tile, strict=True)):
        raise UsageError(
            f"--window {size_text(window)} is in tokens and must be a whole number of tiles of "
            f"{size_text(tile)} on every axis"
        )
    return grid, tile, window


def _as_volume(size: tuple[int, ...], name: str, grid: tuple[int, ...]) -> Triple:
    if len(size) != len(grid):
        raise UsageError(
            f"{name} {size_text(size)} and --grid {size_text(grid)} differ in axes; give both as "
            "HxW or TxHxW"
        )
    time, height, width = size if len(size) == 3 else (1, *size)
    return time, height, width


def size_text(size: tuple[int, ...], sign: str = "x") -> str:
    """(1, 10, 10) as "10x10": the time axis of an image is left out."""
    return sign.join(map(str, size[1:] if len(size) == 3 and size[0] == 1 else size))


def clipped(window: Triple, grid: Triple) -> Triple:
    """The window that is there: at most the grid."""
    time, height, width = (min(w, n) for w, n in zip(window, grid, strict=True))
    return time, height, width


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
