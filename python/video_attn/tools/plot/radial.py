"""plot radial: radial attention in blocks and by pair of frames: fewer tokens, farther frames."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...block_mask import BlockMask
from ...layout import VideoLayout
from ...patterns.radial import (
    MODEL_TYPES,
    POOLINGS,
    RadialRule,
    density_by_distance,
    frame_density,
    radial_mask,
)
from ...patterns.scene import Scenes
from .. import UsageError
from ..options import file_ending_in, positive_float, positive_int, sizes
from . import style

SHARE = LinearSegmentedColormap.from_list("share", [style.EMPTY, style.SEEN_BEFORE, style.SEEN])
MOST_FRAMES_WITH_NUMBERS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn plot radial``."""
    add_pattern_arguments(parser)
    parser.add_argument(
        "--out", type=file_ending_in(style.STILLS), default=Path("radial.png"),
        help="file to write, .png (default radial.png)",
    )  # fmt: skip


def add_pattern_arguments(parser: argparse.ArgumentParser) -> None:
    """What describes the video and the rule."""
    add = parser.add_argument
    add("--grid", type=sizes("TxHxW"), default=(13, 30, 45),
        help="tokens of the video (default 13x30x45, CogVideoX)")  # fmt: skip
    add("--text", type=_text_length, default=226, help="text tokens (default 226)")
    add("--text-last", action="store_true", help="text after the video, not before it")
    add("--model", choices=tuple(MODEL_TYPES), default="cogvideox",
        help="whose published rule (default cogvideox)")  # fmt: skip
    add("--decay", type=positive_float, default=1.0, help="decay factor (default 1)")
    add("--pooling", choices=POOLINGS, default="majority",
        help="when a block is seen (default majority)")  # fmt: skip
    add("--block-size", type=positive_int, default=128, help="tokens of a block (default 128)")


def run(args: argparse.Namespace) -> int:
    """Draws the picture and says where it is."""
    return run_with_scenes(args, None)


def run_with_scenes(args: argparse.Namespace, scenes: Scenes | None) -> int:
    """The same for a video of several scenes."""
    layout = VideoLayout(args.grid, (1, *args.grid[1:]), args.text, not args.text_last)
    rule = RadialRule(decay_factor=args.decay, pooling=args.pooling, **MODEL_TYPES[args.model])
    try:
        figure = draw(layout, rule, args.block_size, scenes).figure
    except ValueError as error:
        raise UsageError(f"{error}; change --boundaries, --unit or --straddle") from error
    style.save([style.pixels(figure)], args.out, fps=1)
    print(f"wrote {args.out}")
    return 0


class Drawing(NamedTuple):
    """The picture, its axes, and what they show."""

    figure: Figure
    blocks: Axes
    frames: Axes
    distances: Axes
    mask: BlockMask
    density: NDArray[np.float64]  # [T, T]


def draw(
    layout: VideoLayout, rule: RadialRule, block_size: int, scenes: Scenes | None = None
) -> Drawing:
    """The block mask, its density by pair of frames, and by distance."""
    mask = radial_mask(layout, rule, block_size=block_size, scenes=scenes)
    density = frame_density(layout, mask)
    figure = style.new_figure(13.0, 5.9)
    frames, rows, columns = layout.grid
    text = f", {layout.text_length} text tokens {'first' if layout.text_first else 'last'}"
    style.headline(
        figure,
        "Radial attention" if scenes is None else "Radial attention of a video of several scenes",
        f"{frames} frames of {rows} × {columns} tokens{text if layout.text_length else ''}, "
        f"blocks of {block_size}: {mask.density():.0%} of all pairs are computed",
    )
    blocks = figure.add_axes((0.027, 0.115, 0.345, 0.70))
    pairs = figure.add_axes((0.405, 0.115, 0.345, 0.70))
    distances = figure.add_axes((0.80, 0.20, 0.175, 0.615))
    _draw_blocks(blocks, layout, mask)
    _draw_frames(pairs, density.numpy(), scenes)
    _draw_distances(distances, density_by_distance(density).numpy(), rule)
    entries = [(style.SEEN, "seen"), (style.MIXED, "seen: holds text"), (style.EMPTY, "skipped")]
    style.legend(figure, entries if layout.text_length else entries[::2], left=0.027)
    return Drawing(figure, blocks, pairs, distances, mask, density.numpy())


def _draw_blocks(axes: Axes, layout: VideoLayout, mask: BlockMask) -> None:
    size = mask.q_block_size
    starts = np.arange(mask.num_q_blocks) * size
    ends = np.minimum(starts + size, layout.sequence_length)
    text_first = layout.text_first
    has_text = starts < layout.text_length if text_first else ends > layout.video_length
    kind = mask.to_dense()[0, 0].int().numpy()
    kind[has_text[:, None] | has_text] = 2
    colors = np.array([style.rgb(c) for c in (style.EMPTY, style.SEEN, style.MIXED)], np.uint8)
    style.bare(axes, "The mask, block by block")
    axes.imshow(colors[kind], interpolation="nearest")
    first = layout.text_length if layout.text_first else 0
    tokens = layout.grid[1] * layout.grid[2]
    borders = (first + np.arange(layout.grid[0] + 1) * tokens) / size
    style.grid_lines(axes, borders, borders, 0.7)
    axes.set_xlabel("keys", size=9.5, color=style.INK_PALE, loc="left")
    axes.set_ylabel("queries", size=9.5, color=style.INK_PALE, loc="top")


def _draw_frames(axes: Axes, density: NDArray[np.float64], scenes: Scenes | None) -> None:
    style.bare(axes, "Computed pairs of tokens of two frames, in percent")
    axes.imshow(density, cmap=SHARE, vmin=0, vmax=1, interpolation="nearest")
    frames = len(density)
    style.grid_lines(axes, np.arange(frames + 1), np.arange(frames + 1), 0.7)
    if frames <= MOST_FRAMES_WITH_NUMBERS:
        for (i, j), share in np.ndenumerate(density):
            axes.text(
                j, i, f"{100 * share:.0f}", size=8, ha="center", va="center",
                color=style.PAPER if share > 0.55 else style.INK,
            )  # fmt: skip
    if scenes is not None:
        for starts in scenes.membership(frames).int().argmax(0).tolist()[1:]:
            axes.axhline(starts - 0.5, color=style.QUERY, linewidth=1.6)
            axes.axvline(starts - 0.5, color=style.QUERY, linewidth=1.6)
    axes.set_xlabel("frame of the keys", size=9.5, color=style.INK_PALE, loc="left")
    axes.set_ylabel("frame of the queries", size=9.5, color=style.INK_PALE, loc="top")


def _draw_distances(axes: Axes, density: NDArray[np.float64], rule: RadialRule) -> None:
    style.bare(axes, "By distance of the frames")
    axes.bar(np.arange(len(density)), density, width=0.82, color=style.SEEN)
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.6, len(density) - 0.4)
    ticks = np.unique(np.concatenate([[0], 2 ** np.arange(12)]))
    axes.set_xticks(ticks[ticks < len(density)])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25", "50", "75", "100 %"])
    axes.tick_params(length=0, labelsize=8.5, labelcolor=style.INK_PALE)
    axes.grid(axis="y", color=style.EMPTY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        f"frames apart; decay factor {rule.decay_factor:g}",
        size=9.5, color=style.INK_PALE, loc="left",
    )  # fmt: skip


def _text_length(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
