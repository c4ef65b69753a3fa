"""The functions of ``vsa``: q, k, v in padded blocks, valid tokens first, no layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ..attention import (
    OPTION_NAMES,
    Options,
    as_bhsd,
    attention,
    check_scale,
    check_shapes,
)
from ..checks import as_int, broadcasts, check_int
from ..patterns.video_sparse import selected_blocks_mask
from .vsa import add_coarse, check_count, check_gate, check_score_dtype, compress_and_select

if TYPE_CHECKING:
    from typing_extensions import Unpack

BlockSize = int | Sequence[int]


@overload
def video_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, variable_block_sizes: Tensor | None,
    topk: int, block_size: BlockSize = ..., compress_attn_weight: Tensor | float | None = ...,
    *, layout: str = ..., score_dtype: torch.dtype | None = ..., **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def video_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, variable_block_sizes: Tensor | None,
    q_variable_block_sizes: Tensor | None, topk: int, block_size: BlockSize = ...,
    compress_attn_weight: Tensor | float | None = ...,
    *, layout: str = ..., score_dtype: torch.dtype | None = ..., **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor | None,
    *arguments: Any,
    layout: str = "bhsd",
    score_dtype: torch.dtype | None = None,
    **keywords: Any,
) -> Tensor:
    """Video sparse attention over padded blocks: sparse branch plus gated coarse branch.

    Both call forms in use are accepted, by position and by keyword. A fifth positional argument
    that is an int is ``topk``; a tensor (or None) is ``q_variable_block_sizes``::

        video_sparse_attn(q, k, v, variable_block_sizes, topk, block_size, compress_attn_weight)
        video_sparse_attn(q, k, v, variable_block_sizes, q_variable_block_sizes, topk, block_size,
                          compress_attn_weight)

    See :mod:`video_attn.functional.vsa` for the definition. Padding may hold anything: it
    counts for nothing, and the output there is 0.

    Args:
        q: [B, Hq, Nq * V, D]. k: [B, Hkv, Nk * V, D]. v: [B, Hkv, Nk * V, Dv]; V = ``block_size``.
        variable_block_sizes: valid tokens of each key block, integer [Nk] or [B, Nk], each 0 to V;
            None: all full. On a GPU the values cannot be checked without stopping the stream; there
            they count as if limited to that range.
        q_variable_block_sizes: the same for query blocks; default ``variable_block_sizes``, which
            then must have Nq entries.
        topk: key blocks that each query block sees, 1 to Nk.
        block_size: V as a number of tokens, or a tile (t, h, w) of V = t*h*w tokens; default 64.
        compress_attn_weight: weight of the coarse branch: None adds it as it is; a number, or a
            floating-point tensor that broadcasts to the output.
        layout: "bhsd", or "bshd" for q, k, v, a weight tensor and output [B, S, H, D].
        score_dtype: as in :func:`video_attn.video_sparse`: torch.bfloat16 ranks blocks as public
            models were trained.
        scale, precision, backend, deterministic, quantization: as in
            :func:`video_attn.attention`; ``scale`` holds for both branches.

    Returns:
        [B, Hq, Nq * V, Dv] (or as ``layout`` says) in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    given, options = _bind(arguments, keywords)
    q, k, v = as_bhsd(layout, q=q, k=k, v=v)
    check_shapes(q, k, v)
    check_score_dtype(score_dtype)
    size = tokens_of_block(given["block_size"])
    nq, nk = num_blocks("q", q.shape[2], size), num_blocks("k", k.shape[2], size)
    top_k = check_count(given["topk"], nk, "topk")
    gate = given["compress_attn_weight"]
    if layout == "bshd" and isinstance(gate, Tensor) and gate.dim() >= 3:
        gate = gate.transpose(-3, -2)
    gate = check_gate(gate, (*q.shape[:3], v.shape[3]), q, "compress_attn_weight")
    kv_lens = block_lens("variable_block_sizes", variable_block_sizes, k, nk, size)
    if given["q_variable_block_sizes"] is None:
        q_lens = kv_lens
        if variable_block_sizes is not None and nq != nk:
            raise ValueError(
                f"q_variable_block_sizes must be given: q has {nq} blocks and k has {nk}"
            )
    else:
        q_lens = block_lens("q_variable_block_sizes", given["q_variable_block_sizes"], q, nq, size)
    options["scale"] = check_scale(options.get("scale"), q.shape[3])
    selected, counts, coarse = compress_and_select(
        q, k, v, q_lens, kv_lens, block_size=size, top_k=top_k, scale=options["scale"], gate=gate,
        backend=options.get("backend"), score_dtype=score_dtype,
    )  # fmt: skip
    mask = selected_blocks_mask(selected, counts, size, q.shape[2], k.shape[2], q_lens, kv_lens)
    out = attention(q, k, v, mask, **options)
    if coarse is not None:
        out = add_coarse(out, coarse, gate, size, q_lens, backend=options.get("backend"))
    return out.transpose(1, 2) if layout == "bshd" else out


