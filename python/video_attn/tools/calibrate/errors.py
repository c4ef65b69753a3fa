"""How far each candidate is from dense attention, head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...functional.video_tokens import VideoTokens
from .candidates import Candidate

CHUNK_BYTES = 128 << 20  # of fp32 scores at a time


def errors_of_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: VideoTokens,
    candidates: Sequence[Candidate],
    *,
    scale: float | None = None,
    backend: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Relative L2 error of one head with every candidate, against dense attention in fp32.

    Beside its inputs it takes less than 1 GB.

    Args:
        query: [B, 1, S, D]. key: [B, 1, S, D]. value: [B, 1, S, Dv]; on the device to use.
        scale: of the scores, None for 1/sqrt(D).
        progress: told after every candidate how many are done.

    Returns:
        ‖out − dense‖ / ‖dense‖ over batch, tokens and channels, of each candidate.
    """
    exact = dense_in_fp32(query, key, value, scale)
    size = exact.norm().double()
    errors = []
    for done, candidate in enumerate(candidates, 1):
        out = candidate.attend(query, key, value, tokens, scale=scale, backend=backend)
        gap = (out.float() - exact).norm().double()
        errors.append(float(gap / size if size > 0 else gap))
        progress(done)
    return errors


def head_of(capture_tensors: Sequence[Tensor], head: int, device: torch.device) -> list[Tensor]:
    """q, k, v [B, 1, S, D] of query head ``head`` on ``device``, of all heads' tensors."""
    query, key, value = capture_tensors
    shared = query.shape[1] // key.shape[1]
    places = (head, head // shared, head // shared)
    return [x[:, n, None].to(device) for x, n in zip((query, key, value), places, strict=True)]


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
