"""Schedule: which layer attends how in which denoising step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from ..checks import check_int
from ..functional.head_groups import LayerPattern
from ..functional.patterns import Dense, Radial, SlidingTile
from ..functional.token_pattern import TokenPattern
from ..layout import Triple, as_triple
from ..patterns.radial import RadialRule
from .schedule_file import ScheduleFile, layer_pattern, read_schedule_file

Choice = LayerPattern | RadialRule | Literal["dense"]
Key = int | tuple[int, int]
Steps = int | float
_WHOLE: Triple = (2**31 - 1,) * 3  # a window of the whole video


@dataclass(frozen=True)
class Schedule:
    """Where sparse attention applies: everywhere but in the dense layers and steps.

    The first layers and the first steps decide the composition of a video and suffer most from
    sparsity; keeping the last steps dense too helps against noise at the edges. Steps are counted
    among the distinct timesteps that are run, so a video-to-video run counts from where it starts.

    Args:
        dense_layers: this many first layers stay dense.
        dense_first_steps, dense_last_steps: so many denoising steps stay dense, in all layers. An
            int counts them; a float from 0 to 1 is a share of all steps, rounded, which suits
            runs of few and of many steps alike.
        overrides: what single layers or heads do instead in sparse steps: ``{layer: choice}`` or
            ``{(layer, head): choice}``. A choice is a pattern, a RadialRule or "dense"; that of a
            head must be of the kind of its layer. A head's goes before its layer's, and a layer's
            before ``dense_layers``.
        steps: the same for single steps: ``{step: {layer: pattern}}``; goes before all else but
            dense steps. :meth:`from_windows` and :meth:`load` make it of files.
        num_steps: the number of steps that ``steps`` was made for, if any: a run of another number
            is refused.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    dense_layers: int = 0
    dense_first_steps: Steps = 0
    dense_last_steps: Steps = 0
    overrides: Mapping[Key, Choice] = field(default_factory=dict)
    steps: Mapping[int, Mapping[int, LayerPattern]] = field(default_factory=dict)
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_int("dense_layers", self.dense_layers, 0)
        for name in ("dense_first_steps", "dense_last_steps"):
            value = getattr(self, name)
            if isinstance(value, float):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name} must be an int, or a share from 0 to 1; got {value}")
            else:
                check_int(name, value, 0)
        for name in ("overrides", "steps"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a mapping, got {value!r}")
            object.__setattr__(self, name, dict(value))
        for key, choice in self.overrides.items():
            if not (
                _is_index(key)
                or (isinstance(key, tuple) and len(key) == 2 and all(map(_is_index, key)))
            ):
                raise TypeError(f"overrides: a key must be layer or (layer, head), got {key!r}")
            check_choice(f"overrides[{key!r}]", choice)
        for step, layers in self.steps.items():
            if not _is_index(step) or not isinstance(layers, Mapping):
                raise TypeError(f"steps must be {{step: {{layer: pattern}}}}, got {step!r}")
            for layer, pattern in layers.items():
                if not _is_index(layer) or not isinstance(pattern, TokenPattern):
                    raise TypeError(
                        f"steps[{step}] must be {{layer: pattern}}, got {layer!r}: {pattern!r}"
                    )
        if self.num_steps is not None:
            check_int("num_steps", self.num_steps, 0)

    @classmethod
    def from_windows(
        cls, windows: Path | str | Mapping[str, Any], *, tile: Triple = (6, 8, 8), **options: Any
    ) -> Schedule:
        """The windows of sliding tile attention that a search has found, per step, layer and head.

        Args:
            windows: a JSON file, or its content: ``{"STEP_LAYER_HEAD": [t, h, w], ...}`` in tiles,
                or ``{"LAYER_HEAD": ...}`` for all steps; null is the whole video. All heads of a
                layer must be there.
            tile: tokens of a tile. options: of the Schedule.

        Raises:
            TypeError, ValueError: the content is none of these; the message says where.
        """
        if isinstance(windows, (str, Path)):
            windows = json.loads(Path(windows).read_text(encoding="utf-8"))
        if not isinstance(windows, Mapping) or not windows:
            raise TypeError("windows must be an object of windows by 'STEP_LAYER_HEAD'")
        found: dict[tuple[int | None, int], dict[int, Triple]] = {}
        for key, window in windows.items():
            parts = str(key).split("_")
            if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
                raise ValueError(f"windows: a key must be STEP_LAYER_HEAD, got {key!r}")
            *step, layer, head = map(int, parts)
            heads = found.setdefault((step[0] if step else None, layer), {})
            heads[head] = _WHOLE if window is None else as_triple(window, f"windows[{key!r}]")
        patterns = {place: _of_heads(place, heads, tile) for place, heads in found.items()}
        if all(step is None for step, _ in patterns):
            return cls(overrides={layer: p for (_, layer), p in patterns.items()}, **options)
        if any(step is None for step, _ in patterns):
            raise ValueError("windows: some keys name a step, others do not")
        steps: dict[int, dict[int, LayerPattern]] = {}
        for (step_index, layer), pattern in patterns.items():
            steps.setdefault(step_index or 0, {})[layer] = pattern
        return cls(steps=steps, num_steps=max(steps) + 1, **options)

    @classmethod
    def load(cls, path: Path | str, *, num_steps: int | None = None) -> Schedule:
        """The schedule of a JSON file; :mod:`.schedule_file` has its form.

        Args:
            num_steps: of the runs to come, for a file that says none but tells steps apart.

        Raises:
            OSError: the file cannot be read. TypeError, ValueError: it is no schedule; the message
                says where.
        """
        return cls.of_file(read_schedule_file(path), num_steps=num_steps, name=str(path))

    @classmethod
    def of_file(
        cls, file: ScheduleFile, *, num_steps: int | None = None, name: str = "the schedule"
    ) -> Schedule:
        """The schedule of a file's content; see :meth:`load`. ``name``: of it, in errors."""
        steps_in_all = file.num_steps if num_steps is None else num_steps
        entries = sorted(file.steps, key=lambda entry: entry.first)
        patterns = [
            {layer: layer_pattern(groups) for layer, groups in entry.layers.items()}
            for entry in entries
        ]
        options: dict[str, Any] = {
            name: getattr(file, name)
            for name in ("dense_layers", "dense_first_steps", "dense_last_steps")
        }
        if len(entries) == 1 and entries[0].first == 0 and file.num_steps is None:
            return cls(overrides=cast("Mapping[Key, Choice]", patterns[0]), **options)
        if entries and steps_in_all is None:
            raise ValueError(f"{name} tells steps apart, but not how many there are: say num_steps")
        steps: dict[int, Mapping[int, Any]] = {}
        ends = [entry.first for entry in entries[1:]] + [steps_in_all or 0]
        for entry, end, of_layer in zip(entries, ends, patterns, strict=True):
            steps |= dict.fromkeys(range(entry.first, end), of_layer)
        return cls(steps=steps, num_steps=steps_in_all if steps else None, **options)

    def check(self, layers: int, heads: int) -> None:
        """Raises ValueError where the schedule names a layer or head that the model lacks."""
        if self.dense_layers > layers:
            raise ValueError(f"dense_layers must be at most {layers}, got {self.dense_layers}")
        for key in self.overrides:
            layer, head = key if isinstance(key, tuple) else (key, 0)
            if layer >= layers or head >= heads:
                raise ValueError(
                    f"overrides: {key!r} is not in a model of {layers} layers with {heads} heads"
                )
        for step, of_layer in self.steps.items():
            for layer in of_layer:
                if layer >= layers:
                    raise ValueError(
                        f"steps[{step}]: layer {layer} is not in a model of {layers} layers"
                    )

    @property
    def needs_step(self) -> bool:
        """Whether the index of the denoising step makes a difference."""
        return bool(self.dense_first_steps or self.dense_last_steps or self.steps)

    def is_dense_step(self, step: int, steps: int) -> bool:
        """Whether step ``step`` of ``steps`` (counted from 0) is dense in all layers."""
        first, last = (
            _count(value, steps) for value in (self.dense_first_steps, self.dense_last_steps)
        )
        return step < first or step >= steps - last

    def patterns(
        self, pattern: LayerPattern, layers: int, heads: int, step: int = 0, steps: int = 1
    ) -> list[LayerPattern]:
        """The pattern of each layer in one step; ``pattern``: where nothing else is said."""
        if self.needs_step and self.is_dense_step(step, steps):
            return [Dense()] * layers
        if self.num_steps is not None and steps != self.num_steps:
            raise ValueError(
                f"the schedule was made for {self.num_steps} steps, but this run has {steps}"
            )
        of_step = self.steps.get(step, {})
        return [
            of_step[layer] if layer in of_step else self._pattern(pattern, layer, heads)
            for layer in range(layers)
        ]

    def _pattern(self, pattern: LayerPattern, layer: int, heads: int) -> LayerPattern:
        """The pattern of a layer, the choices of its heads put together."""
        default: Choice = Dense() if layer < self.dense_layers else pattern
        default = self.overrides.get(layer, default)
        choices = [self.overrides.get((layer, head), default) for head in range(heads)]
        if all(choice == choices[0] for choice in choices):
            return _as_pattern(choices[0], pattern)
        return _put_together(layer, [_as_pattern(choice, pattern) for choice in choices])


def check_choice(name: str, choice: object) -> None:
    """Raises TypeError unless ``choice`` is "dense", a pattern or a RadialRule."""
    if choice != "dense" and not isinstance(choice, (TokenPattern, RadialRule)):
        raise TypeError(f"{name} must be 'dense', a pattern or a RadialRule, got {choice!r}")


def _as_pattern(choice: Choice, like: LayerPattern) -> LayerPattern:
    if isinstance(choice, RadialRule):
        base = like if isinstance(like, Radial) else Radial()
        return Radial(choice, base.block_size, base.scenes)
    return Dense() if choice == "dense" else choice


def _put_together(layer: int, patterns: list[LayerPattern]) -> LayerPattern:
    """One pattern for heads that differ: windows or rules per head."""
    sparse = [pattern for pattern in patterns if not isinstance(pattern, Dense)]
    first = sparse[0]
    if isinstance(first, SlidingTile) and all(
        isinstance(p, SlidingTile) and p.tile == first.tile for p in sparse
    ):
        return SlidingTile([_window(p, head) for head, p in enumerate(patterns)], first.tile)
    if isinstance(first, Radial) and all(
        isinstance(p, Radial) and (p.block_size, p.scenes) == (first.block_size, first.scenes)
        for p in sparse
    ):
        rules = [_rule(p, head) for head, p in enumerate(patterns)]
        return Radial(rules, first.block_size, first.scenes)
    raise ValueError(
        f"overrides: the heads of layer {layer} must have one kind of pattern, with one tile or "
        f"block size; got {', '.join(sorted({type(p).__name__ for p in patterns}))}"
    )


def _window(pattern: LayerPattern, head: int) -> Triple:
    if not isinstance(pattern, SlidingTile):
        return _WHOLE
    return pattern.windows[head] if len(pattern.windows) > 1 else pattern.windows[0]


def _rule(pattern: LayerPattern, head: int) -> RadialRule | Literal["dense"]:
    if not isinstance(pattern, Radial):
        return "dense"
    rule: Any = pattern.rule
    rule = rule[head] if isinstance(rule, tuple) else rule
    return RadialRule() if rule is None else rule


def _of_heads(place: tuple[int | None, int], heads: dict[int, Triple], tile: Triple) -> SlidingTile:
    if set(heads) != set(range(len(heads))):
        raise ValueError(f"windows: layer {place[1]} lacks some of its heads, got {sorted(heads)}")
    windows: Sequence[Triple] = [heads[head] for head in range(len(heads))]
    return SlidingTile(windows if len(set(windows)) > 1 else windows[0], tile)


def _count(value: Steps, steps: int) -> int:
    """How many of ``steps`` a count or a share (rounded, a half up) is."""
    return math.floor(value * steps + 0.5) if isinstance(value, float) else value


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
