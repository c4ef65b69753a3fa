"""The definition, in plain torch: fp32 arithmetic, fp64 for fp64 inputs.

One query block at a time: gather the listed valid keys, softmax, multiply. Slow, honest, and really
sparse: keys that no list names are never read. It reads the lists on the host, so on a GPU it stops
the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..calls import BackwardCall, ForwardCall
from ..device import device_info
from ..quantize import fp8_dtype
from ..quantized_reference import quantized_attention_reference
from ..registry import Backend, Problem, register
from .reference_blocks import BLOCK_OPS

_DENSE_ROWS = 256  # query rows at a time without a mask: bounds the score matrix


class _Step(NamedTuple):
    """Valid query rows and the keys they see, for one (batch, head)."""

    batch: int
    head: int
    rows: Tensor  # int64 [R]
    keys: Tensor  # int64 [K]
    hidden: Tensor | None  # bool [R, K], causal only


def _available() -> str | None:
    return None


def _supports(problem: Problem) -> str | None:
    if problem.precision != "native" and problem.dtype == torch.float64:
        return "quantized precisions take float16, bfloat16 and float32, not float64"
    return None


def _forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    out, lse = call.empty_results()
    if call.precision != "native":
        values, lse = quantized_attention_reference(
            q, k, v, call.mask, precision=call.precision, options=call.quantization,
            scale=call.scale, is_causal=call.is_causal, fp8=fp8_dtype(device_info(q.device).arch),
        )  # fmt: skip
        return out.copy_(values), lse
    out.zero_()
    lse.fill_(-torch.inf)
    group = q.shape[1] // k.shape[1]
    for step in _steps(call):
        b, h = step.batch, step.head
        scores = _scores(q, k, step, call.scale, group)
        row_lse = scores.logsumexp(-1)
        weights = _weights(scores, row_lse)
        out[b, h, step.rows] = (weights @ v[b, h // group, step.keys].to(scores.dtype)).to(
            out.dtype
        )
        lse[b, h, step.rows] = row_lse
    return out, lse


def _backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, lse, scale = call.q, call.k, call.v, call.lse, call.scale
    wide = lse.dtype
    sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    dq, dk, dv = sums
    group = q.shape[1] // k.shape[1]
    for step in _steps(call):
        b, h, h_kv = step.batch, step.head, step.head // group
        rows, keys = step.rows, step.keys
        scores = _scores(q, k, step, scale, group)
        weights = _weights(scores, lse[b, h, rows])
        grad = call.grad_out[b, h, rows].to(wide)
        delta = (grad * call.out[b, h, rows].to(wide)).sum(-1)
        if call.grad_lse is not None:
            # lse depends on the scores by the same weights: d lse / d score = weight.
            delta = delta - torch.where(
                lse[b, h, rows].isneginf(), 0, call.grad_lse[b, h, rows].to(wide)
            )
        dv[b, h_kv, keys] += weights.mT @ grad
        dscores = weights * (grad @ v[b, h_kv, keys].to(wide).mT - delta[:, None]) * scale
        dq[b, h, rows] = dscores @ k[b, h_kv, keys].to(wide)
        dk[b, h_kv, keys] += dscores.mT @ q[b, h, rows].to(wide)
    dq, dk, dv = (x.copy_(total) for x, total in zip(call.empty_results(), sums, strict=True))
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, step: _Step, scale: float, group: int) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q[step.batch, step.head, step.rows].to(wide)
    keys = k[step.batch, step.head // group, step.keys].to(wide)
    scores = rows @ keys.mT * scale
    return scores if step.hidden is None else scores.masked_fill(step.hidden, -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """softmax, zero for a row that sees no key."""
    return torch.where(lse.isneginf()[:, None], 0, torch.exp(scores - lse[:, None]))


def _steps(call: ForwardCall | BackwardCall) -> Iterator[_Step]:
    q, k, mask = call.q, call.k, call.mask
    batches, heads = q.shape[:2]
    for b in range(batches):
        for h in range(heads):
            steps = _dense_rows(q, k, call.is_causal) if mask is None else _mask_rows(mask, b, h)
            for rows, keys, hidden in steps:
                yield _Step(b, h, rows, keys, hidden)


def _dense_rows(
    q: Tensor, k: Tensor, is_causal: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    q_len, kv_len = q.shape[2], k.shape[2]
    keys = torch.arange(kv_len, device=q.device)
    for start in range(0, q_len, _DENSE_ROWS):
        rows = torch.arange(start, min(start + _DENSE_ROWS, q_len), device=q.device)
        # Bottom-right aligned: the last query sees every key.
        hidden = keys[None, :] > rows[:, None] + (kv_len - q_len) if is_causal else None
        yield rows, keys, hidden


def _mask_rows(mask: BlockMask, b: int, h: int) -> Iterator[tuple[Tensor, Tensor, None]]:
    b_mask, h_mask = min(b, mask.kv_indices.shape[0] - 1), min(h, mask.kv_indices.shape[1] - 1)
    counts = mask.kv_num_blocks[b_mask, h_mask].tolist()
    q_lens, kv_lens = mask.q_lens(), mask.kv_lens()
    q_lens, kv_lens = q_lens[min(b, q_lens.shape[0] - 1)], kv_lens[min(b, kv_lens.shape[0] - 1)]
    in_slot = torch.arange(mask.kv_block_size, device=mask.device)
    for i, (count, q_n) in enumerate(zip(counts, q_lens.tolist(), strict=True)):
        listed = mask.kv_indices[b_mask, h_mask, i, :count].long()
        keys = (listed[:, None] * mask.kv_block_size + in_slot)[in_slot < kv_lens[listed][:, None]]
        if q_n > 0 and keys.numel() > 0:
            start = i * mask.q_block_size
            yield torch.arange(start, start + q_n, device=mask.device), keys, None


register(
    Backend(
        name="reference",
        priority=0,
        available=_available,
        supports=_supports,
        forward=_forward,
        backward=_backward,
        block_ops=BLOCK_OPS,
    )
)
