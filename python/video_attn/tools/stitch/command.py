"""``video-attn stitch``: finds the videos, says what does not fit, writes the grid."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import UsageError
from ..options import file_ending_in, names, positive_float, positive_int
from ..video import write_frames
from . import grid
from .sources import (
    GRID_COMMENT,
    Source,
    find,
    open_sources,
    ordered,
    quality,
    screens,
    with_labels,
)

OUTPUTS = (".mp4", ".mkv", ".mov", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn stitch``."""
    add = parser.add_argument
    add("--input_dir", type=Path, default=Path("rendered_videos"), metavar="DIR",
        help="folder with the videos (default ./rendered_videos)")  # fmt: skip
    add("--output", type=file_ending_in(OUTPUTS), default="comparison_grid.mp4", metavar="FILE",
        help="video, or .png for the middle frame alone (default comparison_grid.mp4)")  # fmt: skip
    add("--pattern", default="cogvideox-*.mp4", metavar="GLOB",
        help="which files of the folder (default cogvideox-*.mp4)")  # fmt: skip
    add("--font_size", type=positive_int, default=36, metavar="N",
        help="of the labels, in pixels (default 36)")  # fmt: skip
    add("--fps", type=positive_float, metavar="N",
        help="frames per second; the videos keep their speed (default: as they are)")  # fmt: skip
    add("--labels", type=names, metavar="A,B,...", help="labels, in the order of the grid")
    add("--order", type=names, default=[], metavar="A,B,...",
        help="attention types that come first (default: by name)")  # fmt: skip
    add("--columns", type=positive_int, metavar="N", help="columns of the grid")
    add("--difference", action="store_true",
        help="under each row of videos a row of their differences to the first video, and the "
        "PSNR in the labels")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Writes the grid and says where it is."""
    sources, grids = open_sources(find(args.input_dir, args.pattern, args.output))
    for path in grids:
        print(f"left out: {path.name}, a grid that this program made")
    stitch(
        sources, args.output, font_size=args.font_size, fps=args.fps, labels=args.labels,
        order=args.order, columns=args.columns, with_difference=args.difference,
    )  # fmt: skip
    return 0


def stitch(
    sources: Sequence[Source],
    output: Path,
    *,
    font_size: int = 36,
    fps: float | None = None,
    labels: Sequence[str] | None = None,
    order: Sequence[str] = (),
    columns: int | None = None,
    with_difference: bool = False,
) -> None:
    """Writes ``sources`` side by side to ``output``: a video, or the middle frame as a picture.

    The cells are as large as the largest video, the grid as long as the longest; what is smaller,
    shorter or slower is fitted, and that is said.

    Raises:
        UsageError: fewer than two videos, or labels and order that are not theirs.
        OSError: the file cannot be written.
    """
    sources = ordered(sources, order)
    if labels is not None:
        sources = with_labels(sources, labels)
    if len(sources) < 2:
        raise UsageError("there must be two or more videos to compare; render more")
    fps = fps or max(source.fps for source in sources)
    frames = max(1, round(max(source.seconds for source in sources) * fps))
    largest = max(sources, key=lambda source: source.width * source.height)
    width, height = (side + side % 2 for side in (largest.width, largest.height))
    for line in _misfits(sources, width, height):
        print(line)
    cells = grid.Cells(width, height, columns or grid.columns_for(len(sources)), [])
    texts = [source.label for source in sources]
    if with_difference:
        decibels = quality(sources, fps, frames, cells.fit)
        texts = [text if n == 0 else f"{text}  {_decibels(x)}" for n, (text, x) in
                 enumerate(zip(texts, decibels, strict=True))]  # fmt: skip
    tags, size = grid.make_tags(texts, font_size, width)
    if size < font_size:
        print(f"labels are of size {size}: {font_size} does not fit into {width} pixels")
    maps: list = []
    if with_difference:
        text = f"difference to {sources[0].label} x {grid.DIFFERENCE_GAIN}"
        maps = grid.make_tags([text], size, width)[0] * len(sources)
    cells = grid.Cells(width, height, cells.columns, tags, maps)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, cells, sources, fps, frames)
    rows = math.ceil(len(sources) / cells.columns)
    print(
        f"wrote {output}: {len(sources)} videos in {rows} x {cells.columns} cells of "
        f"{width} x {height}, {frames} frames at {fps:g} per second"
    )


def _write(
    output: Path, cells: grid.Cells, sources: Sequence[Source], fps: float, frames: int
) -> None:
    with screens(sources, fps) as streams:
        pictures = cells.grids(streams, frames)
        if output.suffix.lower() == ".png":
            from PIL.Image import fromarray

            for _ in range(frames // 2):
                next(pictures)
            fromarray(next(pictures)).save(output, optimize=True)
            return
        write_frames(output, _with_bar(pictures, frames), fps, metadata={"comment": GRID_COMMENT})


def _with_bar(pictures: Iterable, frames: int) -> Iterable:
    """The same, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(pictures, "stitching", frames, console=Console(stderr=True), transient=True)


def _misfits(sources: Sequence[Source], width: int, height: int) -> list[str]:
    """What is done to videos that differ from the others."""
    lines = []
    longest = max(source.seconds for source in sources)
    rate = max(source.fps for source in sources)
    for source in sources:
        if (source.width, source.height) not in ((width, height), (width - 1, height - 1)):
            lines.append(
                f"{source.path.name} is {source.width} x {source.height}: scaled into "
                f"{width} x {height}"
            )
        if source.fps != rate:
            lines.append(f"{source.path.name} has {source.fps:g} frames per second, not {rate:g}")
        if longest - source.seconds > 0.5 / rate:
            lines.append(
                f"{source.path.name} is {source.seconds:.2f} s long: its last frame stays until "
                f"{longest:.2f} s"
            )
    return lines


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"
