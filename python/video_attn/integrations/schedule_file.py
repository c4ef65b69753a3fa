"""Schedules as JSON files: what ``Schedule.load`` reads, for searches of any kind to write.

A file says for steps and layers which heads attend how::

    {"format": "video_attn schedule 1", "num_steps": 50, "dense_first_steps": 0.1,
     "steps": [{"first": 0, "layers": {"7": [
         {"heads": [0, 1, 2], "pattern": {"kind": "sliding_tile", "window": [3, 3, 3]}},
         {"heads": [3], "pattern": {"kind": "dense"}, "precision": "sage_fp8"}]}}]}

An entry of ``steps`` holds from its first step to the next entry's. What else a program wants to
keep (errors, times, where it all comes from) stands under ``about`` and is passed over here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from ..functional.head_groups import HeadGroup, HeadGroups, LayerPattern
from ..functional.patterns import Dense, Pattern, Radial, SlidingTile, VideoSparse
from ..functional.token_pattern import TokenPattern
from ..patterns.radial import RadialRule

FORMAT = "video_attn schedule 1"
Size = tuple[PositiveInt, PositiveInt, PositiveInt]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenseEntry(_Strict):
    """:class:`~video_attn.Dense`."""

    kind: Literal["dense"] = "dense"

    def pattern(self) -> Pattern:
        return Dense()


class SlidingTileEntry(_Strict):
    """:class:`~video_attn.SlidingTile`: one window, or one per head of its group."""

    kind: Literal["sliding_tile"] = "sliding_tile"
    window: Size | list[Size]
    tile: Size = (6, 8, 8)

    def pattern(self) -> Pattern:
        return SlidingTile(self.window, self.tile)


class VideoSparseEntry(_Strict):
    """:class:`~video_attn.VideoSparse`."""

    kind: Literal["video_sparse"] = "video_sparse"
    top_k_ratio: float | None = None
    top_k: PositiveInt | None = None
    tile: Size = (4, 4, 4)
    gate: float | Literal["auto"] | None = "auto"
    score_dtype: Literal["bfloat16", "float16"] | None = None

    def pattern(self) -> Pattern:
        return VideoSparse(
            top_k_ratio=self.top_k_ratio, top_k=self.top_k, tile=self.tile, gate=self.gate,
            score_dtype=None if self.score_dtype is None else getattr(torch, self.score_dtype),
        )  # fmt: skip


class RuleEntry(_Strict):
    """:class:`~video_attn.RadialRule`."""

    decay_factor: float = 1.0
    neighbor_fraction: float = 1.0
    min_window: NonNegativeInt | None = None
    split_width: NonNegativeInt = 128
    sink_frames: NonNegativeInt = 0
    pooling: str = "majority"


class RadialEntry(_Strict):
    """:class:`~video_attn.Radial` without scenes: those belong to one video."""

    kind: Literal["radial"] = "radial"
    rule: RuleEntry | list[RuleEntry | Literal["dense"]] | None = None
    block_size: PositiveInt = 128

    def pattern(self) -> Pattern:
        def rule_of(entry: RuleEntry | Literal["dense"]) -> RadialRule | Literal["dense"]:
            return "dense" if entry == "dense" else RadialRule(**entry.model_dump())

        if isinstance(self.rule, list):
            return Radial([rule_of(entry) for entry in self.rule], self.block_size)
        rule = None if self.rule is None else RadialRule(**self.rule.model_dump())
        return Radial(rule, self.block_size)


Entry = Annotated[
    DenseEntry | SlidingTileEntry | VideoSparseEntry | RadialEntry, Field(discriminator="kind")
]


class GroupEntry(_Strict):
    """:class:`~video_attn.HeadGroup`; without heads: all of the layer."""

    heads: list[NonNegativeInt] | None = None
    pattern: Entry
    precision: str | None = None


class StepsEntry(_Strict):
    """The layers of the steps from ``first`` on."""

    first: NonNegativeInt
    layers: dict[NonNegativeInt, list[GroupEntry]]


class ScheduleFile(_Strict):
    """The whole file."""

    format: Literal["video_attn schedule 1"]
    num_steps: PositiveInt | None = None
    dense_layers: NonNegativeInt = 0
    dense_first_steps: NonNegativeInt | float = 0
    dense_last_steps: NonNegativeInt | float = 0
    steps: list[StepsEntry] = Field(default_factory=list)
    about: dict[str, Any] = Field(default_factory=dict)


def read_schedule_file(path: Path | str) -> ScheduleFile:
    """The checked content of a file.

    Raises:
        OSError: it cannot be read. ValueError: it is no schedule; the message says where.
    """
    try:
        return ScheduleFile.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is no schedule: {place}: {first['msg']}") from error


def write_schedule_file(content: ScheduleFile, path: Path | str) -> None:
    """Writes ``content``, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(content.model_dump_json(indent=1, exclude_defaults=False), encoding="utf-8")
    part.replace(path)


def layer_pattern(groups: list[GroupEntry]) -> LayerPattern:
    """What a layer of the file does."""
    if len(groups) == 1 and groups[0].heads is None and groups[0].precision is None:
        return groups[0].pattern.pattern()
    if any(group.heads is None for group in groups):
        if len(groups) > 1:
            raise ValueError("a group without heads holds all of the layer, so it must be alone")
        raise ValueError("a group with a precision must name its heads")
    return HeadGroups(
        [HeadGroup(group.heads or (), group.pattern.pattern(), group.precision) for group in groups]
    )


def entry_of(pattern: TokenPattern) -> Entry:
    """A pattern as an entry of a file.

    Raises:
        ValueError: scenes, which belong to one video, and patterns that a file has no name for.
    """
    if type(pattern) not in (Dense, SlidingTile, VideoSparse, Radial):
        raise ValueError(
            f"{type(pattern).__name__} cannot stand in a schedule file: it holds Dense, "
            "SlidingTile, VideoSparse and Radial"
        )
    if isinstance(pattern, Dense):
        return DenseEntry()
    if isinstance(pattern, SlidingTile):
        windows = list(pattern.windows)
        return SlidingTileEntry(
            window=windows if len(windows) > 1 else windows[0], tile=pattern.tile
        )
    if isinstance(pattern, VideoSparse):
        return VideoSparseEntry(
            top_k_ratio=pattern.top_k_ratio, top_k=pattern.top_k, tile=pattern.tile,
            gate=pattern.gate,
            score_dtype=str(pattern.score_dtype).removeprefix("torch.")
            if pattern.score_dtype else None,  # type: ignore[arg-type]
        )  # fmt: skip
    pattern = cast(Radial, pattern)  # of the four types above, the one that is left
    if pattern.scenes is not None:
        raise ValueError("scenes belong to one video: they cannot stand in a schedule file")
    rule: Any = pattern.rule
    if isinstance(rule, tuple):
        rule = [one if one == "dense" else _rule_entry(one) for one in rule]
    return RadialEntry(
        rule=rule if rule is None or isinstance(rule, list) else _rule_entry(rule),
        block_size=pattern.block_size,
    )


def _rule_entry(rule: RadialRule) -> RuleEntry:
    return RuleEntry(**dict(zip(RuleEntry.model_fields, rule.key, strict=True)))
