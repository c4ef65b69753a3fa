"""``video-attn demo``: dense and sparse attention on the tokens of a real video clip."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...layout import Triple
from .. import UsageError
from ..options import positive_float, positive_int, share, sizes
from ..video import Clip, pan_and_zoom, photograph, read_clip
from . import report
from .measure import Outcome, compare
from .patterns import Settings
from .tokens import PATCH, Tokens, clip_of, tokens_of


class _Scale(NamedTuple):
    """Default sizes for a kind of device."""

    frames: int
    size: tuple[int, int]
    tile: Triple
    dtype: str


SCALES = {
    "cpu": _Scale(16, (192, 256), (4, 4, 4), "float32"),  # 12,288 tokens
    "cuda": _Scale(24, (384, 512), (4, 8, 8), "bfloat16"),  # 73,728 tokens
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn demo``."""
    clip = parser.add_argument_group("the clip")
    source = clip.add_mutually_exclusive_group()
    source.add_argument("--video", type=Path, metavar="FILE", help="take the clip from this video")
    source.add_argument(
        "--image", type=Path, metavar="FILE",
        help="make the clip from this photograph, by panning and zooming (default: a portrait "
        "that comes with matplotlib)",
    )  # fmt: skip
    clip.add_argument(
        "--seconds", type=positive_float, default=2.0, help="length of the clip (default 2)"
    )
    clip.add_argument(
        "--frames", type=positive_int, metavar="N", help=f"its frames ({_defaults('frames')})"
    )
    clip.add_argument(
        "--size", type=sizes("HxW"), metavar="HxW",
        help=f"pixels of a frame, multiples of {PATCH} ({_defaults('size')})",
    )  # fmt: skip
    patterns = parser.add_argument_group("the patterns")
    patterns.add_argument(
        "--tile", type=sizes("TxHxW"), metavar="TxHxW",
        help=f"tokens of a tile ({_defaults('tile')})",
    )  # fmt: skip
    patterns.add_argument(
        "--window", type=sizes("TxHxW"), metavar="TxHxW", default=(3, 3, 3),
        help="tiles that STA sees per axis (default 3x3x3)",
    )  # fmt: skip
    patterns.add_argument(
        "--top-k-ratio", type=share, metavar="R", default=0.125,
        help="share of the tiles that VSA keeps (default 0.125)",
    )  # fmt: skip
    how = parser.add_argument_group("how and where")
    how.add_argument("--device", choices=sorted(SCALES), help="default: a GPU if there is one")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=_defaults("dtype"))
    how.add_argument(
        "--repeats", type=positive_int, metavar="N", default=3, help="timed runs (default 3)"
    )
    how.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("demo_output"),
        help="folder for the files it writes (default demo_output)",
    )  # fmt: skip
    how.add_argument(
        "--videos", action="store_true",
        help="write each pattern's video too, as demo-clip_NAME.mp4, for `video-attn stitch`",
    )  # fmt: skip


def _defaults(field: str) -> str:
    values = [(device, getattr(scale, field)) for device, scale in SCALES.items()]
    texts = [f"{_text(value)} on {device}" for device, value in values]
    return f"default {', '.join(texts)}"


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run(args: argparse.Namespace) -> int:
    """Makes the clip, runs every pattern on it, prints the table and writes the files."""
    from rich.console import Console

    console = Console()
    device = _device(args.device)
    scale = SCALES[device.type]
    frames, size = args.frames or scale.frames, args.size or scale.size
    if any(side % PATCH for side in size):
        raise UsageError(
            f"--size {_text(size)} must be multiples of {PATCH}, the side of a token in pixels"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    clip = _clip(args, frames, size)
    tokens = tokens_of(clip, device, getattr(torch, args.dtype or scale.dtype))
    settings = Settings(args.tile or scale.tile, args.window, args.top_k_ratio)
    console.print(report.opening(clip, tokens, settings, _source(args)))
    with report.progress_bar(console) as advance:
        outcome = compare(tokens, settings, args.repeats, advance)
    console.print(report.table(outcome))
    for line in report.explanations(outcome):
        console.print(line, style="dim", highlight=False)
    fps = frames / args.seconds
    _write(args.out, clip, tokens, outcome, fps=fps, console=console)
    if args.videos:
        for measured in outcome.patterns:
            path = args.out / f"demo-clip_{measured.name}.mp4"
            report.write_clip(path, clip_of(measured.out, tokens), fps)
            console.print(f"[bold]{path}[/bold]  {measured.title}", highlight=False, soft_wrap=True)
    return 0


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; `video-attn info` says more")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _clip(args: argparse.Namespace, frames: int, size: tuple[int, int]) -> Clip:
    if args.video is not None:
        return read_clip(args.video, frames, size, args.seconds)
    return pan_and_zoom(photograph(args.image), frames, size)


def _source(args: argparse.Namespace) -> str:
    if args.video is not None:
        return f"from {args.video}"
    return f"panned over {args.image or 'a portrait of Grace Hopper'}"


def _write(
    folder: Path, clip: Clip, tokens: Tokens, outcome: Outcome, fps: float, console: Any
) -> None:
    """Writes the files, and says what each one shows."""
    files: dict[str, tuple[str, Callable[[Path], None]]] = {
        "attention_maps.png": (
            "what dense attention looks at, and what each pattern keeps of it",
            lambda path: _save_maps(path, tokens, outcome),
        ),
        "comparison.mp4": (
            "the clip, and what comes out of attention: dense and sparse",
            lambda path: report.write_comparison(path, clip, tokens, outcome, fps),
        ),
        "clip.mp4": ("the clip", lambda path: report.write_clip(path, clip, fps)),
        "results.json": (
            "the table, with machine and versions",
            lambda path: report.write_results(path, tokens, outcome),
        ),
    }
    for name, (what, write) in files.items():
        write(folder / name)
        console.print(f"[bold]{folder / name}[/bold]  {what}", highlight=False, soft_wrap=True)


def _save_maps(path: Path, tokens: Tokens, outcome: Outcome) -> None:
    from ..plot import style

    style.save([style.pixels(report.draw_maps(tokens, outcome).figure)], path, fps=1)
