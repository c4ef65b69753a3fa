"""``video-attn capture-info``: what a folder of captures holds, and whether all can be read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .files import CaptureError, find_captures, load_capture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn capture-info``."""
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("captured_inputs"),
        help="folder with captures (default ./captured_inputs)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same facts as one JSON list")


def run(args: argparse.Namespace) -> int:
    """Prints the captures; 1 if one of them cannot be read."""
    rows = [_row(path) for path in find_captures(args.folder)]
    broken = [row for row in rows if "error" in row]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
        for row in broken:
            print(row["error"])
    return 1 if broken else 0


def _row(path: Path) -> dict[str, Any]:
    try:
        capture = load_capture(path)
    except CaptureError as error:
        return {"file": path.name, "error": str(error)}
    shapes = {f"{name}_shape": list(getattr(capture, name).shape) for name in "qkv"}
    return {
        "file": path.name, **capture.facts.model_dump(), **shapes, "dtype": str(capture.q.dtype),
        "bytes": capture.nbytes,
    }  # fmt: skip


def _print_table(rows: list[dict[str, Any]]) -> None:
    from ..bench import print_table

    columns = (
        "file",
        "layer",
        "step",
        "timestep",
        "q",
        "k",
        "dtype",
        "layout",
        "grid",
        "text",
        "MB",
    )
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["file"], *["–"] * (len(columns) - 1)])
            continue
        text = "–" if row["text_length"] is None else f"{row['text_length']}" + (
            " first" if row["text_first"] else " last"
        )  # fmt: skip
        cells = (
            row["layer"], row["step"], row["timestep"], _by(row["q_shape"]), _by(row["k_shape"]),
            row["dtype"].removeprefix("torch."), row["layout"], _by(row["grid"]), text,
        )  # fmt: skip
        lines.append([row["file"], *map(_text, cells), f"{row['bytes'] / 1e6:.4g}"])
    total = sum(row.get("bytes", 0) for row in rows) / 1e6
    print_table(f"{len(rows)} captures, {total:,.4g} MB", columns, lines)


def _by(numbers: Any) -> str:
    return "–" if numbers is None else "×".join(map(str, numbers))


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
