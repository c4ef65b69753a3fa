"""calibrate(): from a folder of captures to a schedule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...functional.video_tokens import VideoTokens
from ...integrations.schedule_file import (
    GroupEntry,
    ScheduleFile,
    StepsEntry,
    entry_of,
)
from .. import UsageError
from ..bench.record import machine_info, versions
from ..capture import Capture, find_captures, load_capture
from .candidates import Candidate
from .choose import Choice, choose
from .costs import CostModel
from .errors import head_errors

OVER = ("worst", "mean")
Place = tuple[int, int]  # (step, layer)


@dataclass(frozen=True)
class Calibration:
    """What a search has found.

    Args:
        candidates: what could be chosen. tokens: of the video.
        errors: [heads, candidates] of each (step, layer), over its captures.
        choices: of each (step, layer). dense_seconds: predicted for dense attention everywhere.
        costs: what times come from. budget, per: as asked for. captures: {file: SHA-256}.
    """

    candidates: Sequence[Candidate]
    tokens: VideoTokens
    errors: dict[Place, NDArray[np.float64]]
    choices: dict[Place, Choice]
    costs: CostModel
    budget: float
    per: str
    captures: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Predicted for one call of every captured layer in every captured step."""
        return sum(choice.seconds for choice in self.choices.values())

    @property
    def dense_seconds(self) -> float:
        """The same with dense attention in the model's own precision."""
        dense = next(c for c in self.candidates if c.kind == "dense")
        return sum(
            self.costs.seconds(dense, self.tokens, len(errors)) for errors in self.errors.values()
        )

    def at(self, budget: float) -> dict[Place, Choice]:
        """The choices for another budget, of what was measured already."""
        return _choose_all(self.errors, self.candidates, self.tokens, self.costs, budget, self.per)

    def schedule_file(self, num_steps: int | None = None) -> ScheduleFile:
        """The schedule, for ``Schedule.load``: a step's choices hold until the next one's.

        Raises:
            UsageError: several steps, and no number of steps.
        """
        steps = sorted({step for step, _ in self.choices})
        if len(steps) > 1 and num_steps is None:
            raise UsageError(
                f"the captures are of steps {', '.join(map(str, steps))}: say of how many, with "
                "--num-steps"
            )
        entries = []
        for number, step in enumerate(steps):
            layers = {
                layer: self._groups(choice)
                for (of_step, layer), choice in sorted(self.choices.items()) if of_step == step
            }  # fmt: skip
            entries.append(StepsEntry(first=step if number else 0, layers=layers))
        several = len(steps) > 1
        return ScheduleFile(
            format="video_attn schedule 1", num_steps=num_steps if several else None, steps=entries,
            about=self.about(),
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
            "predicted_seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "grid": list(self.tokens.grid),
            "text_length": self.tokens.text_length,
            "layers": [
                {
                    "step": step, "layer": layer, "seconds": choice.seconds,
                    "candidates": [self.candidates[n].name for n in choice.candidates],
                    "errors": [round(error, 5) for error in choice.errors],
                }
                for (step, layer), choice in sorted(self.choices.items())
            ],
            "costs_of": self.costs.machine,
            "machine": machine_info(),
            "versions": versions(),
            "captures": self.captures,
        }  # fmt: skip


