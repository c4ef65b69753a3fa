"""Windows of sliding tiles as JSON files, in the form of the public search for them.

``{"STEP_LAYER_HEAD": [t, h, w], ...}``: for every step, layer and head its window in tiles; a dense
head has the window of all tiles. ``Schedule.from_windows`` reads such a file.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..functional.head_groups import HeadGroups, LayerPattern
from ..functional.patterns import Dense, SlidingTile
from ..functional.video_tokens import VideoTokens
from ..layout import Triple
from .schedule import Schedule


def windows_of(
    schedule: Schedule,
    *,
    tokens: VideoTokens,
    layers: int,
    heads: int,
    num_steps: int,
    pattern: LayerPattern | None = None,
    tile: Triple = (6, 8, 8),
) -> dict[str, list[int]]:
    """The windows of every step, layer and head.

    Args:
        tokens: of the video. layers, heads: of the model. num_steps: of a run.
        pattern: where the schedule says nothing; None: ``Dense()``.
        tile: tokens of a tile.

    Raises:
        ValueError: a head that is neither dense nor has a window of such tiles; the message says
            which.
    """
    grid = tokens.layout(tile).tile_grid
    found = {}
    for step in range(num_steps):
        of_layers = schedule.patterns(pattern or Dense(), layers, heads, step, num_steps)
        for layer, of_layer in enumerate(of_layers):
            for head, window in enumerate(_windows(of_layer, heads, tile, grid)):
                key = f"{step}_{layer}_{head}"
                if window is None:
                    raise ValueError(
                        f"{key} (step, layer, head) has no window of {tile} tiles: a file of "
                        "windows holds sliding tiles and dense heads in the model's precision alone"
                    )
                found[key] = [min(n, m) for n, m in zip(window, grid, strict=True)]
    return found


def write_windows(schedule: Schedule, path: Path | str, **options: object) -> None:
    """Writes :func:`windows_of` to ``path``, whole or not at all; options as there."""
    path = Path(path)
    text = json.dumps(windows_of(schedule, **options))  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _windows(pattern: LayerPattern, heads: int, tile: Triple, whole: Triple) -> list[Triple | None]:
    """The window of each head; None where it has none."""
    if isinstance(pattern, HeadGroups):
        found: list[Triple | None] = [None] * heads
        for group in pattern.groups:
            if group.precision in (None, "native"):
                windows = _windows(group.pattern, len(group.heads), tile, whole)
                for head, window in zip(group.heads, windows, strict=True):
                    found[head] = window
        return found
    if isinstance(pattern, Dense):
        return [whole] * heads
    if isinstance(pattern, SlidingTile) and pattern.tile == tile:
        several = len(pattern.windows) > 1
        return [pattern.windows[head if several else 0] for head in range(heads)]
    return [None] * heads
