"""The presets and their table in docs/models.md say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from video_attn import Radial, SlidingTile, VideoSparse
from video_attn.integrations import presets

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([\d.]+), (\d) \| ([^|]+) \|$", PAGE, re.MULTILINE)
NAMES = {
    preset.__name__
    for name, preset in vars(presets).items()
    if callable(preset) and name.islower() and preset.__module__ == presets.__name__
}


def pattern_text(pattern: object) -> str:
    if isinstance(pattern, SlidingTile):
        return f"sliding tiles {pattern.windows[0]}"
    if isinstance(pattern, VideoSparse):
        return f"video sparse, {pattern.top_k_ratio:g}"
    assert isinstance(pattern, Radial)
    return f"radial, decay {1 if pattern.rule is None else pattern.rule.decay_factor:g}"


@pytest.mark.parametrize(("name", "pattern", "steps", "layers", "source"), ROWS)
def test_a_row_is_its_preset(name: str, pattern: str, steps: str, layers: str, source: str) -> None:
    preset = getattr(presets, name)(precision="sage_fp8")
    schedule = preset.get("schedule")
    assert pattern_text(preset["pattern"]) == pattern
    assert (schedule.dense_first_steps if schedule else 0) == float(steps)
    assert (schedule.dense_layers if schedule else 0) == int(layers)
    assert preset["precision"] == "sage_fp8" and source.strip()


def test_all_presets_have_a_row() -> None:
    assert {name for name, *_ in ROWS} == NAMES
    assert {"wan_720p", "hunyuan_720p", "cogvideox_480p", "ltx2", "wan_few_steps"} <= NAMES


def test_few_steps_keep_the_published_dense_ones() -> None:
    """1 of 4, 2 of 8 and 12 of 50."""
    for name, steps, dense in (("wan_few_steps", 4, 1), ("wan_few_steps", 8, 2),
                               ("ltx2_few_steps", 8, 2), ("wan_720p", 50, 12)):  # fmt: skip
        schedule = getattr(presets, name)()["schedule"]
        assert [schedule.is_dense_step(n, steps) for n in range(steps)].count(True) == dense


SHARES = {"none": 0, "first tenth": 0.1, "first fifth": 0.2, "first quarter": 0.24,
          "first of 4": 0.25, "first two": 0.25}  # fmt: skip


def test_the_readme_says_what_the_presets_are() -> None:
    """ "Which pattern for which model": every row, and every model."""
    rows = re.findall(r"^\| ([^|]+) \| `presets\.(\w+)\(\)` \| ([^|]+) \| ([^|]+) \|$", README,
                      re.MULTILINE)  # fmt: skip
    for _, name, words, steps in rows:
        preset = getattr(presets, name)()
        pattern, schedule = preset["pattern"], preset.get("schedule")
        if isinstance(pattern, SlidingTile):
            assert words == f"sliding tiles, window {pattern.windows[0]}"
        elif isinstance(pattern, VideoSparse) and name != "fast_wan":
            assert words == f"video sparse, {pattern.top_k_ratio:.0%} of the tiles".replace(
                "%", " %"
            )
        share = schedule.dense_first_steps if schedule else 0
        assert share == pytest.approx(SHARES[steps], abs=0.011), name
    named = {name for _, name, *_ in rows}
    assert named >= {
        "wan_720p", "wan_few_steps", "hunyuan_720p", "hunyuan_radial", "hunyuan_few_steps",
        "cogvideox_480p", "ltx2", "ltx2_few_steps", "mochi",
    }  # fmt: skip
