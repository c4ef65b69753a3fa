"""The functions of ``vsa``: q, k, v in padded blocks, valid tokens first, no layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..attention import as_bhsd, attention, check_shapes
from ..block_mask import BlockMask
from ..checks import as_int, check_int, may_be_overwritten
from .vsa import add_coarse, check_count, check_gate, compress_and_select

BlockSize = int | Sequence[int]


@overload
def video_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, variable_block_sizes: Tensor | None,
    topk: int, block_size: BlockSize = ..., compress_attn_weight: Tensor | float | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def video_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, variable_block_sizes: Tensor | None,
    q_variable_block_sizes: Tensor | None, topk: int, block_size: BlockSize = ...,
    compress_attn_weight: Tensor | float | None = ...,
) -> Tensor: ...  # fmt: skip
def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor | None,
    *arguments: Any,
    **keywords: Any,
) -> Tensor:
    """Video sparse attention over padded blocks: sparse branch plus gated coarse branch.

    Both call forms in use are accepted, by position and by keyword. A fifth positional argument
    that is an int is ``topk``; a tensor (or None) is ``q_variable_block_sizes``::

        video_sparse_attn(q, k, v, variable_block_sizes, topk, block_size, compress_attn_weight)
        video_sparse_attn(q, k, v, variable_block_sizes, q_variable_block_sizes, topk, block_size,
                          compress_attn_weight)

    See :mod:`video_attn.functional.vsa` for the definition. Padding may hold anything: it
    is never read, and the output there is 0.

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

    Returns:
        [B, Hq, Nq * V, Dv] in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    given = _bind(arguments, keywords)
    check_shapes(*as_bhsd("bhsd", q=q, k=k, v=v))
    size = _block_size(given["block_size"])
    nq, nk = _num_blocks("q", q.shape[2], size), _num_blocks("k", k.shape[2], size)
    top_k = check_count(given["topk"], nk, "topk")
    gate = check_gate(
        given["compress_attn_weight"], (*q.shape[:3], v.shape[3]), q, "compress_attn_weight"
    )
    kv_lens = _lens("variable_block_sizes", variable_block_sizes, k, nk, size)
    if given["q_variable_block_sizes"] is None:
        q_lens = kv_lens
        if variable_block_sizes is not None and nq != nk:
            raise ValueError(
                f"q_variable_block_sizes must be given: q has {nq} blocks and k has {nk}"
            )
    else:
        q_lens = _lens("q_variable_block_sizes", given["q_variable_block_sizes"], q, nq, size)
    padding = None if q_lens is None else _padding(q_lens, size)
    if padding is not None and isinstance(gate, Tensor) and gate.shape[2] != 1:
        gate = gate.masked_fill(padding, 0)
    scale = 1 / math.sqrt(q.shape[3])
    selected, coarse = compress_and_select(
        q, k, v, q_lens, kv_lens, block_size=size, top_k=top_k, scale=scale, gate=gate
    )
    mask = BlockMask.from_indices(
        selected, size, size, q_len=q.shape[2], kv_len=k.shape[2],
        q_block_lens=q_lens, kv_block_lens=kv_lens,
    )  # fmt: skip
    out = attention(q, k, v, mask, scale=scale)
    if coarse is None:
        return out
    out = add_coarse(out, coarse, gate, size)
    if padding is None:
        return out
    return out.masked_fill_(padding, 0) if may_be_overwritten(out) else out.masked_fill(padding, 0)


def block_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, variable_block_sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Exact attention over the blocks that ``block_map`` keeps. Differentiable.

    Args:
        q: [B, Hq, Sq, D]. k: [B, Hkv, Sk, D]. v: [B, Hkv, Sk, Dv]; Sq a multiple of Nq, Sk of Nk.
        block_map: bool [B|1, Hq|1, Nq, Nk], True where the key block is seen.
        variable_block_sizes: as in :func:`video_sparse_attn`.

    Returns:
        (out [B, Hq, Sq, Dv] in the dtype of q, lse fp32 [B, Hq, Sq], natural logarithm). A query
        block that keeps no key block: out 0, lse -inf, gradients 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_shapes(*as_bhsd("bhsd", q=q, k=k, v=v))
    if not isinstance(block_map, Tensor) or block_map.dtype != torch.bool:
        raise TypeError(
            f"block_map must be a bool tensor, got {getattr(block_map, 'dtype', type(block_map))}"
        )
    if block_map.dim() != 4 or 0 in block_map.shape:
        raise ValueError(f"block_map must be [B|1, H|1, Nq, Nk], got {tuple(block_map.shape)}")
    _check_batch_and_heads("block_map", block_map, q)
    nq, nk = block_map.shape[2:]
    q_size, kv_size = _size_of("q", q, nq, "block_map"), _size_of("k", k, nk, "block_map")
    lens = _lens("variable_block_sizes", variable_block_sizes, k, nk, kv_size)
    mask = BlockMask.from_dense(block_map, q_size, kv_size, kv_block_lens=lens)
    return attention(q, k, v, mask, return_lse=True)


