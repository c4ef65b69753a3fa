"""replace_cogvideox_attention: radial attention in a CogVideoX pipeline by one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from video_attn.functional.patterns import Dense, Radial
from video_attn.integrations import AppliedAttention, Schedule, applied_to
from video_attn.integrations.cogvideox import layout_of
from video_attn.integrations.pipeline import apply_sized
from video_attn.patterns.radial import RadialRule
from video_attn.patterns.scene import Scenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def replace_cogvideox_attention(
    pipe: DiffusionPipeline,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    dense_layers: int = 0,
    dense_timesteps: int = 0,
    decay_factor: float = 1.0,
    sparsity_type: str = "radial",
    use_sage_attention: bool = False,
    use_fused_attention: bool = False,
    *,
    scenes: Scenes | None = None,
) -> AppliedAttention:
    """Replaces the attention of ``pipe``, and what an earlier call put there.

    Args:
        height, width, num_frames: of the videos to come, in pixels; another size then raises.
            None: any.
        dense_layers: so many first layers stay dense. dense_timesteps: so many first steps too.
        decay_factor: scales how much far frames see of each other.
        sparsity_type: "radial", or "dense".
        use_sage_attention: INT8 products of queries and keys (precision "sage_fp16"), in dense
            layers and steps too.
        use_fused_attention: project q, k and v by one matrix.
        scenes: which scenes may see each other, for instance ``SceneAwareMaskMap(...).scenes``.

    Returns:
        A handle with ``undo()``, call counts and densities; see
        :func:`video_attn.integrations.apply`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    if sparsity_type not in ("radial", "dense"):
        raise ValueError(f"sparsity_type must be 'radial' or 'dense', got {sparsity_type!r}")
    for name, flag in (
        ("use_sage_attention", use_sage_attention),
        ("use_fused_attention", use_fused_attention),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    rule = RadialRule.for_model("cogvideox", decay_factor)
    pattern = Dense() if sparsity_type == "dense" else Radial(rule, scenes=scenes)
    schedule = Schedule(dense_layers=dense_layers, dense_first_steps=dense_timesteps)
    grid = layout_of(pipe, height, width, num_frames).grid
    frames, rows, columns = grid
    size = (
        None if num_frames is None else frames,
        None if height is None else rows,
        None if width is None else columns,
    )
    earlier = applied_to(pipe)
    if earlier is not None:
        earlier.undo()
    handle = apply_sized(
        pipe, pattern, schedule=schedule, fuse_qkv=use_fused_attention, num_frames=num_frames,
        precision="sage_fp16" if use_sage_attention else "native",
        size=size,
    )  # fmt: skip
    try:
        handle.density(grid)  # scenes that do not fit the video raise here, not in the first step
    except ValueError:
        handle.undo()
        raise
    return handle
