"""How far a video is from the one that the model's own attention gave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..stitch.sources import open_sources, quality, screens

if TYPE_CHECKING:
    from .kinds import Kind
    from .session import Wanted

REFERENCE = "sdpa"


def quality_of(path: Path, wanted: Wanted, kind: Kind) -> dict[str, Any] | None:
    """PSNR (None: equal) and mean absolute difference (of 255) against the ``sdpa`` video beside
    ``path``, if there is one of the same options; both as they come out of their files.
    """
    other = reference_of(path)
    if kind.text == REFERENCE or not same_options(
        other, wanted.options(kind), but="attention_type"
    ):
        return None
    sources, _ = open_sources([other, path])
    first, frames = sources[0], sources[0].frames
    psnr = quality(sources, first.fps, frames, lambda image: image)[1]
    gap = 0.0
    with screens(sources, first.fps) as streams:
        for _ in range(frames):
            a, b = (next(stream).astype(np.int16) for stream in streams)
            gap += float(np.abs(a - b).mean()) / frames
    return {
        "reference": other.name,
        "psnr_db": None if math.isinf(psnr) else round(psnr, 3),
        "mean_absolute_difference": round(gap, 4),
    }


def reference_of(path: Path) -> Path:
    """The name of the ``sdpa`` video of the same model: ``cogvideox-2b_sdpa.mp4``."""
    return path.with_name(f"{path.stem.partition('_')[0]}_{REFERENCE}{path.suffix}")


def same_options(path: Path, options: dict[str, Any], but: str = "") -> bool:
    """Whether the video ``path`` is there with a record of these options, ``but`` one of them."""
    found = recorded_options(path)
    return found is not None and all(
        name in found and found[name] == value for name, value in options.items() if name != but
    )


def recorded_options(path: Path) -> dict[str, Any] | None:
    """The options of the record beside a video; None where one of the two is not there, or is
    another program's.
    """
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    options = record.get("options") if isinstance(record, dict) else None
    return options if isinstance(options, dict) and path.is_file() else None
