"""plot sta-blocks: why STA is fast: its attention map in blocks, beside sliding windows."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...layout import Triple, VideoLayout
from ..options import file_ending_in
from . import style
from .token_maps import (
    TokenMap,
    add_window_arguments,
    clipped,
    size_text,
    sliding_tile_map,
    sliding_window_map,
    window_arguments,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn plot sta-blocks``."""
    add_window_arguments(parser)
    parser.add_argument(
        "--out", type=file_ending_in(style.STILLS), default=Path("sta_blocks.png"),
        help="file to write, .png (default sta_blocks.png)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Draws the picture and says where it is."""
    grid, tile, window = window_arguments(args)
    style.save([style.pixels(draw(grid, tile, window).figure)], args.out, fps=1)
    print(f"wrote {args.out}")
    return 0


class Blocks(NamedTuple):
    """An attention map cut into blocks."""

    title: str
    seen: TokenMap
    borders: NDArray[np.int64]  # [blocks + 1], the same for queries and keys

    @property
    def shares(self) -> NDArray[np.float64]:
        """The part of each block's pairs that is seen, [query blocks, key blocks]."""
        starts, sizes = self.borders[:-1], np.diff(self.borders)
        pairs = np.add.reduceat(np.add.reduceat(self.seen.astype(int), starts, 0), starts, 1)
        return pairs / np.outer(sizes, sizes)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Blocks that are full, mixed and empty."""
        shares = self.shares
        full, empty = int((shares == 1).sum()), int((shares == 0).sum())
        return full, shares.size - full - empty, empty

    @property
    def useful(self) -> float:
        """Seen pairs over all pairs of the blocks that have to be computed."""
        sizes = np.diff(self.borders)
        computed = (np.outer(sizes, sizes) * (self.shares > 0)).sum()
        return float(self.seen.sum() / computed)


def block_maps(grid: Triple, tile: Triple, window: Triple) -> list[Blocks]:
    """Sliding windows in raster and in tile order, and sliding tiles; all of the same window."""
    layout = VideoLayout(grid, tile)
    tiles = np.append(0, np.cumsum(layout.block_lens().numpy())).astype(np.int64)
    chunks = np.append(np.arange(0, layout.video_length, layout.tile_volume), layout.video_length)
    order = layout.tile_order().numpy()
    sliding = sliding_window_map(grid, window)
    return [
        Blocks("Sliding window, raster order", sliding, chunks),
        Blocks("Sliding window, tile order", sliding[np.ix_(order, order)], tiles),
        Blocks("Sliding tile (STA)", sliding_tile_map(layout, window), tiles),
    ]


class Drawing(NamedTuple):
    """The picture, with the axes of its three maps."""

    figure: Figure
    maps: list[Axes]


def draw(grid: Triple, tile: Triple, window: Triple) -> Drawing:
    """The picture: three attention maps with full, mixed and empty blocks coloured and counted."""
    maps = block_maps(grid, tile, window)
    block = math.prod(tile)
    tokens, seen = size_text(grid, " × "), size_text(clipped(window, grid), " × ")
    figure = style.new_figure(11.0, 5.3)
    style.headline(
        figure,
        "Sliding tiles leave no mixed blocks",
        f"attention maps of {tokens} tokens, window of {seen}, "
        f"blocks of {block} × {block}; a mixed block is computed whole, then masked pair by pair",
    )
    axes = [figure.add_axes((0.035 + 0.3175 * i, 0.19, 0.295, 0.61)) for i in range(3)]
    for ax, blocks in zip(axes, maps, strict=True):
        _draw_map(ax, blocks)
    style.legend(
        figure,
        [(style.SEEN, "full block"), (style.MIXED, "seen in a mixed block"),
         (style.MIXED_PALE, "masked in a mixed block"), (style.EMPTY, "skipped block")],
        left=0.035,
    )  # fmt: skip
    return Drawing(figure, axes)


def _draw_map(axes: Axes, blocks: Blocks) -> None:
    colors = np.array(
        [style.rgb(c) for c in (style.EMPTY, style.MIXED_PALE, style.MIXED, style.SEEN)], np.uint8
    )
    sizes = np.diff(blocks.borders)
    state = np.where(blocks.shares == 1, 2, np.where(blocks.shares > 0, 1, 0))
    kind = np.repeat(np.repeat(state, sizes, 0), sizes, 1) + blocks.seen
    full, mixed, empty = blocks.counts
    style.bare(axes, blocks.title, weight="bold")
    axes.imshow(colors[kind], interpolation="nearest")
    style.grid_lines(axes, blocks.borders, blocks.borders, 0.6 if len(blocks.borders) < 80 else 0.2)
    axes.set_xlabel(
        f"{full} full, {mixed} mixed, {empty} skipped\n"
        f"{blocks.useful:.0%} of the computed pairs are used",
        size=10, color=style.INK, loc="left", linespacing=1.5,
    )  # fmt: skip
