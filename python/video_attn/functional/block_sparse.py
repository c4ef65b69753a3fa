"""Attention over given blocks, as ``vsa`` has it: a block matrix, lists, packed sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import Options, as_bhsd, attention, check_options, check_shapes
from ..block_mask import BlockMask
from ..checks import broadcasts
from .vsa_padded import (
    BlockSize,
    block_lens,
    check_integers,
    num_blocks,
    tokens_of_block,
    values_can_be_read,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    variable_block_sizes: Tensor | None,
    *,
    layout: str = "bhsd",
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """Exact attention over the blocks that ``block_map`` keeps. Differentiable.

    Args:
        q: [B, Hq, Sq, D]. k: [B, Hkv, Sk, D]. v: [B, Hkv, Sk, Dv]; Sq a multiple of Nq, Sk of Nk.
        block_map: bool [B|1, Hq|1, Nq, Nk], or [Hq|1, Nq, Nk] for all batch items: True where the
            key block is seen.
        variable_block_sizes: as in :func:`video_sparse_attn`.
        layout: "bhsd", or "bshd" for q, k, v and out [B, S, H, D].
        scale, precision, backend, deterministic, quantization: as in :func:`video_attn.attention`.

    Returns:
        (out [B, Hq, Sq, Dv] in the dtype of q, lse fp32 [B, Hq, Sq], natural logarithm). A query
        block that keeps no key block: out 0, lse -inf, gradients 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_options("block_sparse_attn", options)
    q, k, v = as_bhsd(layout, q=q, k=k, v=v)
    check_shapes(q, k, v)
    if not isinstance(block_map, Tensor) or block_map.dtype != torch.bool:
        raise TypeError(
            f"block_map must be a bool tensor, got {getattr(block_map, 'dtype', type(block_map))}"
        )
    if block_map.dim() not in (3, 4) or 0 in block_map.shape:
        raise ValueError(
            f"block_map must be [B|1, H|1, Nq, Nk] or [H|1, Nq, Nk], got {tuple(block_map.shape)}"
        )
    block_map = block_map[None] if block_map.dim() == 3 else block_map
    _check_batch_and_heads("block_map", block_map, q)
    nq, nk = block_map.shape[2:]
    q_size, kv_size = _size_of("q", q, nq, "block_map"), _size_of("k", k, nk, "block_map")
    lens = block_lens("variable_block_sizes", variable_block_sizes, k, nk, kv_size)
    mask = BlockMask.from_dense(block_map, q_size, kv_size, kv_block_lens=lens)
    return _attend(q, k, v, mask, layout, options)


