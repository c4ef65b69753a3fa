"""Radial attention for models. Tokens stay in raster order: nothing is moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..attention import Options, attention, check_options
from ..checks import wants_gradient
from ..patterns.radial import RadialRule, radial_mask
from ..patterns.scene import Scenes
from ..patterns.valid_text import TextLength, check_text_length
from .video import video_layout

if TYPE_CHECKING:
    from typing_extensions import Unpack


def radial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: str | Sequence[int],
    *,
    rule: RadialRule | None = None,
    block_size: int = 128,
    scenes: Scenes | None = None,
    text_length: TextLength = None,
    text_first: bool = False,
    layout: str = "bhsd",
    **options: Unpack[Options],
) -> Tensor:
    """Radial attention over a video in raster order, with or without text in the sequence.

    The farther apart two frames are, the fewer of their tokens see each other. Text sees everything
    and is seen by everything. Differentiable.

    Args:
        q: [B, Hq, S, D], S = T*H*W + text tokens. k: [B, Hkv, S, D]. v: [B, Hkv, S, Dv].
        grid: tokens (T, H, W) of the video after patchifying, or "TxHxW"; any sizes.
        rule: how the windows shrink; default ``RadialRule()``; ``RadialRule.for_model`` has the
            published ones.
        block_size: tokens of a block of the mask.
        scenes: which scenes of the video may see each other.
        text_length: valid text tokens, the first ones of the text: an int, one per batch item, or
            an integer tensor [B] on the device of q. Default: all S - T*H*W. What lies past them is
            never read; its output is 0. With ``text_first`` all text must be valid.
        text_first: the sequence is [text, video] instead of [video, text].
        layout: "bhsd", or "bshd" for q, k, v and output [B, S, H, D].
        scale, precision, backend, deterministic, quantization: as in
            :func:`video_attn.attention`.

    Returns:
        [B, Hq, S, Dv] (or as ``layout`` says) in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_options("radial", options)
    video = video_layout(q, k, v, grid, (1, 1, 1), text_first, layout)
    mask = radial_mask(
        video,
        rule,
        block_size=block_size,
        scenes=scenes,
        text_length=check_text_length(text_length, video, q.shape[0]),
        device=q.device,
        transposed=wants_gradient(q, k, v),
    )
    return attention(
        q, k, v, mask, layout=layout, **options,
    )  # fmt: skip
