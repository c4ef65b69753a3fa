"""Sliding tile attention for models: in raster order, and as ``st_attn`` has it, in tile order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..attention import Options, attention, check_options
from ..block_mask import BlockMask
from ..checks import as_int, check_bool, wants_gradient
from ..layout import Triple, VideoLayout
from ..patterns.sliding_tile import Windows, check_windows, sliding_tile_mask
from ..patterns.valid_text import TextLength, check_text_length
from .video import TOKEN_DIM, attend_in_tile_order, video_layout

if TYPE_CHECKING:
    from typing_extensions import Unpack

STA_TILE: Triple = (6, 8, 8)


def sliding_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: str | Sequence[int],
    window: Windows,
    *,
    tile: Sequence[int] = STA_TILE,
    text_length: TextLength = None,
    text_first: bool = False,
    layout: str = "bhsd",
    **options: Unpack[Options],
) -> Tensor:
    """Sliding tile attention over a video in raster order, with or without text in the sequence.

    Every query tile sees ``window`` tiles per axis around it (shifted at the borders) and the valid
    text; text queries see everything. Differentiable. This moves q, k, v to tile order and the
    output back: four gathers, but for quantized kernels that read and write raster order
    (backend ``cuda_sage``, without derivatives). A model that keeps its tokens in tile order saves
    them::

        video = VideoLayout(grid, tile, text_length=256)
        mask = sliding_tile_mask(video, window, device=x.device)
        x = video.to_tiles(x, dim=1)  # once, before the first layer; rotary positions likewise
        ...  # in every layer: attention(q, k, v, mask)
        x = video.from_tiles(x, dim=1)  # once, after the last layer

    Args:
        q: [B, Hq, S, D], S = T*H*W + text tokens. k: [B, Hkv, S, D]. v: [B, Hkv, S, Dv].
        grid: tokens (T, H, W) of the video after patchifying, or "TxHxW"; any sizes.
        window: tiles (t, h, w) seen per axis, or a sequence with one per query head; larger than
            the grid means all of it.
        tile: tokens (t, h, w) of a tile; tiles at the border may be partial.
        text_length: valid text tokens, the first ones of the text: an int, one per batch item, or
            an integer tensor [B] on the device of q. Default: all S - T*H*W. What lies past them is
            never read; its output is 0.
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
    check_options("sliding_tile", options)
    video = video_layout(q, k, v, grid, tile, text_first, layout)
    mask = _mask((q, k, v), TOKEN_DIM[layout], video, window, text_length, "window")
    return attend_in_tile_order(q, k, v, mask, video, layout, options)


def sliding_tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Windows,
    text_length: TextLength,
    has_text: bool = True,
    seq_shape: str | Sequence[int] = "30x48x80",
    *,
    tile_size: Sequence[int] = STA_TILE,
    layout: str = "bhsd",
    dit_seq_shape: str | Sequence[int] | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Sliding tile attention over q, k, v that are in tile order already: the ``st_attn`` function.

    The sequence is the T*H*W video tokens, tile after tile (see :meth:`VideoLayout.tile_order`),
    then the text. One launch serves all heads and the text. Nothing is copied when the tile divides
    the grid. Differentiable.

    Args:
        q: [B, Hq, S, D]. k: [B, Hkv, S, D]. v: [B, Hkv, S, Dv].
        window_size: tiles (t, h, w) seen per axis, one per query head in a list, or one for all.
        text_length: valid text tokens, the first of those after the video: an int, one per batch
            item, or an integer tensor [B] on the device of q. Text past them is never read; its
            output is 0.
        has_text: False says that the sequence is the video alone; ``text_length`` must then be 0.
        seq_shape: tokens (T, H, W) of the video, as three ints or "TxHxW"; any sizes.
        tile_size: tokens (t, h, w) of a tile.
        layout: "bhsd", or "bshd" for q, k, v and output [B, S, H, D].
        dit_seq_shape: the old name of ``seq_shape``; deprecated.
        scale, precision, backend, deterministic, quantization: as in
            :func:`video_attn.attention`.

    Returns:
        [B, Hq, S, Dv] in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_bool("has_text", has_text)
    check_options("sliding_tile_attention", options)
    if dit_seq_shape is not None:
        warnings.warn("dit_seq_shape is called seq_shape now", DeprecationWarning, stacklevel=2)
        seq_shape = dit_seq_shape
    names = ("seq_shape", "tile_size")
    video = video_layout(q, k, v, seq_shape, tile_size, False, layout, names)
    dim = TOKEN_DIM[layout]
    if not has_text:
        _check_no_text(video, text_length, q.shape[dim])
    mask = _mask((q, k, v), dim, video, window_size, text_length, "window_size")
    q, k, v = (video.pad_tiles(x, dim) for x in (q, k, v))
    return video.unpad_tiles(attention(q, k, v, mask, layout=layout, **options), dim)


def _mask(
    qkv: tuple[Tensor, ...],
    token_dim: int,
    video: VideoLayout,
    windows: Windows,
    text_length: TextLength,
    windows_name: str,
) -> BlockMask:
    q = qkv[0]
    return sliding_tile_mask(
        video,
        check_windows(windows, q.shape[3 - token_dim], windows_name),
        text_length=check_text_length(text_length, video, q.shape[0]),
        device=q.device,
        transposed=wants_gradient(*qkv),
    )


def _check_no_text(video: VideoLayout, text_length: TextLength, tokens: int) -> None:
    if as_int(text_length) != 0:
        raise ValueError(f"text_length must be 0 when has_text is False, got {text_length!r}")
    if video.text_length > 0:
        raise ValueError(
            f"has_text is False, but q has {tokens} tokens: {video.text_length} more than the "
            f"video of seq_shape {video.grid}"
        )
