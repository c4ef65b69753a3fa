"""plot sta: sliding tile attention at work, one query tile after the other."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ...layout import Triple, VideoLayout
from ..options import file_ending_in, positive_float
from . import style
from .token_maps import (
    TokenMap,
    add_window_arguments,
    clipped,
    size_text,
    sliding_tile_map,
    window_arguments,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn plot sta``."""
    add_window_arguments(parser)
    parser.add_argument(
        "--fps", type=positive_float, default=3.0, help="query tiles per second (default 3)"
    )
    parser.add_argument(
        "--out", type=file_ending_in((*style.FILMS, *style.STILLS)), default=Path("sta.gif"),
        help="file to write: .gif or .mp4 moves, .png shows the end (default sta.gif)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Draws the film and says where it is."""
    grid, tile, window = window_arguments(args)
    scene = Scene.of(grid, tile, window)
    steps = range(scene.layout.num_tiles)
    if args.out.suffix.lower() in style.STILLS:
        steps = steps[-1:]
    style.save([style.pixels(draw(scene, step).figure) for step in steps], args.out, args.fps)
    print(f"wrote {args.out}")
    return 0


class Scene(NamedTuple):
    """What every frame shows a part of: the layout, the window in tokens, the map in tile order."""

    layout: VideoLayout
    window: Triple
    seen: TokenMap

    @classmethod
    def of(cls, grid: Triple, tile: Triple, window: Triple) -> Scene:
        layout = VideoLayout(grid, tile)
        return cls(layout, clipped(window, grid), sliding_tile_map(layout, window))

    def rows(self, step: int) -> NDArray[np.int64]:
        """Positions, in tile order, of the tokens of query tile ``step``."""
        lens = self.layout.block_lens().numpy()
        end = int(lens[: step + 1].sum())
        return np.arange(end - int(lens[step]), end)


class Drawing(NamedTuple):
    """A frame: the image of tokens at the left, the attention map at the right."""

    figure: Figure
    tokens: Axes
    map: Axes


def draw(scene: Scene, step: int) -> Drawing:
    """The frame in which query tile ``step`` has its turn."""
    figure = style.new_figure(10.0, 5.6)
    layout = scene.layout
    grid, tile, window = (size_text(x, " × ") for x in (layout.grid, layout.tile, scene.window))
    style.headline(
        figure,
        "Sliding tile attention (STA)",
        f"{grid} tokens in tiles of {tile}, window of {window}: "
        "all queries of a tile share one window of whole tiles",
    )
    tokens = figure.add_axes((0.035, 0.12, 0.44, 0.69), anchor="W")
    image = figure.add_axes((0.53, 0.12, 0.45, 0.69), anchor="E")
    _draw_tokens(tokens, scene, step)
    _draw_map(image, scene, step)
    rows = scene.rows(step)
    keys = int(scene.seen[rows[0]].sum())
    style.footer(
        figure,
        f"query tile {step + 1} of {scene.layout.num_tiles}: each query sees {keys} of "
        f"{scene.layout.video_length} keys",
    )
    style.legend(figure, [(style.QUERY, "query tile"), (style.SEEN, "keys it sees"),
                          (style.SEEN_BEFORE, "earlier rows")])  # fmt: skip
    return Drawing(figure, tokens, image)


def token_positions(grid: Triple) -> NDArray[np.int64]:
    """Where the left image shows each token, in raster order: row and column, int [S, 2]."""
    frames, height, width = grid
    columns = math.ceil(math.sqrt(frames * height / width))
    columns = min(max(columns, 1), frames)
    t, h, w = np.indices(grid).reshape(3, -1)
    row = (t // columns) * (height + 1) + h
    column = (t % columns) * (width + 1) + w
    return np.stack([row, column], axis=1)


def _draw_tokens(axes: Axes, scene: Scene, step: int) -> None:
    layout = scene.layout
    order = layout.tile_order().numpy()
    rows = scene.rows(step)
    places = token_positions(layout.grid)[order]  # in tile order
    colors = np.array([style.rgb(c) for c in (style.EMPTY, style.SEEN, style.QUERY)], np.uint8)
    kind = scene.seen[rows[0]].astype(int)
    kind[rows] = 2
    image = np.full((*(places.max(0) + 1), 3), 255, np.uint8)
    image[places[:, 0], places[:, 1]] = colors[kind]
    style.bare(axes, "The image" if layout.grid[0] == 1 else "The video, frame by frame")
    axes.imshow(image, interpolation="nearest")
    _token_borders(axes, layout)
    _tile_numbers(axes, scene, places, kind)
    frame_of = order[rows] // (layout.grid[1] * layout.grid[2])
    for frame in np.unique(frame_of):
        _outline(axes, places[rows[frame_of == frame]])


def _tile_numbers(
    axes: Axes, scene: Scene, places: NDArray[np.int64], kind: NDArray[np.int64]
) -> None:
    """Numbers the tiles in tile order: the number of their row and column in the map."""
    if scene.layout.num_tiles > 100 or scene.layout.grid[0] > 1:
        return
    for tile in range(scene.layout.num_tiles):
        rows = scene.rows(tile)
        row, column = places[rows[0]]
        color = style.INK_PALE if kind[rows[0]] == 0 else style.PAPER
        axes.text(column, row, str(tile + 1), size=8.5, color=color, ha="center", va="center")


def _outline(axes: Axes, cells: NDArray[np.int64]) -> None:
    (top, left), (bottom, right) = cells.min(0), cells.max(0)
    size = right - left + 1, bottom - top + 1
    axes.add_patch(
        Rectangle((left - 0.5, top - 0.5), *size, fill=False, ec=style.INK, lw=2, zorder=3)
    )


def _token_borders(axes: Axes, layout: VideoLayout) -> None:
    _, height, width = layout.grid
    first = token_positions(layout.grid).reshape(*layout.grid, 2)[:, 0, 0]
    for row, column in first:
        for step_h, step_w, line in ((1, 1, 0.8), (layout.tile[1], layout.tile[2], 3.0)):
            rows = np.append(np.arange(0, height, step_h), height) + row
            columns = np.append(np.arange(0, width, step_w), width) + column
            style.grid_lines(axes, columns, rows, line)


def _draw_map(axes: Axes, scene: Scene, step: int) -> None:
    rows = scene.rows(step)
    colors = np.array(
        [style.rgb(c) for c in (style.EMPTY, style.SEEN_BEFORE, style.SEEN, style.QUERY)], np.uint8
    )
    kind = scene.seen.astype(int)
    kind[rows] *= 2
    kind[rows[-1] + 1 :] = 0
    kind[np.ix_(rows, rows)] = 3
    style.bare(axes, "The attention map, tokens in tile order")
    axes.imshow(colors[kind], interpolation="nearest")
    borders = np.append(0, np.cumsum(scene.layout.block_lens().numpy()))
    style.grid_lines(axes, borders, borders, 0.8 if len(borders) < 80 else 0.2)
    axes.set_xlabel("keys", size=9.5, color=style.INK_PALE, loc="left")
    axes.set_ylabel("queries", size=9.5, color=style.INK_PALE, loc="top")
