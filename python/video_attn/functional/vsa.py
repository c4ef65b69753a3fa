"""Video sparse attention for models: select tiles by block means, attend exactly, add the means.

Definition. With q_m, k_m, v_m the means over the valid tokens of each tile:

- scores = scale * q_m k_m^T, in fp32 from means in the dtype of q. The public kernel ranks tiles by
  scores rounded to bf16, and so may choose others where scores are nearly equal (one row in eight
  at 312 tiles and top 32); ``score_dtype=torch.bfloat16`` ranks as it does, for models that were
  trained with it. The coarse branch has the scores as they are in either case;
- coarse = softmax(scores) v_m: each tile weighs equally, whatever its number of valid tokens;
- sparse = exact attention over the tokens of the k tiles with the highest scores;
- out = sparse + gate * coarse, the coarse value of a tile being added to all its tokens.

Gradients go through means, coarse branch, gate and sparse branch; the selection has none. A NaN
score counts as -inf: exactly k tiles are kept, and NaN in the data still shows in the output.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast, overload

import torch
from torch import Tensor

from ..attention import Options, attention, check_options, check_scale
from ..block_mask import BlockMask
from ..block_ops import block_mean, select_top_k
from ..calls import RankCall, Side
from ..checks import (
    broadcasts,
    check_bool,
    check_int,
    check_number,
    may_be_overwritten,
    wants_gradient,
)
from ..layout import Triple, VideoLayout
from ..patterns.valid_text import (
    TextLength,
    block_lens,
    check_text_length,
    listed_text_blocks,
)
from ..patterns.video_sparse import kept_blocks, selected_tiles_mask
from .coarse import per_kv_head, rank_and_average
from .ranking import fused_block_ops, rank
from .video import TOKEN_DIM, video_layout

if TYPE_CHECKING:
    from typing_extensions import Unpack

Gate = Tensor | float | None
VSA_TILE: Triple = (4, 4, 4)


@overload
def video_sparse(
    q: Tensor, k: Tensor, v: Tensor, grid: str | Sequence[int], *, top_k: int | None = ...,
    top_k_ratio: float | None = ..., gate: Gate = ..., tile: Sequence[int] = ...,
    text_length: TextLength = ..., text_first: bool = ..., layout: str = ...,
    score_dtype: torch.dtype | None = ..., return_mask: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def video_sparse(
    q: Tensor, k: Tensor, v: Tensor, grid: str | Sequence[int], *, top_k: int | None = ...,
    top_k_ratio: float | None = ..., gate: Gate = ..., tile: Sequence[int] = ...,
    text_length: TextLength = ..., text_first: bool = ..., layout: str = ...,
    score_dtype: torch.dtype | None = ..., return_mask: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, BlockMask]: ...  # fmt: skip
def video_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: str | Sequence[int],
    *,
    top_k: int | None = None,
    top_k_ratio: float | None = None,
    gate: Gate = None,
    tile: Sequence[int] = VSA_TILE,
    text_length: TextLength = None,
    text_first: bool = False,
    layout: str = "bhsd",
    score_dtype: torch.dtype | None = None,
    return_mask: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, BlockMask]:
    """Video sparse attention over a video in raster order, with or without text in the sequence.

    ``out = sparse + gate * coarse``; see the module for the definition. Differentiable. Text takes
    no part in means and selection: valid text is seen by all queries, and text queries see
    everything, exactly; they have no coarse branch. Ratio 1 with gate 0 is dense attention. For a
    model that keeps its tokens in tile order see :func:`video_sparse_attn`, with
    :meth:`VideoLayout.block_lens` as block sizes.

    Args:
        q: [B, Hq, S, D], S = T*H*W + text tokens. k: [B, Hkv, S, D]. v: [B, Hkv, S, Dv].
        grid: tokens (T, H, W) of the video after patchifying, or "TxHxW"; any sizes.
        top_k: video tiles that each query tile sees, 1 to all.
        top_k_ratio: the same as a share of all tiles, in (0, 1], rounded up to whole tiles; see
            :func:`kept_blocks`. Exactly one of the two must be given.
        gate: weight of the coarse branch. None adds it as it is. 0 leaves it out. A number, or a
            floating-point tensor that broadcasts to the output: elementwise [B, Hq, S, Dv], per
            head [Hq, 1, 1], ...; in raster order, and as ``layout`` says. Entries at text tokens
            gate nothing.
        tile: tokens (t, h, w) of a tile; tiles at the border may be partial.
        text_length: valid text tokens, the first ones of the text: an int, one per batch item, or
            an integer tensor [B] on the device of q. Default: all S - T*H*W. What lies past them is
            never read; its output is 0.
        text_first: the sequence is [text, video] instead of [video, text].
        layout: "bhsd", or "bshd" for q, k, v, gate and output [B, S, H, D].
        scale, precision, backend, deterministic, quantization: as in
            :func:`video_attn.attention`; ``scale`` holds for both branches, ``precision`` for the
            sparse one.
        score_dtype: torch.bfloat16 or torch.float16: tiles are ranked by scores rounded to it, from
            means rounded to it, with ties to the lower index; torch.bfloat16 is how public models
            were trained. Default: by the scores in fp32.
        return_mask: also return the :class:`BlockMask` of the sparse branch, for its density or to
            attend again.

    Returns:
        [B, Hq, S, Dv] (or as ``layout`` says) in the dtype of q; with ``return_mask``, (out, mask).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_options("video_sparse", options)
    video = video_layout(q, k, v, grid, tile, text_first, layout)
    top_k = _check_top_k(top_k, top_k_ratio, video.num_tiles)
    gate = check_gate(gate, (*q.shape[:3], v.shape[3]), q)
    check_bool("return_mask", return_mask)
    check_score_dtype(score_dtype)
    valid = check_text_length(text_length, video, q.shape[0])
    options["scale"] = scale = check_scale(options.get("scale"), q.shape[3])
    q, k, v = (_to_tiles(x, video, layout) for x in (q, k, v))
    if isinstance(gate, Tensor):
        gate = _to_tiles(gate, video, layout)
    lens = block_lens(valid, video, q.device)
    tile_lens = None if lens is None else lens[:, : video.num_tiles]
    length = video.num_tiles * video.tile_volume
    selected, counts, coarse = compress_and_select(
        q[:, :, :length], k[:, :, :length], v[:, :, :length], tile_lens, tile_lens,
        block_size=video.tile_volume, top_k=top_k, scale=scale, gate=gate,
        backend=options.get("backend"), score_dtype=score_dtype,
    )  # fmt: skip
    mask = selected_tiles_mask(
        selected, video, counts=counts, text_blocks=listed_text_blocks(valid, video),
        block_lens=lens,
    )  # fmt: skip
    out = attention(q, k, v, mask, **options)
    if coarse is not None:
        out = add_coarse(out, coarse, gate, video.tile_volume, backend=options.get("backend"))
    out = out.transpose(1, 2) if layout == "bshd" else out
    out = video.from_tiles(out, TOKEN_DIM[layout])
    return (out, mask) if return_mask else out