def _bind(
    arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments after ``variable_block_sizes`` by name, whichever call form was used; and the
    options of :func:`video_attn.attention`.
    """
    options = {name: keywords.pop(name) for name in OPTION_NAMES if name in keywords}
    names = ["topk", "block_size", "compress_attn_weight"]
    if arguments and (arguments[0] is None or isinstance(arguments[0], Tensor)):
        names.insert(0, "q_variable_block_sizes")
    if len(arguments) > len(names):
        raise TypeError(
            f"video_sparse_attn takes at most {4 + len(names)} positional arguments here, got "
            f"{4 + len(arguments)}"
        )
    given = dict(zip(names, arguments, strict=False))
    for name, value in keywords.items():
        if name not in (*names, "q_variable_block_sizes"):
            raise TypeError(f"video_sparse_attn got an unexpected keyword argument {name!r}")
        if name in given:
            raise TypeError(f"video_sparse_attn got two values for argument {name!r}")
        given[name] = value
    if "topk" not in given:
        raise TypeError("video_sparse_attn is missing the argument 'topk'")
    defaults = {"q_variable_block_sizes": None, "block_size": 64, "compress_attn_weight": None}
    return {**defaults, **given}, options


def tokens_of_block(block_size: object) -> int:
    parts = block_size if as_int(block_size) is None else (block_size,)
    if not isinstance(parts, Sequence) or isinstance(parts, str) or len(parts) not in (1, 3):
        raise TypeError(
            f"block_size must be a number of tokens or a tile (t, h, w), got {block_size!r}"
        )
    return math.prod([check_int("block_size", part, 1) for part in parts])


def num_blocks(name: str, tokens: int, size: int) -> int:
    if tokens == 0 or tokens % size:
        raise ValueError(
            f"{name} must have a multiple of block_size {size} tokens (padded blocks), got {tokens}"
        )
    return tokens // size


def check_integers(name: str, x: object, dims: int | tuple[int, ...], like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.dim() not in ((dims,) if isinstance(dims, int) else dims):
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}, got {x.device}")


def values_can_be_read(x: Tensor) -> bool:
    """On a GPU a look at the values would stop the stream; while tracing there are none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def block_lens(
    name: str, sizes: Tensor | None, like: Tensor, blocks: int, size: int
) -> Tensor | None:
    """Valid tokens as a mask wants them: int32 [B|1, blocks]."""
    if sizes is None:
        return None
    check_integers(name, sizes, (1, 2), like)
    if sizes.shape[-1] != blocks or (
        sizes.dim() == 2 and not broadcasts(sizes.shape[0], like.shape[0])
    ):
        raise ValueError(
            f"{name} must be [{blocks}] or [{like.shape[0]}, {blocks}], one per block; got "
            f"{tuple(sizes.shape)}"
        )
    if values_can_be_read(sizes) and bool(((sizes < 0) | (sizes > size)).any()):
        raise ValueError(
            f"{name} must hold 0 to {size}, the tokens of a block; got {int(sizes.min())} to "
            f"{int(sizes.max())}"
        )
    sizes = sizes.to(torch.int32).clamp(0, size)
    return sizes[None] if sizes.dim() == 1 else sizes
