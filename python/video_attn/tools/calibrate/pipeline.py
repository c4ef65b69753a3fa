"""Captures from a pipeline on disk, and what a schedule does to its latents."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...functional.patterns import Dense
from ...integrations import Schedule, apply
from .. import UsageError
from ..capture import CaptureWriter, Selection
from ..render.attention import ModelAttention
from ..render.kinds import parse_kind
from ..render.model import call_arguments
from ..render.session import default_of, plan

_RECORD = "calibrate.json"  # in a folder of captures: what they are of, once all are there
Say = Callable[[str], None]


class _EnoughError(Exception):
    """Ends a pipeline's run after the last step that matters."""


@dataclass(frozen=True)
class Runs:
    """The runs of a pipeline that captures come from.

    Args:
        pipe: the pipeline. name: of it, for the record. prompts: one run each.
        steps: captured; runs end after the last of them. layers: captured, None for all.
        call: other arguments of the pipeline's call. seed: of the noise.
    """

    pipe: Any
    name: str
    prompts: Sequence[str]
    steps: Sequence[int]
    layers: Sequence[int] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("there must be a prompt, or more")
        if not self.steps or min(self.steps) < 0:
            raise UsageError(f"steps must be step numbers from 0, got {list(self.steps)}")

    @property
    def num_steps(self) -> int:
        """Denoising steps of a whole run."""
        return int(self._arguments("").get("num_inference_steps")
                   or default_of(self.pipe, "num_inference_steps"))  # fmt: skip

    def _arguments(self, prompt: str) -> dict[str, Any]:
        return call_arguments(self.pipe, {**self.call, "prompt": prompt})

    def capture(self, folder: Path, say: Say = print) -> list[Path]:
        """A folder with captures for each prompt; those that are there already are kept.

        Raises:
            UsageError: layers or steps that the model lacks, or more than the disk holds.
            OSError: captures that could not be written.
        """
        kind = parse_kind("sdpa")
        folders = []
        for number, prompt in enumerate(self.prompts):
            own = folder / f"prompt_{number:03d}"
            folders.append(own)
            record = self._record(prompt)
            if _recorded(own / _RECORD) == record:
                say(f"{own}: captures of this prompt are there already")
                continue
            say(f"{own}: {prompt}")
            own.mkdir(parents=True, exist_ok=True)
            (own / _RECORD).unlink(missing_ok=True)
            layers = None if self.layers is None else tuple(self.layers)
            selection = Selection(0, layers, tuple(self.steps))
            writer = CaptureWriter(own, kind.label, selection)

            def before_first(tokens: Any, query: Tensor, writer: CaptureWriter = writer) -> None:
                say("  " + plan(self.pipe, writer, query, self.num_steps))

            try:
                with ModelAttention(self.pipe, kind, writer=writer, before_first=before_first):
                    self._run(prompt, max(self.steps))
            finally:
                writer.close()
            if writer.failure:
                raise OSError(f"captures of {own} ended early: {writer.failure}")
            text = json.dumps(record, indent=1) + "\n"
            (own / _RECORD).write_text(text, encoding="utf-8")
        return folders

    def latents_after(self, prompt: str, steps: Sequence[int]) -> dict[int, Tensor]:
        """{step: fp32 latents on the CPU after it}, of a run that ends after the last."""
        return self._run(prompt, max(steps), steps)

    def _run(self, prompt: str, last: int, keep: Sequence[int] = ()) -> dict[int, Tensor]:
        kept = {}

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if step in keep:
                kept[step] = tensors["latents"].detach().float().cpu()
            if step >= last:
                raise _EnoughError
            return tensors

        generator = torch.Generator("cpu").manual_seed(self.seed)
        try:
            with torch.no_grad():
                self.pipe(
                    **self._arguments(prompt), generator=generator, output_type="latent",
                    callback_on_step_end=after_step,
                )  # fmt: skip
        except _EnoughError:
            # What the pipeline does at its end: hooks that move weights are as before.
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()
        return kept

    def _record(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self.name, "dtype": str(self.pipe.dtype), "prompt": prompt,
            "steps": sorted(self.steps), "seed": self.seed,
            "layers": None if self.layers is None else sorted(self.layers),
            "call": {key: value for key, value in self.call.items() if value is not None},
        }  # fmt: skip


def _recorded(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def latent_differences(runs: Runs, schedule: Schedule) -> dict[int, float]:
    """{step: relative L2 difference of the latents after it, dense before it and ``schedule`` in it
    alone}, the worst of the prompts.

    The latents before the step are the same, so this is what one step does. A run of the pipeline
    is needed for each step and prompt, up to that step, and one for each prompt with dense
    attention.
    """
    found = dict.fromkeys(sorted(runs.steps), 0.0)
    for prompt in runs.prompts:
        dense = runs.latents_after(prompt, runs.steps)
        for step in found:
            alone = only_in(schedule, step, runs.num_steps)
            with apply(runs.pipe, Dense(), schedule=alone):
                ours = runs.latents_after(prompt, [step])[step]
            gap = float((ours - dense[step]).norm() / dense[step].norm())
            found[step] = max(found[step], gap)
    return found


def only_in(schedule: Schedule, step: int, num_steps: int) -> Schedule:
    """What ``schedule`` says of one step, and nothing of the others."""
    layers = schedule.steps.get(step, schedule.overrides)
    return Schedule(steps={step: dict(layers)}, num_steps=num_steps)  # type: ignore[arg-type]
