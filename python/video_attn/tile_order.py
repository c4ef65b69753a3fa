"""Attention of a video in raster order under a mask over its padded tile order, as one operator.

Kernels that quantize read every token once anyway, and find it wherever it lies: then nothing is
moved. For other backends the tokens are moved to tile order, and the output back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask, mask_arguments
from .calls import ForwardCall, empty_like_heads
from .layout import VideoLayout
from .mask_arguments import MaskArguments
from .ops import MASK_SCHEMA, library, run_forward
from .quantize import parse_recipe, recipe_text
from .registry import select

library.define(
    "attention_in_tiles(Tensor q, Tensor k, Tensor v, SymInt[] grid, int[] tile, "
    f"SymInt text_length, bool text_first, {MASK_SCHEMA}, float scale, str recipe, str? backend) "
    "-> Tensor"
)


def attend_in_tiles(
    call: ForwardCall, mask: BlockMask, video: VideoLayout, backend: str | None
) -> Tensor:
    """The output of a quantized call [B, H, S, D] in raster order, without derivatives.

    Args:
        call: without a mask. mask: over the padded tile order of ``video``.
        backend: a name to force it.
    """
    if torch.compiler.is_compiling():
        return torch.ops.video_attn.attention_in_tiles(
            call.q, call.k, call.v, *video.key, *mask_arguments(mask), call.scale,
            recipe_text(call.precision, call.quantization), backend,
        )  # fmt: skip
    return _run(call._replace(mask=mask), video, backend)


def _run(call: ForwardCall, video: VideoLayout, backend: str | None) -> Tensor:
    if 0 not in call.q.shape[:2]:
        in_order = select(call.problem, backend).forward_in_order
        if in_order is not None:
            return in_order(call, video.tile_places(call.q.device))
    q, k, v = (_along_tokens(video.to_tiles, x) for x in (call.q, call.k, call.v))
    out, _ = run_forward(call._replace(q=q, k=k, v=v), backend)
    return _along_tokens(video.from_tiles, out)


def _along_tokens(move: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    """Tokens of [B, H, S, D] moved in its memory order, BHSD or BSHD."""
    if x.stride(1) < x.stride(2):
        return move(x.transpose(1, 2), 1).transpose(1, 2)
    return move(x, 2)


def _attention_in_tiles(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    grid, tile, text_length, text_first, *rest = arguments
    fields = len(MaskArguments._fields)
    scale, recipe, backend = rest[fields:]
    video = VideoLayout(tuple(grid), tuple(tile), text_length, text_first)
    mask = BlockMask.from_arguments(
        MaskArguments(*rest[:fields]), video.padded_length, video.padded_length
    )
    precision, quantization = parse_recipe(recipe)
    call = ForwardCall(q, k, v, mask, scale, False, precision, quantization)
    return _run(call, video, backend)


def _fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return empty_like_heads(q, v.shape[3])


library.impl("attention_in_tiles", _attention_in_tiles, "CompositeExplicitAutograd")
torch.library.register_fake("video_attn::attention_in_tiles", _fake, lib=library)
