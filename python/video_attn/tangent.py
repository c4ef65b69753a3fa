"""The derivative of attention along given tangents of q, k and v: forward-mode differentiation.

A second pass over the lists, in plain torch on every device, whichever backend ran the first one.
With S = scale * q k^T over the pairs that count, P = exp(S - lse) and tangents marked by ':

    S' = scale * (q' k^T + q k'^T)      lse' = rowsum(P S')      out' = P (S' - lse') v + P v'

Everything in fp32 (fp64 for fp64 inputs); some query blocks at a time, with the keys of their lists
side by side. Reads no value on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .block_mask import BlockMask
from .calls import empty_like_heads, empty_lse

_PAIRS = 1 << 24  # scores in memory at a time
_DENSE_ROWS = 256


@dataclass(frozen=True, eq=False, slots=True)
class TangentCall:
    """One forward-mode pass: tangents of q, k, v (None: zero), and the forward pass they belong to.

    The fields are those of :class:`~video_attn.calls.BackwardCall`.
    """

    tangent_q: Tensor | None
    tangent_k: Tensor | None
    tangent_v: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    mask: BlockMask | None
    scale: float
    is_causal: bool = False


def attention_tangent(call: TangentCall) -> tuple[Tensor, Tensor]:
    """(tangent of out [B, Hq, Sq, Dv] in the dtype of q, tangent of lse [B, Hq, Sq])."""
    out, lse = empty_like_heads(call.q, call.v.shape[3]).zero_(), empty_lse(call.q).zero_()
    group = call.q.shape[1] // max(1, call.k.shape[1])
    if 0 in (*call.q.shape[:3], call.k.shape[2]):
        return out, lse
    for b in range(call.q.shape[0]):
        for h in range(call.q.shape[1]):
            for part in _parts(call, b, h):
                part_out, part_lse = _tangent_of(call, part, b, h, h // group)
                rows = part.rows.flatten()
                # Rows of padding stand at the row of a valid token or past it: they add zero.
                out[b, h].index_add_(0, rows, part_out.flatten(0, 1).to(out.dtype))
                lse[b, h].index_add_(0, rows, part_lse.flatten())
    return out, lse


class _Part(NamedTuple):
    """Some query blocks of one head, n of R rows each, and the M keys that each of them sees."""

    rows: Tensor  # int64 [n, R]
    row_counts: Tensor  # bool [n, R]
    keys: Tensor  # int64 [n or 1, M]
    key_counts: Tensor  # bool [n or 1, M]
    hidden: Tensor | None  # bool [n, R, M], causal only


def _tangent_of(call: TangentCall, part: _Part, b: int, h: int, h_kv: int) -> tuple[Tensor, Tensor]:
    wide = call.lse.dtype

    def rows_of(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return torch.where(part.row_counts[..., None], x[b, h][part.rows].to(wide), 0)

    def keys_of(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return torch.where(part.key_counts[..., None], x[b, h_kv][part.keys].to(wide), 0)

    q, k, v = rows_of(call.q), keys_of(call.k), keys_of(call.v)
    assert q is not None and k is not None and v is not None
    lse = call.lse[b, h][part.rows]
    pairs = (part.row_counts & (lse != -torch.inf))[..., None] & part.key_counts[:, None, :]
    if part.hidden is not None:
        pairs = pairs & ~part.hidden
    p = torch.where(pairs, torch.exp(q @ k.mT * call.scale - lse[..., None]), 0)
    slope = torch.zeros_like(p)
    tangent_q, tangent_k = rows_of(call.tangent_q), keys_of(call.tangent_k)
    if tangent_q is not None:
        slope = slope + tangent_q @ k.mT * call.scale
    if tangent_k is not None:
        slope = slope + q @ tangent_k.mT * call.scale
    slope = torch.where(pairs, slope, 0)
    lse_slope = (p * slope).sum(-1)
    out = (p * (slope - lse_slope[..., None])) @ v
    tangent_v = keys_of(call.tangent_v)
    return (out if tangent_v is None else out + p @ tangent_v), lse_slope


def _parts(call: TangentCall, b: int, h: int) -> Iterator[_Part]:
    if call.mask is None:
        return _dense_parts(call)
    return _listed_parts(call.mask, b, h)


def _dense_parts(call: TangentCall) -> Iterator[_Part]:
    q_len, kv_len, device = call.q.shape[2], call.k.shape[2], call.q.device
    keys = torch.arange(kv_len, device=device)[None]
    for start in range(0, q_len, _DENSE_ROWS):
        rows = torch.arange(start, min(start + _DENSE_ROWS, q_len), device=device)[None]
        # Bottom-right aligned: the last query sees every key.
        hidden = keys[:, None, :] > rows[..., None] + (kv_len - q_len) if call.is_causal else None
        yield _Part(rows, torch.ones_like(rows, dtype=torch.bool), keys, keys >= 0, hidden)


def _listed_parts(mask: BlockMask, b: int, h: int) -> Iterator[_Part]:
    b_list, h_list = min(b, mask.kv_indices.shape[0] - 1), min(h, mask.kv_indices.shape[1] - 1)
    counts, indices = mask.kv_num_blocks[b_list, h_list], mask.kv_indices[b_list, h_list]
    q_lens, kv_lens = mask.q_lens(), mask.kv_lens()
    q_lens, kv_lens = q_lens[min(b, q_lens.shape[0] - 1)], kv_lens[min(b, kv_lens.shape[0] - 1)]
    in_row, in_column, entry = (
        torch.arange(n, device=mask.device)
        for n in (mask.q_block_size, mask.kv_block_size, indices.shape[-1])
    )
    step = max(1, _PAIRS // (mask.q_block_size * mask.kv_block_size * indices.shape[-1]))
    for start in range(0, mask.num_q_blocks, step):
        blocks = torch.arange(start, min(start + step, mask.num_q_blocks), device=mask.device)
        rows = blocks[:, None] * mask.q_block_size + in_row
        listed = entry < counts[blocks, None]
        # What stands past a count may be anything.
        columns = torch.where(listed, indices[blocks], 0).long()
        keys = columns[..., None] * mask.kv_block_size + in_column
        valid = listed[..., None] & (in_column < kv_lens[columns][..., None])
        yield _Part(
            rows.clamp(max=mask.q_len - 1),
            in_row < q_lens[blocks, None],
            keys.flatten(1).clamp(max=mask.kv_len - 1),
            valid.flatten(1),
            None,
        )
