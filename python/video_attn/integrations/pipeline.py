"""apply(pipe, pattern): any pattern in any video model of diffusers, and what may be undone.

Everything hangs on the transformers of the one pipeline: their attention modules get processors of
their own, and each transformer two hooks, around each forward pass, that say what this call is (see
:mod:`.applied`). No class is touched, so pipelines in one process do not know of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..checks import check_bool
from ..functional.patterns import Radial
from ..functional.token_pattern import TokenPattern
from ..registry import PRECISIONS, check_backend_name
from .applied import AppliedAttention
from .applied_transformer import HANDLE
from .fuse import FusedProjections
from .intercept import ReplacedProcessor
from .models import FAMILIES, Family, family_of
from .schedule import Schedule
from .steps import TRANSFORMERS, unwrapped


def apply(
    pipe: Any,
    pattern: TokenPattern,
    *,
    schedule: Schedule | None = None,
    precision: str = "native",
    backend: str | None = None,
    fuse_qkv: bool = False,
    fuse_norms: bool = True,
    timesteps: Sequence[float] | None = None,
    num_frames: int | None = None,
) -> AppliedAttention:
    """Gives the video self-attention of ``pipe`` a pattern. Works in place, at once.

    ::

        with apply(pipe, SlidingTile((3, 3, 3)), schedule=Schedule(dense_first_steps=12)):
            video = pipe(prompt, height=768, width=1280, num_frames=69).frames[0]

    The grid of the video is taken from each call: videos of any size and length may follow each
    other. Cross-attention, text encoders and the VAE stay as they are.

    Args:
        pipe: a diffusers pipeline, or a transformer alone, of a family that
            ``video_attn.integrations.models`` knows. Both transformers of Wan 2.2 are served.
        pattern: ``SlidingTile``, ``VideoSparse``, ``Radial``, ``Dense``, ``HeadGroups`` or another
            ``TokenPattern``.
        schedule: which layers and steps stay dense or do otherwise; default none.
        precision, backend: as in :func:`video_attn.attention`. Dense layers and steps run in this
            precision and backend too; with the defaults they are the model's own, with the
            attention backend that diffusers has for it.
        fuse_qkv: project q, k and v by one matrix.
        fuse_norms: where a kernel can, on GPUs with Triton: norms and rotary positions of q and k
            and the move to tile order in one pass (Wan, LTX-Video, LTX-2; without gradients and
            autocast). It computes in fp32 and rounds once, where the model rounds twice.
        timesteps: of the run, where a transformer is called outside of a pipeline and the schedule
            counts steps.
        num_frames: of the videos to come, in pixels. Only scenes that count pixel frames need it,
            and only where the model puts latents before the video (CogVideoX 1.5); default that
            model's own.

    Returns:
        The handle: ``undo()``, a context manager, counts, density, backend.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
        RuntimeError: the model carries an application already; undo that first.
    """
    return apply_sized(
        pipe, pattern, schedule=schedule, precision=precision, backend=backend, fuse_qkv=fuse_qkv,
        fuse_norms=fuse_norms, timesteps=timesteps, num_frames=num_frames,
    )  # fmt: skip


def apply_sized(
    pipe: Any,
    pattern: TokenPattern,
    *,
    schedule: Schedule | None = None,
    precision: str = "native",
    backend: str | None = None,
    fuse_qkv: bool = False,
    fuse_norms: bool = True,
    timesteps: Sequence[float] | None = None,
    num_frames: int | None = None,
    size: tuple[int | None, int | None, int | None] = (None, None, None),
) -> AppliedAttention:
    """:func:`apply` for videos of ``size`` tokens (T, H, W) alone; None is any."""
    transformers = transformers_of(pipe)
    if applied_to(pipe) is not None:
        raise RuntimeError("pipe has an attention applied already: call undo() on its handle first")
    if not isinstance(pattern, TokenPattern):
        raise TypeError(
            "pattern must be a SlidingTile, VideoSparse, Radial or Dense, got "
            f"{type(pattern).__name__}"
        )
    schedule = Schedule() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule or None, got {schedule!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if backend is not None:
        check_backend_name(backend)
    check_bool("fuse_qkv", fuse_qkv)
    check_bool("fuse_norms", fuse_norms)
    for other, family in transformers:
        for layer in family.attention_layers(other):
            if isinstance(layer.module.processor, ReplacedProcessor):
                raise RuntimeError(
                    f"the attention of {layer.name} is replaced already, by sparsify() for "
                    "instance: undo that first"
                )
    transformer, family = transformers[0]
    pattern = fitted(pattern, pipe, family, num_frames)
    schedule = replace(
        schedule,
        overrides={
            key: fitted(choice, pipe, family, num_frames)
            for key, choice in schedule.overrides.items()
        },
    )
    layers = 1 + max(layer.layer for layer in family.attention_layers(transformer))
    heads = transformer.config.num_attention_heads
    schedule.check(layers, heads)
    for layer_pattern in schedule.patterns(pattern, layers, heads, 0, schedule.num_steps or 1):
        layer_pattern.check_heads(heads)
    fused = FusedProjections([t for t, _ in transformers]) if fuse_qkv else None
    return AppliedAttention(
        pipe, transformers, pattern, schedule, precision=precision, backend=backend,
        timesteps=timesteps, size=size, fused=fused, fuse_norms=fuse_norms,
    )  # fmt: skip


def applied_to(pipe: Any) -> AppliedAttention | None:
    """The application that a pipeline or transformer carries, or None."""
    handles = (getattr(transformer, HANDLE, None) for transformer, _ in transformers_of(pipe))
    return next((handle for handle in handles if handle is not None), None)


def transformers_of(pipe: Any) -> list[tuple[Any, Family]]:
    """The video transformers of a pipeline, or the one that is given, without the wrapper of
    torch.compile.

    Raises:
        TypeError: there is none of a known family.
    """
    given: list[Any] = [pipe] if isinstance(pipe, torch.nn.Module) else []
    for candidate in given or [getattr(pipe, name, None) for name in TRANSFORMERS]:
        transformer = unwrapped(candidate)
        if family_of(transformer) is not None and transformer not in given:
            given.append(transformer)
    found = [(unwrapped(x), family_of(unwrapped(x))) for x in given]
    known = [(transformer, family) for transformer, family in found if family is not None]
    if not known:
        names = ", ".join(name for family in FAMILIES for name in family.transformers)
        inside = type(getattr(pipe, "transformer", None)).__name__
        raise TypeError(
            f"pipe must be a diffusers pipeline, or its transformer, of one of {names}; got "
            f"{type(pipe).__name__}"
            + ("" if isinstance(pipe, torch.nn.Module) else f" with transformer {inside}")
        )
    return known


def fitted(pattern: Any, pipe: Any, family: Family, num_frames: int | None) -> Any:
    """A radial pattern with the rule of the model and the times that it gives to its frames."""
    if not isinstance(pattern, Radial):
        return pattern
    if pattern.rule is None:
        pattern = replace(pattern, rule=family.rule)
    if pattern.scenes is None:
        return pattern
    config = transformers_of(pipe)[0][0].config
    patch, padding = family.temporal_patch(config), 0
    compression = getattr(pipe, "vae_scale_factor_temporal", family.temporal_compression)
    if patch > 1:
        num_frames = getattr(config, "sample_frames", 1) if num_frames is None else num_frames
        padding = -((num_frames - 1) // compression + 1) % patch
    scenes = replace(
        pattern.scenes, temporal_compression=compression, temporal_patch=patch,
        padding_latents=padding,
    )  # fmt: skip
    return replace(pattern, scenes=scenes)
