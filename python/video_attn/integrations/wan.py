"""apply_sliding_tile: :func:`video_attn.integrations.apply` for sliding tile attention."""

from __future__ import annotations

from typing import Any

from ..functional.patterns import SlidingTile
from ..functional.sta import STA_TILE
from ..layout import Triple
from ..patterns.sliding_tile import Windows
from .applied import AppliedAttention
from .pipeline import apply
from .schedule import Schedule


def apply_sliding_tile(
    pipe: Any,
    window: Windows,
    *,
    tile: Triple = STA_TILE,
    schedule: Schedule | None = None,
    backend: str | None = None,
) -> AppliedAttention:
    """``apply(pipe, SlidingTile(window, tile), schedule=schedule, backend=backend)``."""
    return apply(pipe, SlidingTile(window, tile), schedule=schedule, backend=backend)
