"""How far each candidate is from dense attention, head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...functional.video_tokens import VideoTokens
from .candidates import Candidate

CHUNK_BYTES = 256 << 20  # of fp32 scores at a time


def head_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: VideoTokens,
    candidates: Sequence[Candidate],
    *,
    scale: float | None = None,
    backend: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Relative L2 error of every head with every candidate, against dense attention in fp32.

    One head is looked at at a time, so that beside its inputs this takes less than 1 GB.

    Args:
        query: [B, Hq, S, D]. key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv]; on the device to use.
        scale: of the scores, None for 1/sqrt(D).
        progress: called after every head and candidate.

    Returns:
        fp64 [Hq, candidates] on the CPU: ‖out − dense‖ / ‖dense‖ over batch, tokens and channels.
    """
    shared = query.shape[1] // key.shape[1]
    errors = torch.empty(query.shape[1], len(candidates), dtype=torch.float64, device="cpu")
    for head in range(query.shape[1]):
        q = query[:, head, None]
        k, v = (x[:, head // shared, None] for x in (key, value))
        exact = dense_in_fp32(q, k, v, scale)
        size = exact.norm().double()
        for column, candidate in enumerate(candidates):
            out = candidate.attend(q, k, v, tokens, scale=scale, backend=backend)
            gap = (out.float() - exact).norm().double()
            errors[head, column] = gap / size if size > 0 else gap
            progress()
    return errors


def dense_in_fp32(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Softmax attention over all pairs, fp32 [B, H, S, Dv], in chunks of query rows."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    keys, values = key.float().mT, value.float()
    row_bytes = 4 * query.shape[0] * query.shape[1] * key.shape[2]
    rows = max(1, CHUNK_BYTES // row_bytes)
    parts = [
        torch.softmax(chunk.float() * scale @ keys, -1) @ values for chunk in query.split(rows, 2)
    ]
    return torch.cat(parts, 2)
