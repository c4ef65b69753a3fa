"""AppliedAttention: what apply() did to a model, its figures, and the way back."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from ..calls import problem_of
from ..functional.head_groups import HeadGroups, LayerPattern
from ..functional.patterns import Dense, Radial, SlidingTile, VideoSparse
from ..functional.video_tokens import VideoTokens
from ..layout import Triple
from ..quantize import parse_recipe
from ..registry import select
from .applied_transformer import HANDLE, AppliedTransformer
from .fuse import FusedProjections
from .guard import guard, unguard
from .models import Family
from .schedule import Schedule


class AppliedAttention:
    """What :func:`apply` did to a model: its figures, and ``undo()``. A context manager.

    Attributes:
        pattern, schedule, precision, backend: as given; the pattern with what the model adds to it.
        sparse_calls, dense_calls: attentions over the video until now, one per layer and call of
            the transformer, counted where attention runs: layers that a cache skips count nothing.
        last_tokens: how the tokens of the last call lay; None before the first.
    """

    def __init__(
        self,
        pipe: Any,
        transformers: Sequence[tuple[Any, Family]],
        pattern: LayerPattern,
        schedule: Schedule,
        *,
        precision: str,
        backend: str | None,
        timesteps: Sequence[float] | None,
        size: tuple[int | None, int | None, int | None] = (None, None, None),
        fused: FusedProjections | None = None,
        fuse_norms: bool = True,
    ) -> None:
        self.pattern, self.schedule = pattern, schedule
        self.precision, self.backend = precision, backend
        self.sparse_calls = self.dense_calls = 0
        self.pipe, self.timesteps = pipe, timesteps
        self.fuse_norms = fuse_norms
        self._size, self._fused = size, fused
        self._lock, self._said = threading.Lock(), set[int]()
        self.last_tokens: VideoTokens | None = None
        self._applied = [AppliedTransformer(*pair, self) for pair in transformers]
        guard(pipe)

    def undo(self) -> None:
        """Puts the model back as it was. A second call does nothing."""
        for applied in self._applied:
            if getattr(applied.transformer, HANDLE, None) is self:
                applied.undo()
        unguard(self.pipe)
        if self._fused is not None:
            self._fused.undo()
            self._fused = None

    def __enter__(self) -> AppliedAttention:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def density(self, grid: Triple | None = None) -> float:
        """Token pairs that a sparse step computes over all pairs, the mean of all layers.

        Args:
            grid: tokens (T, H, W) of the video; None: as in the last call.

        Raises:
            RuntimeError: no grid is given, and there was no call.
        """
        tokens = self.last_tokens if grid is None else VideoTokens(grid)
        if tokens is None:
            raise RuntimeError("density needs a grid (T, H, W) before the first call")
        tokens = VideoTokens(tokens.grid, tokens.text_length, tokens.text_first)
        applied = self._applied[0]
        patterns = self._sparse_patterns()
        different = list({id(p): p for p in patterns}.values())
        known = {id(p): p.density(tokens, applied.heads) for p in different}
        return sum(known[id(p)] for p in patterns) / len(patterns)

    def backend_name(self, *, sparse: bool = True) -> str:
        """The backend that runs the sparse calls, or the dense ones, of this model as it is.

        Raises:
            RuntimeError: none can; the message says why for each.
        """
        if not sparse and self.precision == "native" and self.backend is None:
            return "the pipeline's own"
        pattern: LayerPattern | None = Dense()
        if sparse:
            patterns = self._sparse_patterns()
            pattern = next((p for p in patterns if not isinstance(p, Dense)), None)
            if pattern is None:
                return "none: no layer is sparse"
        transformer = self._applied[0].transformer
        device = getattr(self.pipe, "_execution_device", None) or transformer.device
        like = torch.empty(
            1, 1, 0, transformer.config.attention_head_dim, dtype=transformer.dtype, device=device
        )
        precision, quantization = parse_recipe(self.precision)
        problem = problem_of(
            "forward", like, like, like, _mask_like(pattern), precision=precision,
            quantization=quantization,
        )  # fmt: skip
        return select(problem, self.backend).name

    def summary(self) -> Table:
        """What is applied where, and what ran until now, as a table of rich."""
        applied, schedule = self._applied[0], self.schedule
        table = Table(title=f"attention of {applied.family.name}", show_header=False)
        layers = itertools.groupby(enumerate(self._sparse_patterns()), key=lambda item: item[1])
        for pattern, group in layers:
            numbers = [number for number, _ in group]
            table.add_row(f"layers {numbers[0]} to {numbers[-1]}", _describe(pattern))
        dense = f"first {schedule.dense_first_steps}, last {schedule.dense_last_steps}"
        table.add_row("dense steps", dense if schedule.needs_step else "none")
        if schedule.steps:
            table.add_row("steps of their own", str(len(schedule.steps)))
        table.add_row("precision", self.precision)
        for name, sparse in (("sparse", True), ("dense", False)):
            try:
                backend = self.backend_name(sparse=sparse)
            except RuntimeError as error:
                backend = str(error).partition("\n")[0]
            table.add_row(f"backend of {name} calls", backend)
        if self.last_tokens is not None:
            grid = " x ".join(map(str, self.last_tokens.grid))
            table.add_row("video of the last call", f"{grid} tokens")
            table.add_row("density of a sparse step", f"{self.density():.3f}")
        table.add_row("calls", f"{self.sparse_calls} sparse, {self.dense_calls} dense")
        return table

    def _sparse_patterns(self) -> list[LayerPattern]:
        """The patterns of a step that is not dense."""
        schedule = Schedule(self.schedule.dense_layers, overrides=self.schedule.overrides)
        applied = self._applied[0]
        layers = 1 + max(layer.layer for layer in applied.layers)
        return schedule.patterns(self.pattern, layers, applied.heads)

    def count(self, dense: bool) -> None:
        """Counts one attention."""
        with self._lock:
            self.dense_calls += dense
            self.sparse_calls += not dense

    def check_steps(self, steps: int) -> None:
        """Says once if the schedule leaves no step of such a run to sparse attention."""
        if isinstance(self.pattern, Dense):
            return
        dense = all(self.schedule.is_dense_step(step, steps) for step in range(steps))
        if dense and steps not in self._said:
            self._said.add(steps)
            warnings.warn(
                f"all {steps} steps of this run are dense: the schedule keeps "
                f"{self.schedule.dense_first_steps} first and {self.schedule.dense_last_steps} "
                "last steps dense; shares (dense_first_steps=0.25) suit runs of few steps",
                stacklevel=2,
            )

    def check_size(self, tokens: VideoTokens) -> None:
        """Raises ValueError where sizes were said beforehand and this call has others."""
        if any(n not in (None, m) for n, m in zip(self._size, tokens.grid, strict=True)):
            given = " x ".join("any" if n is None else str(n) for n in self._size)
            t, h, w = tokens.grid
            raise ValueError(
                f"this call has a video of {t} x {h} x {w} tokens, but attention was applied for "
                f"{given}; apply again with the height, width and num_frames of this generation"
            )


def _mask_like(pattern: LayerPattern | None) -> Any:
    """A mask with the block sizes of ``pattern``, to ask who serves it."""
    if isinstance(pattern, HeadGroups):
        pattern = pattern.groups[0].pattern
    if isinstance(pattern, (SlidingTile, VideoSparse)):
        return SlidingTile(1, pattern.tile).mask(VideoTokens(pattern.tile))
    if isinstance(pattern, Radial):
        tokens = VideoTokens((1, 1, pattern.block_size))
        return Radial(None, pattern.block_size).mask(tokens)
    return None


def _describe(pattern: LayerPattern) -> str:
    """A pattern on one line, long lists shortened."""
    text = repr(pattern)
    return text if len(text) <= 120 else text[:117] + "..."
