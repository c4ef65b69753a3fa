"""Pictures of the patterns: the pixels say what the masks say."""

from __future__ import annotations

from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from video_attn import VideoLayout, cli
from video_attn.layout import Triple
from video_attn.tools import UsageError
from video_attn.tools.plot import sta as plot_sta
from video_attn.tools.plot import sta_blocks as plot_sta_blocks
from video_attn.tools.plot import style
from video_attn.tools.plot.token_maps import sliding_tile_map, sliding_window_map, window_arguments

README = ((1, 10, 10), (1, 2, 2), (1, 6, 6))
CASES = {
    "readme": README,
    "ragged": ((1, 7, 9), (1, 2, 4), (1, 4, 8)),
    "window wider than the grid": ((1, 4, 6), (1, 2, 2), (1, 8, 4)),
    "video": ((4, 4, 6), (2, 2, 3), (2, 4, 3)),
}
cases = pytest.mark.parametrize(("grid", "tile", "window"), CASES.values(), ids=CASES)


def window_on_axis(places: int, size: int, window: int) -> NDArray[np.bool_]:
    """bool [n, n], from the definition: a window of whole tiles, shifted at the border."""
    tiles = -(-places // size)
    window = min(window // size, tiles)
    tile = np.arange(places) // size
    low = np.clip(tile - window // 2, 0, tiles - window)
    return (tile[None, :] >= low[:, None]) & (tile[None, :] < low[:, None] + window)


def definition(
    grid: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...]
) -> NDArray[np.bool_]:
    """bool [S, S] in raster order: a key is seen if every axis sees it."""
    t, h, w = (window_on_axis(n, s, o) for n, s, o in zip(grid, tile, window, strict=True))
    seen = (
        t[:, None, None, :, None, None]
        & h[None, :, None, None, :, None]
        & w[None, None, :, None, None, :]
    )
    return seen.reshape(int(np.prod(grid)), -1)


def colors_at(axes: Axes, frame: style.Frame, cells: NDArray) -> NDArray[np.uint8]:
    """The colour of the pixel in the lower right part of each cell (row, column) of an image."""
    places = axes.transData.transform(cells[:, ::-1] + 0.25)
    columns, rows = places.astype(int).T
    return frame[frame.shape[0] - 1 - rows, columns]


def is_color(pixels: NDArray[np.uint8], color: str) -> NDArray[np.bool_]:
    return (pixels == np.array(style.rgb(color), np.uint8)).all(-1)


@cases
def test_maps_are_the_definition(grid: Triple, tile: Triple, window: Triple) -> None:
    layout = VideoLayout(grid, tile)
    order = layout.tile_order().numpy()
    expected = definition(grid, tile, window)
    assert (sliding_tile_map(layout, window) == expected[np.ix_(order, order)]).all()
    tokens = definition(grid, (1, 1, 1), window)
    assert (sliding_window_map(grid, window) == tokens).all()


@cases
def test_every_frame_lights_the_window(grid: Triple, tile: Triple, window: Triple) -> None:
    """Left: the query tile in one colour, the other keys of its window in another, no more."""
    scene = plot_sta.Scene.of(grid, tile, window)
    order = scene.layout.tile_order().numpy()
    seen = definition(grid, tile, window)
    places = plot_sta.token_positions(grid)
    assert len(np.unique(places, axis=0)) == len(places)
    for step in {0, scene.layout.num_tiles // 2, scene.layout.num_tiles - 1}:
        drawing = plot_sta.draw(scene, step)
        frame = style.pixels(drawing.figure)
        pixels = colors_at(drawing.tokens, frame, places)
        queries = order[scene.rows(step)]
        assert set(np.flatnonzero(is_color(pixels, style.QUERY))) == set(queries)
        lit = is_color(pixels, style.QUERY) | is_color(pixels, style.SEEN)
        assert (lit == seen[queries[0]]).all()
        assert (is_color(pixels, style.EMPTY) == ~lit).all()


def test_the_readme_window_has_36_tokens_at_every_place() -> None:
    scene = plot_sta.Scene.of(*README)
    for step in range(scene.layout.num_tiles):
        assert (scene.seen[scene.rows(step)].sum(1) == 36).all()


def test_the_map_fills_in_row_by_row() -> None:
    scene = plot_sta.Scene.of(*CASES["ragged"])
    size = scene.layout.video_length
    cells = np.stack(np.indices((size, size)), -1).reshape(-1, 2)
    for step in (0, 3, scene.layout.num_tiles - 1):
        drawing = plot_sta.draw(scene, step)
        pixels = colors_at(drawing.map, style.pixels(drawing.figure), cells).reshape(size, size, 3)
        rows = scene.rows(step)
        now = is_color(pixels, style.SEEN) | is_color(pixels, style.QUERY)
        before = is_color(pixels, style.SEEN_BEFORE)
        assert (now[rows] == scene.seen[rows]).all()
        assert (before[: rows[0]] == scene.seen[: rows[0]]).all()
        assert not (now[: rows[0]].any() or (now | before)[rows[-1] + 1 :].any())
        assert (is_color(pixels, style.QUERY).sum(1) > 0).nonzero()[0].tolist() == rows.tolist()


@cases
def test_blocks_are_counted(grid: Triple, tile: Triple, window: Triple) -> None:
    maps = plot_sta_blocks.block_maps(grid, tile, window)
    for blocks in maps:
        full = mixed = empty = computed = 0
        borders = blocks.borders.tolist()
        for top, bottom in pairwise(borders):
            for left, right in pairwise(borders):
                block = blocks.seen[top:bottom, left:right]
                full += bool(block.all())
                empty += not block.any()
                mixed += bool(block.any() and not block.all())
                computed += block.size if block.any() else 0
        assert blocks.counts == (full, mixed, empty)
        assert blocks.useful == pytest.approx(blocks.seen.sum() / computed)
    *sliding, tiles = maps
    assert tiles.counts[1] == 0
    assert tiles.useful == 1
    assert all(blocks.seen.sum() > 0 for blocks in sliding)


def test_sliding_windows_have_mixed_blocks_and_show_them() -> None:
    drawing = plot_sta_blocks.draw(*README)
    frame = style.pixels(drawing.figure)
    maps = plot_sta_blocks.block_maps(*README)
    cells = np.stack(np.indices((100, 100)), -1).reshape(-1, 2)
    for axes, blocks in zip(drawing.maps, maps, strict=True):
        pixels = colors_at(axes, frame, cells).reshape(100, 100, 3)
        seen = is_color(pixels, style.SEEN) | is_color(pixels, style.MIXED)
        assert (seen == blocks.seen).all()
        full, mixed, _ = blocks.counts
        assert is_color(pixels, style.SEEN).sum() == full * 16
        assert (
            is_color(pixels, style.MIXED) | is_color(pixels, style.MIXED_PALE)
        ).sum() == mixed * 16
    assert [blocks.counts[1] > 0 for blocks in maps] == [True, True, False]


# -- files ----------------------------------------------------------------------------------------

SMALL = ["--grid", "4x6", "--tile", "2x2", "--window", "2x4"]  # 6 tiles


def draw(path: Path, name: str = "sta", *more: str) -> Path:
    assert cli.main(["plot", name, *SMALL, "--out", str(path), *more]) == 0
    return path


def test_gif(tmp_path: Path) -> None:
    """One frame per query tile, the last one longer; flat colours survive the palette."""
    with Image.open(draw(tmp_path / "new" / "sta.gif", "sta", "--fps", "4")) as film:
        assert film.n_frames == 6
        durations, frames = [], []
        for index in range(film.n_frames):
            film.seek(index)
            durations.append(film.info["duration"])
            frames.append(np.asarray(film.convert("RGB")))
    assert durations[:-1] == [250] * 5
    assert durations[-1] == 2000
    scene = plot_sta.Scene.of((1, 4, 6), (1, 2, 2), (1, 2, 4))
    places = plot_sta.token_positions((1, 4, 6))
    for step, frame in enumerate(frames):
        drawing = plot_sta.draw(scene, step)
        style.pixels(drawing.figure)  # drawing settles where the axes are
        pixels = colors_at(drawing.tokens, frame, places)
        assert is_color(pixels, style.QUERY).sum() == 4
        assert is_color(pixels, style.SEEN).sum() == 4
    assert len({frame.tobytes() for frame in frames}) == 6


def test_png_shows_the_end(tmp_path: Path) -> None:
    frame = np.asarray(Image.open(draw(tmp_path / "sta.png")))
    scene = plot_sta.Scene.of((1, 4, 6), (1, 2, 2), (1, 2, 4))
    assert (frame == style.pixels(plot_sta.draw(scene, 5).figure)).all()


def test_mp4(tmp_path: Path) -> None:
    with av.open(str(draw(tmp_path / "sta.mp4", "sta", "--fps", "4"))) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert float(film.streams.video[0].average_rate) == 4
    assert len(frames) == 6 + 8  # the last one for two seconds more
    assert (np.abs(frames[0].astype(int) - frames[5]).max()) > 100


def test_blocks_file(tmp_path: Path) -> None:
    with Image.open(draw(tmp_path / "blocks.png", "sta-blocks")) as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--window", "3x6"], "whole number of tiles"),
        (["--tile", "1x2x2"], "differ in axes"),
        (["--grid", "80x80"], "4096"),
    ],
    ids=["window between tiles", "axes", "too many tokens"],
)
@pytest.mark.parametrize("name", ["sta", "sta-blocks"])
def test_impossible_pictures(
    name: str, words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    assert cli.main(["plot", name, *words, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert f"usage: video-attn plot {name}" in message
    assert not out.exists()


def test_images_get_a_time_axis() -> None:
    image = Namespace(grid=(8, 8), tile=(4, 2), window=(4, 4))
    assert window_arguments(image) == ((1, 8, 8), (1, 4, 2), (1, 4, 4))
    film = Namespace(grid=(4, 8, 8), tile=(2, 4, 2), window=(2, 4, 4))
    assert window_arguments(film) == (film.grid, film.tile, film.window)
    with pytest.raises(UsageError, match="--tile 4x2 and --grid 4x8x8"):
        window_arguments(Namespace(grid=(4, 8, 8), tile=(4, 2), window=(2, 4, 4)))