def block_sparse_attn_from_indices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    variable_block_sizes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Exact attention over listed key blocks: :func:`block_sparse_attn` without the block matrix.

    Args:
        q2k_idx: integer [B|1, Hq|1, Nq, K], key blocks of each query block in any order, each at
            most once; what lies past ``q2k_num`` is never looked at.
        q2k_num: integer [B|1, Hq|1, Nq], length of each list.
        q, k, v, variable_block_sizes: as in :func:`block_sparse_attn`; the key block size is Sk
            over the entries of ``variable_block_sizes``, or without them the query block size.

    Returns:
        (out, lse) as :func:`block_sparse_attn`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
            Entries out of range are found on the CPU; on a GPU they are left out.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_shapes(*as_bhsd("bhsd", q=q, k=k, v=v))
    _check_integers("q2k_idx", q2k_idx, 4, q)
    _check_integers("q2k_num", q2k_num, 3, q)
    if q2k_num.shape != q2k_idx.shape[:3] or 0 in q2k_idx.shape:
        raise ValueError(
            f"q2k_num must be [B|1, H|1, Nq] like q2k_idx {tuple(q2k_idx.shape)} without its last "
            f"dimension, got {tuple(q2k_num.shape)}"
        )
    _check_batch_and_heads("q2k_idx", q2k_idx, q)
    q_size = _size_of("q", q, q2k_idx.shape[2], "q2k_idx")
    if variable_block_sizes is None:
        nk = _num_blocks("k", k.shape[2], q_size)
    else:
        _check_integers("variable_block_sizes", variable_block_sizes, (1, 2), q)
        nk = variable_block_sizes.shape[-1]
    kv_size = _size_of("k", k, nk, "variable_block_sizes")
    lens = _lens("variable_block_sizes", variable_block_sizes, k, nk, kv_size)
    counts, indices = _ascending_lists(q2k_num, q2k_idx, nk)
    mask = BlockMask.from_indices(
        indices, q_size, kv_size, q_len=q.shape[2], kv_len=k.shape[2],
        kv_num_blocks=counts, kv_block_lens=lens,
    )  # fmt: skip
    return attention(q, k, v, mask, return_lse=True)


def _bind(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments after ``variable_block_sizes`` by name, whichever call form was used."""
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
    return {**defaults, **given}


def _block_size(block_size: object) -> int:
    parts = block_size if as_int(block_size) is None else (block_size,)
    if not isinstance(parts, Sequence) or isinstance(parts, str) or len(parts) not in (1, 3):
        raise TypeError(
            f"block_size must be a number of tokens or a tile (t, h, w), got {block_size!r}"
        )
    return math.prod([check_int("block_size", part, 1) for part in parts])


def _num_blocks(name: str, tokens: int, size: int) -> int:
    if tokens == 0 or tokens % size:
        raise ValueError(
            f"{name} must have a multiple of block_size {size} tokens (padded blocks), got {tokens}"
        )
    return tokens // size


def _size_of(name: str, x: Tensor, blocks: int, source: str) -> int:
    if x.shape[2] == 0 or x.shape[2] % blocks:
        raise ValueError(
            f"{name} must have a multiple of {blocks} tokens, the blocks of {source}; got "
            f"{x.shape[2]}"
        )
    return x.shape[2] // blocks


def _check_integers(name: str, x: object, dims: int | tuple[int, ...], like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.dim() not in ((dims,) if isinstance(dims, int) else dims):
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}, got {x.device}")


def _check_batch_and_heads(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if x.shape[0] not in (1, q.shape[0]) or x.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"{name} must have batch 1 or {q.shape[0]} and 1 or {q.shape[1]} heads, got "
            f"{x.shape[0]} and {x.shape[1]}"
        )


def _values_can_be_read(x: Tensor) -> bool:
    """On a GPU a look at the values would stop the stream; while tracing there are none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _lens(name: str, sizes: Tensor | None, like: Tensor, blocks: int, size: int) -> Tensor | None:
    """Valid tokens as a mask wants them: int32 [B|1, blocks]."""
    if sizes is None:
        return None
    _check_integers(name, sizes, (1, 2), like)
    if sizes.shape[-1] != blocks or (sizes.dim() == 2 and sizes.shape[0] not in (1, like.shape[0])):
        raise ValueError(
            f"{name} must be [{blocks}] or [{like.shape[0]}, {blocks}], one per block; got "
            f"{tuple(sizes.shape)}"
        )
    if _values_can_be_read(sizes) and bool(((sizes < 0) | (sizes > size)).any()):
        raise ValueError(
            f"{name} must hold 0 to {size}, the tokens of a block; got {int(sizes.min())} to "
            f"{int(sizes.max())}"
        )
    sizes = sizes.to(torch.int32).clamp(0, size)
    return sizes[None] if sizes.dim() == 1 else sizes


def _padding(lens: Tensor, size: int) -> Tensor:
    """bool [B|1, 1, N * size, 1]: True at the tokens past a block's valid ones."""
    position = torch.arange(size, dtype=torch.int32, device=lens.device)
    return (position >= lens[..., None]).flatten(1)[:, None, :, None]


def _ascending_lists(counts: Tensor, indices: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """int32 (counts, ascending lists), without entries that name no block."""
    position = torch.arange(indices.shape[-1], device=indices.device)
    listed = position < counts[..., None]
    named = listed & (indices >= 0) & (indices < blocks)
    ascending = torch.where(named, indices, blocks).to(torch.int32).sort(-1).values
    if _values_can_be_read(indices):
        if bool((listed & ~named).any()):
            raise ValueError(f"q2k_idx must hold key blocks 0 to {blocks - 1} within q2k_num")
        twice = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] < blocks)
        if bool(twice.any()):
            raise ValueError("q2k_idx must name a key block at most once per query block")
        if bool(((counts < 0) | (counts > indices.shape[-1])).any()):
            raise ValueError(f"q2k_num must hold 0 to {indices.shape[-1]}, the length of the lists")
    ascending = ascending.masked_fill_(ascending == blocks, 0)
    return named.sum(-1, dtype=torch.int32), ascending