def _to_tiles(x: Tensor, video: VideoLayout, layout: str) -> Tensor:
    """Raster order to padded tile order [B, H, S, D]; one token for all stays one."""
    if x.shape[TOKEN_DIM[layout]] > 1 or video.sequence_length == 1:
        x = video.to_tiles(x, TOKEN_DIM[layout])
    return x.transpose(1, 2) if layout == "bshd" else x


def compress_and_select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    scale: float,
    gate: Gate,
    backend: str | None = None,
    score_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(selected int32 [B, Hq, Nq, top_k], counts int32 [B, Hq, Nq], all top_k, if they are there,
    coarse [B, Hq, Nq, Dv] or None where the gate is 0).

    q [B, Hq, Nq*block_size, D], k and v likewise, padded blocks; lens int32 [B|1, N] or None.
    """
    no_coarse = isinstance(gate, float) and gate == 0
    room = sum([x.numel() * x.element_size() for x in (q, k, v)]) // 20
    ops = fused_block_ops(backend, q, k, v, q_lens, kv_lens)
    if ops is not None:
        sides = Side(block_size, q.shape[2], q_lens), Side(block_size, k.shape[2], kv_lens)
        values = None if no_coarse else v
        return rank(ops, RankCall(q, k, values, *sides, top_k, scale, score_dtype), room)
    # Autocast would round the scores to half precision.
    with (
        _without_autocast(q.device.type),
        torch.set_grad_enabled(torch.is_grad_enabled() and not no_coarse),
    ):
        q_mean = block_mean(q, q_lens, block_size, backend=backend)
        k_mean = block_mean(k, kv_lens, block_size, backend=backend)
        v_mean = None if no_coarse else block_mean(v, kv_lens, block_size, backend=backend)

        def select(scores: Tensor, heads: slice, keys: slice) -> Tensor:
            if score_dtype is not None:
                means = q_mean[:, heads].detach(), k_mean[:, keys].detach()
                scores = _rounded_scores(*means, scale, score_dtype)
            return select_top_k(scores, top_k, kv_lens, backend=backend)

        selected, coarse = rank_and_average(q_mean, k_mean, v_mean, kv_lens, scale, room, select)
        coarse = None if coarse is None else coarse.to(v.dtype)
    return selected, None, coarse


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def add_coarse(
    out: Tensor,
    coarse: Tensor,
    gate: Gate,
    block_size: int,
    lens: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """out + gate * coarse, each row of ``coarse`` [B, H, N, Dv] going to all tokens of its block.

    The blocks are the first N of ``out`` [B, H, S, Dv]; what follows is text. ``lens`` int32
    [B|1, N] are the valid tokens of each block: past them ``out`` is 0 and stays so. The coarse
    rows are broadcast, never repeated in memory. ``out`` is overwritten where no gradient needs
    it, in one pass, with and without ``lens``, but for gates of every token: a second one there.
    """
    blocks = coarse.shape[2]
    length = blocks * block_size
    weights = gate if isinstance(gate, Tensor) else None
    if may_be_overwritten(out) and not wants_gradient(coarse, weights):
        ops = fused_block_ops(backend, out, coarse, weights, lens)
        if ops is not None and (weights is None or 1 in (weights.shape[3], weights.stride(3))):
            assert ops.add_coarse is not None  # where there is one, there are both
            ops.add_coarse(
                out, coarse, 1.0 if gate is None else gate, Side(block_size, length, lens)
            )
            return out
    video, spread = out[:, :, :length].unflatten(2, (blocks, block_size)), coarse[:, :, :, None]
    weight = None
    if isinstance(gate, Tensor) and gate.shape[2] != 1:
        weight = gate[:, :, :length].unflatten(2, (blocks, block_size))
    elif gate is not None:
        spread = spread * (gate[:, :, :, None] if isinstance(gate, Tensor) else gate)
    padding = None if lens is None else _padding(lens, block_size)
    if may_be_overwritten(out):
        if weight is None and padding is not None:
            video.addcmul_(spread, padding.logical_not().to(video.dtype))
        elif weight is None:
            video.add_(spread)
        else:
            video.addcmul_(spread, weight)
            if padding is not None:
                video.masked_fill_(padding, 0)
        return out
    if weight is not None and padding is not None:
        weight = weight.masked_fill(padding, 0)
    video = video + spread if weight is None else torch.addcmul(video, spread, weight)
    if padding is not None:
        video = video.masked_fill(padding, 0)
    video = video.flatten(2, 3)
    return video if length == out.shape[2] else torch.cat([video, out[:, :, length:]], 2)


def _padding(lens: Tensor, block_size: int) -> Tensor:
    """bool [B|1, 1, N, V, 1]: True at the tokens past a block's valid ones."""
    position = torch.arange(block_size, dtype=torch.int32, device=lens.device)
    return (position >= lens[..., None])[:, None, :, :, None]