def calibrate(
    captured: Sequence[Path],
    candidates: Callable[[VideoTokens], Sequence[Candidate]],
    costs: Callable[[Sequence[Candidate], Capture], CostModel],
    *,
    budget: float = 0.1,
    per: str = "head",
    over: str = "worst",
    device: torch.device | str = "cpu",
    backend: str | None = None,
    kept: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda text, done, all_: None,
) -> Calibration:
    """Finds the cheapest candidate of every head in every captured layer and step.

    Args:
        captured: folders of captures, as ``video-attn render --save_inputs`` writes them, one for
            each prompt say. All must be of one size of video, and each must tell its grid and
            layer.
        candidates: for a video, what may be chosen; :func:`.candidates_for` with its options.
        costs: what launches take; :func:`.measure_costs`, or a model that was kept.
        budget: the largest relative L2 error. per: of each "head", or of a "layer" (root mean
            square of its heads).
        over: of several captures of one layer and step the "worst" error counts, or the "mean".
        device, backend: where candidates run, and by what.
        kept: a file that keeps the errors of each capture, so that a search that was killed goes on
            where it was.
        progress: told the capture, and how many of its heads and candidates are done of how many.

    Raises:
        CaptureError, UsageError: captures that do not tell enough, or do not fit together.
        ValueError: no candidate is within the budget.
    """
    if over not in OVER:
        raise UsageError(f"over must be one of {', '.join(OVER)}; got {over!r}")
    found: dict[Place, list[NDArray[np.float64]]] = {}
    hashes: dict[str, str] = {}
    tokens: VideoTokens | None = None
    chosen: Sequence[Candidate] = ()
    model: CostModel | None = None
    memory = _Memory(kept)
    for path in [path for folder in captured for path in find_captures(folder)]:
        capture = load_capture(path).as_bhsd()
        of_capture = _tokens(capture, path)
        if tokens is None:
            tokens, chosen = of_capture, candidates(of_capture)
            model = costs(chosen, capture)
        elif of_capture != tokens:
            raise UsageError(
                f"{path} is of {of_capture}, but the captures before it of {tokens}: calibrate one "
                "size of video at a time"
            )
        digest = hashes[str(path)] = _hash(path)
        names = [candidate.name for candidate in chosen]
        errors = memory.errors(digest, names)
        if errors is None:
            errors = _errors(capture, tokens, chosen, torch.device(device), backend, path, progress)
            memory.keep(digest, names, errors)
        place = (capture.facts.step or 0, capture.facts.layer or 0)
        found.setdefault(place, []).append(errors)
    assert tokens is not None and model is not None  # find_captures finds one or raises
    reduce = np.max if over == "worst" else np.mean
    all_errors = {place: reduce(np.stack(several), 0) for place, several in found.items()}
    choices = _choose_all(all_errors, chosen, tokens, model, budget, per)
    return Calibration(chosen, tokens, all_errors, choices, model, budget, per, hashes)


def _choose_all(
    errors: dict[Place, NDArray[np.float64]], candidates: Sequence[Candidate],
    tokens: VideoTokens, costs: CostModel, budget: float, per: str,
) -> dict[Place, Choice]:  # fmt: skip
    add = [costs.head_seconds(candidate, tokens) for candidate in candidates]
    launch = [costs.launch(candidate) for candidate in candidates]
    choices = {}
    for (step, layer), of_layer in sorted(errors.items()):
        try:
            choices[step, layer] = choose(of_layer, add, launch, budget, per)
        except ValueError as error:
            raise ValueError(f"step {step}, layer {layer}: {error}") from error
    return choices


def _errors(
    capture: Capture, tokens: VideoTokens, candidates: Sequence[Candidate], device: torch.device,
    backend: str | None, path: Path, progress: Callable[[str, int, int], None],
) -> NDArray[np.float64]:  # fmt: skip
    q, k, v = (x.to(device) for x in (capture.q, capture.k, capture.v))
    whole, done = q.shape[1] * len(candidates), 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(path.name, done, whole)

    return head_errors(
        q, k, v, tokens, candidates, scale=capture.facts.scale, backend=backend, progress=one_more
    ).numpy()


def _tokens(capture: Capture, path: Path) -> VideoTokens:
    facts = capture.facts
    if facts.grid is None or facts.layer is None:
        raise UsageError(
            f"{path} tells no {'grid' if facts.grid is None else 'layer'}: capture with "
            "`video-attn render --save_inputs`, which does"
        )
    if facts.is_causal or facts.mask != "none" or capture.q.shape[2] != capture.k.shape[2]:
        raise UsageError(f"{path} is no self-attention of all tokens: leave it out")
    tokens = VideoTokens(facts.grid, facts.text_length or 0, bool(facts.text_first))
    if tokens.sequence_length != capture.q.shape[2]:
        raise UsageError(
            f"{path} has {capture.q.shape[2]} tokens, but tells a video and text of "
            f"{tokens.sequence_length}"
        )
    return tokens


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


class _Memory:
    """Errors that were measured, in a JSON file that is replaced whole after every capture."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, dict[str, list[float]]] = {}
        if path is not None and path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise UsageError(f"{path} is not a file of this program: {error}") from error

    def errors(self, capture: str, names: Sequence[str]) -> NDArray[np.float64] | None:
        """[heads, candidates], if all of these candidates were measured on this capture."""
        known = self.content.get(capture, {})
        if not all(name in known for name in names):
            return None
        return np.array([known[name] for name in names]).T

    def keep(self, capture: str, names: Sequence[str], errors: NDArray[np.float64]) -> None:
        of_capture = self.content.setdefault(capture, {})
        for name, column in zip(names, errors.T, strict=True):
            of_capture[name] = column.tolist()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text(json.dumps(self.content), encoding="utf-8")
            part.replace(self.path)
