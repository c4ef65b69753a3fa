"""What the demo shows: a progress bar, the table, the picture of the maps, the comparison clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from ...device import device_info
from ..bench import Record, Result, write_record
from ..video import Clip, write_clip
from .measure import Measured, Outcome
from .patterns import Settings
from .tokens import Tokens, clip_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

GAP, LABEL_HEIGHT = 8, 26  # pixels, in the comparison clip


def opening(clip: Clip, tokens: Tokens, settings: Settings, source: str) -> str:
    """What is about to be measured, in two lines."""
    frames, height, width, _ = clip.shape
    device = device_info(tokens.q.device)
    grid, tile = _text(tokens.grid), _text(settings.tile)
    return (
        f"A clip of {frames} frames, {width} × {height} pixels, {source}.\n"
        f"{tokens.q.shape[2]:,} tokens ({grid}), {tokens.q.shape[1]} heads of "
        f"{tokens.q.shape[3]}, tiles of {tile}, {_dtype(tokens)}, on {device.name}."
    )


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that goes away when it is done; yields the function that moves it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=what
        )


def table(outcome: Outcome) -> Table:
    """The results, one pattern per row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("attention", no_wrap=True)
    for column in ("pairs", "kept", "time", "speed-up", "error"):
        table.add_column(column, justify="right")
    table.add_column("backend")
    for measured in outcome.patterns:
        error = "–" if measured is outcome.baseline else _percent(measured.error)
        table.add_row(
            measured.title, f"{measured.density:.1%}", f"{measured.kept_weight:.1%}",
            _milliseconds(measured.timing.median),
            Text(f"{outcome.speedup(measured):.2f}×", "bold"), error, measured.backend,
        )  # fmt: skip
    return table


def explanations(outcome: Outcome) -> list[str]:
    """What the columns mean and why the backends are those they are, line by line."""
    repeats = len(outcome.baseline.timing.samples)
    lines = [
        "pairs: query-key pairs that are computed. kept: the share of dense attention's softmax "
        "weight on those pairs.",
        f"time: one forward call, median of {repeats} interleaved runs, on q, k, v that are in "
        "the pattern's order already; VSA's includes the choice of its blocks.",
        f"Tile order for q, k, v, and back, takes {_milliseconds(outcome.ordering.median)}: a "
        "model does it once, not in every layer.",
        f"error: distance of the output from {outcome.baseline.title}, relative (L2).",
    ]
    return [*lines, *outcome.backend_reasons]


def write_results(path: Path, tokens: Tokens, outcome: Outcome) -> None:
    """The table in the form of the benchmarks' records, with machine, versions and commit."""
    problem = {
        "grid": tokens.grid, "heads": tokens.q.shape[1], "head_dim": tokens.q.shape[3],
        "dtype": _dtype(tokens),
    }  # fmt: skip
    results = [
        Result(
            {**problem, "pattern": measured.name},
            measured.backend,
            measured.timing,
            {
                "density": measured.density,
                "kept_weight": measured.kept_weight,
                "speed_up": outcome.speedup(measured),
                "relative_error": measured.error,
            },
        )
        for measured in outcome.patterns
    ]
    write_record(Record.of("demo", results, tokens.q.device), path)


class Drawing(NamedTuple):
    """The picture, with the axes of its maps."""

    figure: Figure
    maps: list[Axes]


def draw_maps(tokens: Tokens, outcome: Outcome) -> Drawing:
    """The picture: what dense attention looks at, what patterns keep of it, what comes out."""
    from ..plot import style

    shown = [outcome.baseline, *outcome.sparse]
    side, gap, bottom = 3.45, 0.35, 0.55  # inches
    below = side * tokens.grid[1] / tokens.grid[2]
    width, height = gap + (side + gap) * len(shown), bottom + below + 0.45 + side + 1.1
    figure = style.new_figure(width, height)
    style.headline(
        figure,
        "What dense attention looks at, and what is kept of it",
        "blocks of queries (down) and of keys (across) in the order of the pattern, first head; "
        "bright: much softmax weight, white: skipped",
    )
    maps = []
    for column, measured in enumerate(shown):
        left = (gap + (side + gap) * column) / width
        map_bottom = (bottom + below + 0.45) / height
        maps.append(figure.add_axes((left, map_bottom, side / width, side / height)))
        _draw_map(maps[-1], measured, outcome.dense_weights)
        axes = figure.add_axes((left, bottom / height, side / width, below / height))
        style.bare(axes, _outcome_line(measured, outcome))
        frame = clip_of(measured.out, tokens)[tokens.grid[0] // 2]
        axes.imshow(frame, interpolation="nearest")
    style.footer(
        figure, "Below: a frame of the output, where each patch is the mean of those it looks at."
    )
    return Drawing(figure, maps)


def _draw_map(axes: Axes, measured: Measured, dense_weights: Tensor) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    from ..plot import style

    weights = dense_weights if measured.weights is None else measured.weights
    image = weights[0].numpy()  # the first head
    if measured.kept is not None:
        image = np.where(measured.kept[0].numpy(), image, np.nan)
    uniform = 1 / image.shape[1]
    scale = LogNorm(uniform / 100, uniform * 100, clip=True)
    colors = colormaps["viridis"].with_extremes(bad=style.PAPER)
    axes.imshow(image, cmap=colors, norm=scale, interpolation="nearest")
    style.bare(axes, measured.title, weight="bold")


def _outcome_line(measured: Measured, outcome: Outcome) -> str:
    if measured is outcome.baseline:
        return f"all pairs, {_milliseconds(measured.timing.median)}"
    share, error = f"{100 * measured.density:.3g}%", _percent(measured.error)
    return f"{share} of pairs, {outcome.speedup(measured):.1f}× as fast, error {error}"


def write_comparison(path: Path, clip: Clip, tokens: Tokens, outcome: Outcome, fps: float) -> None:
    """The clip beside the outputs of dense attention and of each pattern, labelled."""
    panels = [_labelled(clip, "the clip")]
    for measured in (outcome.baseline, *outcome.sparse):
        panels.append(_labelled(clip_of(measured.out, tokens), measured.title))
    gap = np.full((*panels[0].shape[:2], GAP, 3), 255, np.uint8)
    parts = [part for panel in panels for part in (panel, gap)][:-1]
    write_clip(path, np.concatenate(parts, axis=2), fps)


def _labelled(clip: Clip, text: str) -> Clip:
    from PIL import Image, ImageDraw, ImageFont

    label = Image.new("RGB", (clip.shape[2], LABEL_HEIGHT), "white")
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(label).text((0, LABEL_HEIGHT // 2), text, "black", font, anchor="lm")
    strip = np.broadcast_to(np.asarray(label), (len(clip), LABEL_HEIGHT, clip.shape[2], 3))
    return np.concatenate([strip, clip], axis=1)


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _percent(value: float) -> str:
    return f"{value:.1%}" if value >= 5e-4 else "< 0.1%"


def _text(sizes: tuple[int, ...]) -> str:
    return " × ".join(map(str, sizes))


def _dtype(tokens: Tokens) -> str:
    return str(tokens.q.dtype).removeprefix("torch.")