def block_sparse_attn_from_indices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    variable_block_sizes: Tensor | None,
    *,
    layout: str = "bhsd",
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """Exact attention over listed key blocks: :func:`block_sparse_attn` without the block matrix.

    Args:
        q2k_idx: integer [B|1, Hq|1, Nq, K], key blocks of each query block in any order, each at
            most once; what lies past ``q2k_num`` is never looked at.
        q2k_num: integer [B|1, Hq|1, Nq], length of each list.
        q, k, v, variable_block_sizes, layout, options: as in :func:`block_sparse_attn`; the key
            block size is Sk over the entries of ``variable_block_sizes``, or without them the query
            block size.

    Returns:
        (out, lse) as :func:`block_sparse_attn`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
            Entries out of range are found on the CPU; on a GPU they are left out.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_options("block_sparse_attn_from_indices", options)
    q, k, v = as_bhsd(layout, q=q, k=k, v=v)
    check_shapes(q, k, v)
    _check_lists(q2k_idx, q2k_num, q)
    _check_batch_and_heads("q2k_idx", q2k_idx, q)
    q_size = _size_of("q", q, q2k_idx.shape[2], "q2k_idx")
    if variable_block_sizes is None:
        nk = num_blocks("k", k.shape[2], q_size)
    else:
        check_integers("variable_block_sizes", variable_block_sizes, (1, 2), q)
        nk = variable_block_sizes.shape[-1]
    kv_size = _size_of("k", k, nk, "variable_block_sizes")
    lens = block_lens("variable_block_sizes", variable_block_sizes, k, nk, kv_size)
    counts, indices = _ascending_lists(q2k_num, q2k_idx, nk)
    mask = BlockMask.from_indices(
        indices, q_size, kv_size, q_len=q.shape[2], kv_len=k.shape[2],
        kv_num_blocks=counts, kv_block_lens=lens,
    )  # fmt: skip
    return _attend(q, k, v, mask, layout, options)


def block_sparse_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: BlockSize = 64,
    variable_block_sizes: Tensor | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """:func:`block_sparse_attn_from_indices` over packed sequences, one after the other.

    One launch for all of them, and nothing is read on the host. Every sequence takes whole blocks:
    its start is a multiple of V, and a last block that is not full is said by
    ``variable_block_sizes``.

    Args:
        q: [Tq, Hq, D]. k: [Tk, Hkv, D]. v: [Tk, Hkv, Dv]; the tokens of all sequences, Tq = Nq * V
            and Tk = Nk * V.
        q2k_idx: integer [Hq|1, Nq, K], for each of all Nq query blocks the key blocks that it sees,
            counted from the first of its own sequence, in any order, each at most once.
        q2k_num: integer [Hq|1, Nq], length of each list.
        cu_seqlens_q, cu_seqlens_k: where the sequences start, and the end: [0, ..., Tq] and
            [0, ..., Tk], integer [sequences + 1] on the device of q, multiples of V. On a GPU they
            cannot be checked; starts in between are rounded down there.
        block_size: V as a number of tokens, or a tile (t, h, w) of V = t*h*w tokens.
        variable_block_sizes: valid tokens of each of the Nk key blocks, integer [Nk]; None: all.
        scale, precision, backend, deterministic, quantization: as in :func:`video_attn.attention`.

    Returns:
        (out [Tq, Hq, Dv] in the dtype of q, lse fp32 [Hq, Tq], natural logarithm).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
            Entries past the end of a sequence are found on the CPU; on a GPU they are left out.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_options("block_sparse_attn_varlen", options)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, D], got shape {tuple(x.shape)}")
    q, k, v = as_bhsd("bshd", q=q[None], k=k[None], v=v[None])
    check_shapes(q, k, v)
    size = tokens_of_block(block_size)
    nq, nk = num_blocks("q", q.shape[2], size), num_blocks("k", k.shape[2], size)
    check_integers("q2k_idx", q2k_idx, 3, q)
    check_integers("q2k_num", q2k_num, 2, q)
    q2k_idx, q2k_num = q2k_idx[None], q2k_num[None]
    _check_lists(q2k_idx, q2k_num, q)
    _check_batch_and_heads("q2k_idx", q2k_idx, q)
    if q2k_idx.shape[2] != nq:
        raise ValueError(
            f"q2k_idx must have a list for each of {nq} blocks, got {q2k_idx.shape[2]}"
        )
    first, end = _blocks_of_sequences(cu_seqlens_q, cu_seqlens_k, nq, nk, size, q)
    counts, indices = _ascending_lists(q2k_num, q2k_idx, end - first, first)
    lens = block_lens("variable_block_sizes", variable_block_sizes, k, nk, size)
    mask = BlockMask.from_indices(
        indices, size, size, q_len=q.shape[2], kv_len=k.shape[2],
        kv_num_blocks=counts, kv_block_lens=lens,
    )  # fmt: skip
    out, lse = _attend(q, k, v, mask, "bshd", options)
    return out[0], lse[0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, layout: str, options: Options
) -> tuple[Tensor, Tensor]:
    out, lse = attention(q, k, v, mask, return_lse=True, **options)
    return (out.transpose(1, 2) if layout == "bshd" else out), lse


