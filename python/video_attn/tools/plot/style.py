"""What the pictures share: colours, type, lines, and files by extension."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ..video import write_clip

if TYPE_CHECKING:
    from PIL.Image import Image

# Okabe and Ito's colours: told apart by people with any kind of colour vision.
QUERY, SEEN, MIXED = "#D55E00", "#0072B2", "#E69F00"
SEEN_BEFORE, MIXED_PALE, EMPTY = "#8CC4E8", "#FBE6BF", "#E9ECEF"
INK, INK_PALE, PAPER = "#1F2933", "#5F6B77", "#FFFFFF"
DPI = 100
MARGIN = 0.35  # inches, left of titles
STILLS, FILMS = (".png",), (".gif", ".mp4")

Frame = NDArray[np.uint8]


def rgb(color: str) -> tuple[int, int, int]:
    """A colour as it stands in the pixels of a picture."""
    red, green, blue = (round(255 * part) for part in to_rgb(color))
    return red, green, blue


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, in inches; it needs no display and no pyplot."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def headline(figure: Figure, title: str, subtitle: str) -> None:
    """A title and, under it, a line that says what one sees."""
    height, left = figure.get_figheight(), MARGIN / figure.get_figwidth()
    figure.text(left, 1 - 0.34 / height, title, size=15, weight="bold", color=INK, va="center")
    figure.text(left, 1 - 0.64 / height, subtitle, size=10.5, color=INK_PALE, va="center")


def footer(figure: Figure, text: str) -> None:
    """A line at the bottom: what follows from the picture."""
    height = figure.get_figheight()
    figure.text(
        MARGIN / figure.get_figwidth(), 0.24 / height, text, size=10.5, color=INK, va="center"
    )


def bare(axes: Axes, title: str, weight: str = "normal") -> None:
    """Axes without ticks and frame, with a small title at the left."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, size=10.5, color=INK, loc="left", pad=7, weight=weight)


def legend(figure: Figure, entries: Sequence[tuple[str, str]], left: float | None = None) -> None:
    """Coloured patches with names, in a row at the bottom: from ``left``, or at the right."""
    side: Literal["center left", "center right"]
    side, x = ("center right", 0.98) if left is None else ("center left", left)
    handles = [Patch(facecolor=color, label=label) for color, label in entries]
    figure.legend(
        handles=handles, loc=side, bbox_to_anchor=(x, 0.24 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1.0, handleheight=1.0,
        columnspacing=1.4, borderaxespad=0.0, borderpad=0.0,
    )  # fmt: skip


def grid_lines(axes: Axes, columns: NDArray, rows: NDArray, width: float) -> None:
    """White lines at cell borders ``columns`` and ``rows`` of an image."""
    top, bottom, left, right = (x - 0.5 for x in (rows[0], rows[-1], columns[0], columns[-1]))
    axes.vlines(columns - 0.5, top, bottom, colors=PAPER, linewidths=width)
    axes.hlines(rows - 0.5, left, right, colors=PAPER, linewidths=width)


def pixels(figure: Figure) -> Frame:
    """The drawn figure, uint8 [height, width, 3]."""
    figure.canvas.draw()
    buffer = figure.canvas.buffer_rgba()  # type: ignore[attr-defined]
    return np.asarray(buffer)[..., :3].copy()


def save(frames: Sequence[Frame], path: Path, fps: float, hold: float = 2.0) -> None:
    """Writes a film (.gif, .mp4) that ends in ``hold`` seconds of its last frame, or that frame."""
    from PIL.Image import fromarray

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        fromarray(frames[-1]).save(path, optimize=True)
    elif path.suffix.lower() == ".gif":
        palette = _palette(frames[-1])
        images = [_indexed(frame, palette) for frame in frames]
        durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * hold)]
        images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    else:
        still = [frames[-1]] * round(hold * fps)
        write_clip(path, np.stack([*frames, *still]), fps)


def _palette(frame: Frame) -> NDArray[np.uint8]:
    """The most frequent colours of ``frame``, up to 128: one palette for a film, no flicker."""
    colors, counts = np.unique(_packed(frame), return_counts=True)
    frequent = colors[np.argsort(-counts, kind="stable")[:128]]
    return np.stack([frequent >> 16, frequent >> 8 & 255, frequent & 255], 1).astype(np.uint8)


def _indexed(frame: Frame, palette: NDArray[np.uint8]) -> Image:
    """``frame`` in the nearest colours of ``palette``: flat areas keep theirs exactly."""
    from PIL.Image import fromarray

    _, first, places = np.unique(_packed(frame), return_index=True, return_inverse=True)
    colors = frame.reshape(-1, 3)[first].astype(int)
    nearest = ((colors[:, None] - palette.astype(int)) ** 2).sum(-1).argmin(1).astype(np.uint8)
    image = fromarray(nearest[places].reshape(frame.shape[:2]))
    image.putpalette(palette.tobytes())
    return image


def _packed(frame: Frame) -> NDArray[np.int64]:
    return frame.reshape(-1, 3).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
