"""Calibration: what a search has found, and the schedule that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...functional.head_groups import LayerPattern
from ...functional.patterns import SlidingTile
from ...functional.video_tokens import VideoTokens
from ...integrations.schedule import Schedule
from ...integrations.schedule_file import (
    GroupEntry,
    ScheduleFile,
    StepsEntry,
    entry_of,
    layer_pattern,
    write_schedule_file,
)
from ...integrations.windows_file import write_windows
from .. import UsageError
from ..bench.record import machine_info, versions
from .candidates import OWN, Candidate
from .choose import Choice, Chooser, Prices
from .costs import CostModel

Place = tuple[int, int]  # (step, layer)


@dataclass(frozen=True)
class Calibration:
    """What a search has found.

    Args:
        candidates: what could be chosen. tokens: of the video. batch: items of a call.
        errors: [heads, candidates] of each (step, layer), over its captures.
        costs: what times come from. budget, per: as asked for.
        num_steps: of the runs that captures of several steps come from.
        files: the captures of each (step, layer). hashes: {capture: SHA-256}.
        latents: {step: relative L2 difference of the latents after it}, where that was measured.
    """

    candidates: Sequence[Candidate]
    tokens: VideoTokens
    batch: int
    errors: Mapping[Place, NDArray[np.float64]]
    costs: CostModel
    budget: float
    per: str
    num_steps: int | None = None
    files: Mapping[Place, Sequence[Path]] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    latents: dict[int, float] = field(default_factory=dict)

    @cached_property
    def choices(self) -> dict[Place, Choice]:
        """The choice of each (step, layer)."""
        return self.at(self.budget)

    def at(self, budget: float) -> dict[Place, Choice]:
        """The choices for another budget, of what was measured already."""
        places = sorted(self.errors)
        return dict(zip(places, self._chooser.choose(budget), strict=True))

    @cached_property
    def _chooser(self) -> Chooser:
        heads = len(next(iter(self.errors.values())))
        prices = Prices(
            [self.batch * self.costs.head_seconds(c, self.tokens) for c in self.candidates],
            [self.costs.launch(c) for c in self.candidates],
            own=self.candidates.index(OWN),
            parting=self.batch * self.costs.parting(self.tokens, heads),
        )
        return Chooser([self.errors[place] for place in sorted(self.errors)], prices, self.per)

    @property
    def seconds(self) -> float:
        """Predicted for one call of every captured layer in every captured step."""
        return sum(choice.seconds for choice in self.choices.values())

    @property
    def dense_seconds(self) -> float:
        """The same with dense attention in the model's own precision."""
        return sum(
            self.costs.seconds(OWN, self.tokens, self.batch * len(errors))
            for errors in self.errors.values()
        )

    @property
    def steps(self) -> list[int]:
        """The captured steps."""
        return sorted({step for step, _ in self.errors})

    def candidate_of(self, step: int, layer: int, head: int) -> Candidate:
        """What a head was given."""
        return self.candidates[self.choices[step, layer].candidates[head]]

    def pattern_of(self, step: int, layer: int) -> LayerPattern:
        """What a layer was given: what ``apply`` will run there."""
        return self.pattern_for(self.choices[step, layer])

    def pattern_for(self, choice: Choice) -> LayerPattern:
        """What a layer does by a choice."""
        return layer_pattern(self._groups(choice))

    def schedule(self) -> Schedule:
        """The schedule, as ``apply`` takes it."""
        return Schedule.of_file(self.schedule_file())

    def schedule_file(self) -> ScheduleFile:
        """The schedule, for ``Schedule.load``: a step's choices hold until the next one's.

        Raises:
            UsageError: several steps, and no number of steps.
        """
        several = len(self.steps) > 1
        if several and self.num_steps is None:
            raise UsageError(
                f"the captures are of steps {', '.join(map(str, self.steps))}: say of how many, "
                "with --num-steps"
            )
        if several and self.steps[-1] >= (self.num_steps or 0):
            raise UsageError(
                f"the captures are of steps to {self.steps[-1]}, but --num-steps is "
                f"{self.num_steps}"
            )
        entries = [
            StepsEntry(
                first=step if number else 0,
                layers={
                    layer: self._groups(choice)
                    for (of_step, layer), choice in sorted(self.choices.items())
                    if of_step == step
                },
            )
            for number, step in enumerate(self.steps)
        ]
        return ScheduleFile(
            format="video_attn schedule 1",
            num_steps=self.num_steps if several else None,
            steps=entries,
            about=self.about(),
        )

    def save(self, path: Path) -> None:
        """Writes the schedule file, whole or not at all."""
        write_schedule_file(self.schedule_file(), path)

    def save_windows(self, path: Path) -> None:
        """Writes the windows in the form of the public search, STEP_LAYER_HEAD; see
        :mod:`video_attn.integrations.windows_file`.

        Raises:
            ValueError: a head has a pattern that is no window of a tile.
        """
        layers = 1 + max(layer for _, layer in self.errors)
        heads = len(next(iter(self.errors.values())))
        tile = next(
            (c.pattern.tile for c in self.candidates if isinstance(c.pattern, SlidingTile)),
            (6, 8, 8),
        )
        write_windows(
            self.schedule(), path, tokens=self.tokens, layers=layers, heads=heads,
            num_steps=self.num_steps or 1, tile=tile,
        )  # fmt: skip

    def _groups(self, choice: Choice) -> list[GroupEntry]:
        groups = []
        for number, heads in choice.groups.items():
            candidate = self.candidates[number]
            alone = len(heads) == len(choice.candidates) and candidate.precision == "native"
            groups.append(
                GroupEntry(
                    heads=None if alone else heads,
                    pattern=entry_of(candidate.pattern),
                    precision=None if alone else candidate.precision,
                )
            )
        return groups

    def about(self) -> dict[str, Any]:
        """Where the schedule comes from: budget, errors, times, machine, versions, captures."""
        return {
            "budget": self.budget,
            "per": self.per,
            "objective": "density" if self.costs.is_count else "time",
            "predicted_seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "grid": list(self.tokens.grid),
            "text_length": self.tokens.text_length,
            "batch": self.batch,
            "layers": [
                {
                    "step": step, "layer": layer, "seconds": choice.seconds,
                    "candidates": [self.candidates[n].name for n in choice.candidates],
                    "errors": [round(error, 5) for error in choice.errors],
                }
                for (step, layer), choice in sorted(self.choices.items())
            ],
            "latents": {str(step): round(gap, 5) for step, gap in self.latents.items()},
            "costs_of": self.costs.machine,
            "machine": machine_info(),
            "versions": versions(),
            "captures": dict(self.hashes),
        }  # fmt: skip