def _blocks_of_sequences(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, nq: int, nk: int, size: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """For every query block the first key block of its sequence, and the one after the last."""
    starts = []
    for side, cu_seqlens, blocks in (("q", cu_seqlens_q, nq), ("k", cu_seqlens_k, nk)):
        name = f"cu_seqlens_{side}"
        check_integers(name, cu_seqlens, 1, like)
        if cu_seqlens.shape[0] < 2 or cu_seqlens.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name} must be [sequences + 1], the same for q and k, got shape "
                f"{tuple(cu_seqlens.shape)}"
            )
        if values_can_be_read(cu_seqlens):
            values = cu_seqlens.tolist()
            whole = all(value % size == 0 for value in values)
            if values != sorted(values) or not whole or values[::-1][0] != blocks * size:
                raise ValueError(
                    f"{name} must ascend from 0 to the {blocks * size} tokens of {side} in "
                    f"multiples of {size}, got {values}"
                )
        starts.append(torch.div(cu_seqlens, size, rounding_mode="floor"))
    block = torch.arange(nq, dtype=starts[0].dtype, device=like.device)
    sequence = torch.searchsorted(starts[0][1:].contiguous(), block, right=True)
    sequence = sequence.clamp(max=starts[0].shape[0] - 2)
    return starts[1][sequence].to(torch.int32), starts[1][sequence + 1].to(torch.int32)


def _size_of(name: str, x: Tensor, blocks: int, source: str) -> int:
    if x.shape[2] == 0 or x.shape[2] % blocks:
        raise ValueError(
            f"{name} must have a multiple of {blocks} tokens, the blocks of {source}; got "
            f"{x.shape[2]}"
        )
    return x.shape[2] // blocks


def _check_batch_and_heads(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if not (broadcasts(x.shape[0], q.shape[0]) and broadcasts(x.shape[1], q.shape[1])):
        raise ValueError(
            f"{name} must have batch 1 or {q.shape[0]} and 1 or {q.shape[1]} heads, got "
            f"{x.shape[0]} and {x.shape[1]}"
        )


def _check_lists(q2k_idx: Tensor, q2k_num: Tensor, like: Tensor) -> None:
    check_integers("q2k_idx", q2k_idx, 4, like)
    check_integers("q2k_num", q2k_num, 3, like)
    if q2k_num.shape != q2k_idx.shape[:3] or 0 in q2k_idx.shape:
        raise ValueError(
            f"q2k_num must have the shape of q2k_idx {tuple(q2k_idx.shape)} without its last "
            f"dimension, got {tuple(q2k_num.shape)}"
        )


def _ascending_lists(
    counts: Tensor, indices: Tensor, blocks: int | Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """int32 (counts, ascending lists), without entries that name no block.

    ``blocks``: how many there are, or int32 [Nq] for every list. ``first`` int32 [Nq]: what is
    added to the entries of a list.
    """
    position = torch.arange(indices.shape[-1], device=indices.device)
    listed = position < counts[..., None]
    limit = blocks[:, None] if isinstance(blocks, Tensor) else blocks
    named = listed & (indices >= 0) & (indices < limit)
    largest = torch.iinfo(torch.int32).max
    ascending = torch.where(named, indices, largest).to(torch.int32).sort(-1).values
    if values_can_be_read(indices):
        if bool((listed & ~named).any()):
            most = int(limit.max()) if isinstance(limit, Tensor) else limit
            raise ValueError(f"q2k_idx must hold key blocks 0 to {most - 1} within q2k_num")
        twice = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] < largest)
        if bool(twice.any()):
            raise ValueError("q2k_idx must name a key block at most once per query block")
        if bool(((counts < 0) | (counts > indices.shape[-1])).any()):
            raise ValueError(f"q2k_num must hold 0 to {indices.shape[-1]}, the length of the lists")
    if first is not None:
        ascending = torch.where(ascending == largest, largest, ascending + first[:, None])
    ascending = ascending.masked_fill_(ascending == largest, 0)
    return named.sum(-1, dtype=torch.int32), ascending
