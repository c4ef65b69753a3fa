"""Attention over tokens in raster order, by a mask over tile order.

A backend may fetch tiles from raster order and write them back there: then no tensor is moved.
Elsewhere q, k, v go to tile order before and the output comes back: four gathers. Compiled code has
an operator of its own for the first way, which takes the second one where the backend that serves
it at last does not read so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention import Options, attention, checked_call
from ..block_mask import BlockMask, mask_arguments
from ..calls import ForwardCall, empty_like_heads
from ..checks import forward_mode_is_on, wants_gradient
from ..compiler import constant_result
from ..derivatives import is_plain
from ..layout import VideoLayout
from ..mask_arguments import MaskArguments
from ..ops import MASK_SCHEMA, library, run_forward
from ..registry import Backend, Problem, select
from ..transforms import register_vmap
from .video import TOKEN_DIM

if TYPE_CHECKING:
    from typing_extensions import Unpack

# No derivatives, and native precision only.
library.define(
    f"attention_raster(Tensor q, Tensor k, Tensor v, {MASK_SCHEMA}, int[] grid, int[] tile, "
    "float scale, str? backend) -> Tensor"
)


def attention_in_raster(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    video: VideoLayout,
    *,
    layout: str = "bhsd",
    **options: Unpack[Options],
) -> Tensor:
    """:func:`video_attn.attention` over tokens in raster order of ``video``.

    Args:
        q, k, v: of ``video.sequence_length`` tokens, in ``layout``.
        mask: over the padded tile order of ``video``; its blocks are the tiles.
        options: of :func:`video_attn.attention`.

    Returns:
        out in raster order. Derivatives always go through tile order.
    """
    if _may_be_read(q, k, v, video, options):
        if torch.compiler.is_compiling():
            facts = (q.device, q.dtype, q.shape[3], v.shape[3])
            if _is_read_now(*video.grid, *video.tile, *facts, options.get("backend")):
                return _compiled(q, k, v, mask, video, layout, options)
        elif is_plain(q, k, v):
            call = checked_call(q, k, v, mask, layout=layout, **options)
            backend = select(call.problem, options.get("backend"))
            if _reads(backend, call, video):
                out = _read(backend, call, video)
                return out.transpose(1, 2) if layout == "bshd" else out
    dim = TOKEN_DIM[layout]
    q, k, v = (video.to_tiles(x, dim) for x in (q, k, v))
    return video.from_tiles(attention(q, k, v, mask, layout=layout, **options), dim)


def _may_be_read(q: Tensor, k: Tensor, v: Tensor, video: VideoLayout, options: Options) -> bool:
    """Whether tile order is raster order in another sequence, and nothing else is asked for."""
    return not (
        video.is_ragged
        or video.text_first
        or options.get("precision", "native") != "native"
        or wants_gradient(q, k, v)
        or (not torch.compiler.is_compiling() and forward_mode_is_on())
    )


def _reads(backend: Backend, call: ForwardCall, video: VideoLayout) -> bool:
    if backend.reads_raster is None or 0 in call.q.shape:
        return False
    return backend.reads_raster(video, call.q, call.k, call.v)


def _read(backend: Backend, call: ForwardCall, video: VideoLayout) -> Tensor:
    out, _ = backend.forward(
        ForwardCall(call.q, call.k, call.v, call.mask, call.scale, video=video)
    )
    return out


# -- compiled code ---------------------------------------------------------------------------------


@constant_result
def _is_read_now(*facts: Any) -> bool:
    """Whether the backend that would serve this while it is traced reads raster order.

    Where none does, Inductor shall see the gathers: it makes them a part of other operations.
    """
    grid, tile = facts[:3], facts[3:6]
    device, dtype, head_dim, head_dim_v, backend = facts[6:]
    size = math.prod(tile)
    problem = Problem.of("forward", device, dtype, head_dim, head_dim_v, size, size)
    try:
        chosen = select(problem, backend)
    except (RuntimeError, ValueError):  # the call itself will say so
        return False
    return chosen.reads_raster is not None and chosen.reads_raster(VideoLayout(grid, tile))


def _compiled(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, video: VideoLayout, layout: str,
    options: Options,
) -> Tensor:  # fmt: skip
    call = checked_call(q, k, v, mask, layout=layout, **options)
    out = torch.ops.video_attn.attention_raster(
        call.q, call.k, call.v, *mask_arguments(mask), video.grid, video.tile, call.scale,
        options.get("backend"),
    )  # fmt: skip
    return out.transpose(1, 2) if layout == "bshd" else out


def _run(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """``attention_raster``; the backend is chosen here, from the tensors that it gets at last."""
    *lists, grid, tile, scale, backend = arguments
    video = VideoLayout(grid, tile, q.shape[2] - math.prod(grid))
    mask = BlockMask.from_arguments(MaskArguments(*lists), q.shape[2], k.shape[2])
    call = ForwardCall(q, k, v, mask, scale)
    if 0 not in q.shape:
        chosen = select(call.problem, backend)
        if _reads(chosen, call, video):
            return _read(chosen, call, video)
    q, k, v = (_move(x, video.to_tiles) for x in (q, k, v))
    out, _ = run_forward(ForwardCall(q, k, v, mask, scale), backend)
    return _move(out, video.from_tiles)


def _move(x: Tensor, move: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[B, H, S, D] with other tokens, in the memory order of ``x``."""
    if x.stride(1) < x.stride(2):
        return move(x.transpose(1, 2), 1).transpose(1, 2)
    return move(x, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return empty_like_heads(q, v.shape[3])


def _setup_no_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing to keep: there is no derivative."""


def _no_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "video_attn::attention_raster has no derivatives; video_attn.sliding_tile, which calls it "
        "where nobody differentiates, has them"
    )


library.impl("attention_raster", _run, "CompositeExplicitAutograd")
torch.library.register_fake("video_attn::attention_raster", _fake, lib=library)
torch.library.register_autograd(
    "video_attn::attention_raster", _no_derivative, setup_context=_setup_no_context, lib=library
)
register_vmap(torch.ops.video_attn.attention_raster.default, 3, library)
