"""``video-attn compare``: the same video with every attention type, then side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import UsageError
from ..options import names
from .command import (
    DEFAULT_MODEL,
    add_render_arguments,
    capture_options,
    load,
    wanted_of,
)

GRID = "comparison_grid.mp4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn compare``."""
    from .kinds import NAMED

    parser.epilog = "What stands after -- goes to the renderer; its options may also stand before."
    add = parser.add_argument
    add("--output-dir", "--output_dir", type=Path, default=Path("rendered_videos"), metavar="DIR",
        help="folder for the videos (default ./rendered_videos)")  # fmt: skip
    add("--model-path", "--model_path", dest="model_path", default=DEFAULT_MODEL, metavar="PATH",
        help=f"a pipeline on the Hub, or its folder (default {DEFAULT_MODEL})")  # fmt: skip
    add("--stitch", action="store_true", help=f"then put them side by side in DIR/{GRID}")
    add("--types", type=names, default=list(NAMED), metavar="TYPES",
        help=f"attention types with commas between them (default {','.join(NAMED)})")  # fmt: skip
    add("--force", action="store_true", help="render again what is there already")
    add("rest", nargs="*", metavar="-- OPTIONS", help=argparse.SUPPRESS)
    add_render_arguments(parser)


@dataclass
class _Result:
    """What became of one type; ``error``: "" where all is well."""

    text: str
    path: Path
    record: dict[str, Any] | None = None
    error: str = ""
    was_there: bool = False


def run(args: argparse.Namespace) -> int:
    """Renders all types; 1 if one of them failed, or the stitching."""
    from .kinds import parse_kind

    args = _with_rest(args)
    kinds = [parse_kind(text) for text in dict.fromkeys(args.types)]
    capture, wanted = capture_options(args), wanted_of(args)
    pipe, label = None, _known_label(args, [kind.label for kind in kinds], wanted)
    results = []
    for kind in kinds:
        if label is not None:
            path = args.output_dir / f"{label}_{kind.label}.mp4"
            if record := _finished(path, kind, wanted, args, capture):
                print(f"{kind.text}: {path} is there already (--force renders it again)")
                results.append(_Result(kind.text, path, record, was_there=True))
                continue
        if pipe is None:
            pipe = load(args)
            label = _label(args.model_path, pipe)
        print(f"{kind.text}:")
        path = args.output_dir / f"{label}_{kind.label}.mp4"
        results.append(_render(pipe, kind, wanted, path, capture))
    _print_summary(results)
    failed = any(result.error for result in results)
    if args.stitch:
        failed = not _stitch([r.path for r in results if not r.error], args.output_dir) or failed
    return 1 if failed else 0


def _with_rest(args: argparse.Namespace) -> argparse.Namespace:
    """The options with those after ``--`` read as the renderer's."""
    if not args.rest:
        return args
    parser = argparse.ArgumentParser(prog=f"{args.parser.prog} --", allow_abbrev=False)
    add_render_arguments(parser)
    given = vars(args).copy()
    rest = given.pop("rest")
    if not rest[0].startswith("-"):
        raise UsageError(f"{rest[0]!r} is no option; the renderer's options go after --")
    return parser.parse_args(rest, argparse.Namespace(**given, rest=[]))


def _label(model_path: str, pipe: Any) -> str:
    from .attention import video_transformers
    from .model import model_label

    return model_label(model_path, video_transformers(pipe)[0][1].name)


def _known_label(args: argparse.Namespace, labels: Sequence[str], wanted: Any) -> str | None:
    """The beginning of the videos' names, from a video of this model that is there: a run that has
    nothing to do need not load the model.
    """
    from .quality import recorded_options

    for label in labels:
        for path in sorted(args.output_dir.glob(f"*_{label}.mp4")):
            options = recorded_options(path)
            if options is not None and options.get("model_path") == wanted.model:
                return path.stem.removesuffix(f"_{label}")
    return None


def _finished(
    path: Path, kind: Any, wanted: Any, args: argparse.Namespace, capture: Any
) -> dict[str, Any] | None:
    """The record of a video that need not be rendered: it is there, of the same options.

    With --save_inputs its captures must be there too.
    """
    import json

    from .quality import same_options

    if args.force or not same_options(path, wanted.options(kind)):
        return None
    if capture is not None and not (capture.folder / f"{kind.label}_metadata.json").is_file():
        return None
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return record if isinstance(record, dict) else None


def _render(pipe: Any, kind: Any, wanted: Any, path: Path, capture: Any) -> _Result:
    """One type; whatever goes wrong is its own result, and the next type goes on."""
    from .session import render

    result = _Result(kind.text, path)
    try:
        outcome = render(
            pipe, kind, wanted, path, say=lambda text: print(f"  {text}"), capture=capture
        )
    except (RuntimeError, ValueError, OSError) as error:  # also: out of memory
        result.error = str(error)
        print(f"  FAILED: {error}")
        return result
    result.record = outcome.record
    if outcome.capture_failure:
        result.error = f"captures ended early: {outcome.capture_failure}"
    return result


def _print_summary(results: Sequence[_Result]) -> None:
    from ..bench import print_table

    rows = []
    for result in results:
        record = result.record or {}
        seconds = record.get("seconds_per_step") or []
        steady = f"{np.mean(seconds[1:] or seconds):.3g}" if seconds else "–"
        quality = record.get("quality")
        psnr = "–" if not quality else _decibels(quality["psnr_db"])
        backends = ", ".join(dict.fromkeys((record.get("backends") or {}).values())) or "–"
        state = "failed" if result.error else "was there" if result.was_there else "done"
        rows.append([result.text, state, backends, steady, psnr, result.path.name])
    columns = ("attention type", "state", "backend", "s per step", "PSNR to sdpa", "video")
    print_table(f"{len(results)} attention types", columns, rows)
    for result in results:
        if result.error:
            print(f"FAILED: {result.text}: {result.error}")


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def _stitch(paths: Sequence[Path], folder: Path) -> bool:
    """Whether the videos are side by side."""
    from ..stitch.command import stitch
    from ..stitch.sources import open_sources

    if len(paths) < 2:
        print(f"FAILED: nothing to stitch: {len(paths)} of two or more videos are there")
        return False
    stitch(open_sources(paths)[0], folder / GRID)
    return True
