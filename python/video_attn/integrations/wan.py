"""Wan 2.1 and 2.2: sliding tile attention (STA) in the video self-attention of a pipeline.

Wan's text comes in by cross-attention, so the self-attention of a block (``attn1``) sees the video
alone, in raster order. The processor in front of it takes the token grid of each call from the
latents themselves: any size of video, and no size to be said beforehand.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import sliding_tile
from ..functional.sta import STA_TILE
from ..layout import Triple, as_triple
from ..patterns.sliding_tile import Windows, check_windows
from ..registry import check_backend_name
from .pipeline import denoising_step
from .schedule import Schedule
from .sdpa import call_with_attention

TRANSFORMER = "WanTransformer3DModel"
_HANDLE = "_video_attn_sliding_tile"


def apply_sliding_tile(
    pipe: Any,
    window: Windows,
    *,
    tile: Triple = STA_TILE,
    schedule: Schedule | None = None,
    backend: str | None = None,
) -> AppliedSlidingTile:
    """Gives the video self-attention of a Wan ``pipe`` sliding tile attention. In place, at once.

    ::

        with apply_sliding_tile(pipe, (3, 3, 3), schedule=Schedule(dense_first_steps=12)):
            video = pipe(prompt, height=768, width=1280, num_frames=69).frames[0]

    Args:
        pipe: a diffusers pipeline with a Wan transformer; the second one of Wan 2.2 is served too.
        window: tiles (t, h, w) that a query tile sees, or one triple per head.
        tile: tokens (t, h, w) of a tile; it need not divide the grid.
        schedule: dense layers, first and last steps; default none. Overrides are for radial rules
            and are refused.
        backend: as in :func:`video_attn.attention`.

    Returns:
        The handle: ``undo()``, a context manager, and the counts of sparse and dense calls.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
        RuntimeError: the pipeline carries sliding tile attention already; undo that first.
    """
    transformers = _transformers(pipe)
    if any(hasattr(x, _HANDLE) for x in transformers):
        raise RuntimeError("pipe has sliding tile attention applied: call undo() on its handle")
    schedule = Schedule() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule or None, got {schedule!r}")
    if schedule.overrides:
        raise ValueError(f"schedule.overrides must be empty for STA, got {schedule.overrides!r}")
    heads = transformers[0].config.num_attention_heads
    schedule.check(len(transformers[0].blocks), heads)
    check_windows(window, heads, "window")
    if backend is not None:
        check_backend_name(backend)
    return AppliedSlidingTile(pipe, window, as_triple(tile, "tile"), schedule, backend)


class SlidingTileWanProcessor:
    """A Wan attention processor whose attention is sliding tile attention.

    The processor it stands in front of does the rest: projections, normalisation, rotary positions.

    Attributes:
        grid: (T, H, W) tokens of the video of this call, set by the hook of the transformer; None
            leaves the inner processor alone, which is dense attention.
    """

    def __init__(self, inner: Any, window: Windows, tile: Triple, backend: str | None) -> None:
        self.inner, self.window, self.tile, self.backend = inner, window, tile, backend
        self.grid: Triple | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As diffusers calls it: video [B, S, C] -> video [B, S, C]."""
        arguments = attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
        if self.grid is None:
            return self.inner(*arguments)
        return call_with_attention(partial(self._attend, self.grid), self.inner, *arguments)

    def _attend(
        self, grid: Triple, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        return sliding_tile(
            query, key, value, grid, self.window,
            tile=self.tile, text_length=0, scale=scale, backend=self.backend,
        )  # fmt: skip


class AppliedSlidingTile:
    """What :func:`apply_sliding_tile` did to a pipeline, and ``undo()``. A context manager.

    Attributes:
        sparse_calls, dense_calls: self-attention calls of the transformers until now.
    """

    def __init__(
        self, pipe: Any, window: Windows, tile: Triple, schedule: Schedule, backend: str | None
    ) -> None:
        self.sparse_calls = self.dense_calls = 0
        self._pipe, self._schedule = pipe, schedule
        self._transformers = _transformers(pipe)
        self._hooks = []
        for transformer in self._transformers:
            for block in transformer.blocks:
                block.attn1.set_processor(
                    SlidingTileWanProcessor(block.attn1.processor, window, tile, backend)
                )
            # Not traced by torch.compile: it sets what the compiled code is guarded on.
            hook = torch.compiler.disable(self._before_forward)
            self._hooks.append(transformer.register_forward_pre_hook(hook, with_kwargs=True))
            setattr(transformer, _HANDLE, self)

    def undo(self) -> None:
        """Puts the pipeline back as it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for transformer in self._transformers:
            if getattr(transformer, _HANDLE, None) is not self:
                continue
            delattr(transformer, _HANDLE)
            for block in transformer.blocks:
                if isinstance(block.attn1.processor, SlidingTileWanProcessor):
                    block.attn1.set_processor(block.attn1.processor.inner)

    def __enter__(self) -> AppliedSlidingTile:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook: tells each layer the grid of this call, or that it is dense."""
        inputs = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        sizes = inputs["hidden_states"].shape[2:]
        grid = as_triple(
            tuple(n // p for n, p in zip(sizes, module.config.patch_size, strict=True)), "grid"
        )
        dense_step = self._schedule.needs_step and self._schedule.is_dense_step(
            *denoising_step(self._pipe.scheduler, inputs["timestep"])
        )
        for layer, block in enumerate(module.blocks):
            processor = block.attn1.processor
            if not isinstance(processor, SlidingTileWanProcessor):
                raise RuntimeError(
                    f"the attention processor of layer {layer} was replaced after "
                    "apply_sliding_tile(): call undo() first, change it, and apply again"
                )
            dense = dense_step or layer < self._schedule.dense_layers
            processor.grid = None if dense else grid
            self.dense_calls += dense
            self.sparse_calls += not dense


def _transformers(pipe: Any) -> list[Any]:
    """The one or two Wan transformers of ``pipe``, without the wrapper of torch.compile."""
    found = []
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipe, name, None)
        transformer = getattr(transformer, "_orig_mod", transformer)
        if any(kind.__name__ == TRANSFORMER for kind in type(transformer).__mro__):
            found.append(transformer)
    if not found:
        raise TypeError(
            f"pipe must be a diffusers pipeline whose transformer is a {TRANSFORMER}, got "
            f"{type(pipe).__name__}"
        )
    return found
