"""``video-attn quality A.mp4 B.mp4``: PSNR, SSIM and LPIPS, as a table, a picture and JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import UsageError
from ..devices import chosen_device
from ..options import file_ending_in
from .measures import Quality, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn quality``."""
    add = parser.add_argument
    add("videos", type=Path, nargs="+", metavar="VIDEO",
        help="the first one is the reference of the others, unless there is --ref")  # fmt: skip
    add("--ref", type=Path, metavar="VIDEO", help="what all videos are compared with")
    add("--plot", type=file_ending_in((".png",)), metavar="PNG", help="a picture, frame by frame")
    add("--json", type=file_ending_in((".json",)), metavar="FILE", help="all values of all frames")
    add("--device", help="cpu, cuda or cuda:1; default a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Compares and prints; 0."""
    reference, *others = args.videos if args.ref is None else [args.ref, *args.videos]
    if not others:
        raise UsageError("there must be two videos, or one and --ref")
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("frames", total=None)
        found, reason = measure(
            reference, others, device=chosen_device(args.device), progress=lambda: bar.advance(task)
        )
    _print(reference, found)
    if reason is not None:
        print(f"no LPIPS: {reason}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_as_json(reference, found), indent=1) + "\n", "utf-8")
    if args.plot is not None:
        draw(reference, found, args.plot)
    return 0


def _print(reference: Path, found: Sequence[Quality]) -> None:
    from ..bench import print_table

    rows = []
    for one in found:
        worst = int(np.argmin(one.psnr))
        lpips = f"{np.mean(one.lpips):.4f}" if one.lpips else "–"
        rows.append(
            [one.source.path.name, _decibels(one.psnr_of_all), _decibels(one.psnr[worst]), worst,
             f"{np.mean(one.ssim):.4f}", f"{np.min(one.ssim):.4f}", lpips]
        )  # fmt: skip
    columns = ("video", "PSNR", "of the worst frame", "number", "SSIM", "at least", "LPIPS")
    print_table(f"{found[0].source.frames} frames against {reference.name}", columns, rows)


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.2f} dB"


def _as_json(reference: Path, found: Sequence[Quality]) -> dict[str, object]:
    """All values; the PSNR of equal frames, which is infinite, is null."""

    def finite(value: float) -> float | None:
        return None if math.isinf(value) else value

    return {
        "reference": str(reference),
        "videos": [
            {
                "video": str(one.source.path), "psnr_db_of_all": finite(one.psnr_of_all),
                "psnr_db": [finite(x) for x in one.psnr], "ssim": one.ssim,
                "lpips": one.lpips or None,
            }
            for one in found
        ],
    }  # fmt: skip


def draw(reference: Path, found: Sequence[Quality], path: Path) -> None:
    """Writes a picture (.png) of each measure over the frames."""
    from matplotlib.ticker import MaxNLocator

    from ..plot.style import INK, headline, new_figure, pixels, save

    names = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
    shown = [name for name in names if getattr(found[0], name)]
    figure = new_figure(9.0, 1.4 + 2.0 * len(shown))
    headline(figure, f"Frame by frame against {reference.name}", "equal frames have no PSNR")
    rows = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True))
    figure.subplots_adjust(0.09, 0.12, 0.97, 1 - 0.95 / figure.get_figheight(), hspace=0.15)
    for axis, name in zip(rows, shown, strict=True):
        for one in found:
            values = np.array(getattr(one, name))
            axis.plot(np.where(np.isfinite(values), values, np.nan), label=one.source.path.name,
                      marker="o" if len(values) < 40 else None, ms=3)  # fmt: skip
        axis.set_ylabel(names[name], color=INK)
        axis.grid(alpha=0.3)
    rows[-1].set_xlabel("frame")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    rows[0].legend(fontsize=8, frameon=False)
    save([pixels(figure)], path, fps=1)