def check_gate(gate: object, shape: Sequence[int], like: Tensor, name: str = "gate") -> Gate:
    """None, a finite number as float, or a tensor of 4 dimensions that broadcasts to ``shape``.

    Raises:
        TypeError: another type or dtype. ValueError: another shape or device, or not finite.
    """
    if gate is None:
        return None
    if not isinstance(gate, Tensor):
        gate = check_number(name, gate, "None, a number or a Tensor")
        if not -math.inf < gate < math.inf:
            raise ValueError(f"{name} must be finite, got {gate}")
        return float(gate)
    if not gate.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {gate.dtype}")
    if gate.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}, got {gate.device}")
    sizes = (1,) * (len(shape) - gate.dim()) + tuple(gate.shape)
    if len(sizes) != len(shape) or not all(map(broadcasts, sizes, shape)):
        raise ValueError(
            f"{name} must broadcast to the output {tuple(shape)}, got shape {tuple(gate.shape)}"
        )
    return gate.reshape(sizes).to(like.dtype)


def _check_top_k(top_k: int | None, top_k_ratio: float | None, tiles: int) -> int:
    if (top_k is None) == (top_k_ratio is None):
        raise ValueError(
            f"top_k or top_k_ratio must be given, and not both; got {top_k!r} and {top_k_ratio!r}"
        )
    if top_k is None:
        return kept_blocks(cast(float, top_k_ratio), tiles)
    return check_count(top_k, tiles, "top_k")


def check_count(top_k: object, blocks: int, name: str) -> int:
    """``top_k`` if it is an int from 1 to ``blocks``.

    Raises:
        TypeError, ValueError: it is not.
    """
    count = check_int(name, top_k)
    if not 1 <= count <= blocks:
        raise ValueError(f"{name} must be 1 to {blocks}, the number of key blocks; got {count}")
    return count


def _rounded_scores(q_mean: Tensor, k_mean: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scores as a model in ``dtype`` makes them: each step in fp32, rounded to ``dtype``."""
    products = per_kv_head(q_mean.to(dtype).float(), k_mean.to(dtype).float().mT).to(dtype)
    return (products.float() * scale).to(dtype)


def check_score_dtype(score_dtype: object) -> None:
    """
    Raises:
        TypeError: it is neither None nor a dtype of half precision.
    """
    if score_dtype not in (None, torch.float16, torch.bfloat16):
        raise TypeError(
            f"score_dtype must be None, torch.bfloat16 or torch.float16, got {score_dtype!r}"
        )
