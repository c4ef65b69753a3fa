"""What a head looks at, and what each candidate keeps of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...functional.patterns import Dense, Pattern, Radial, VideoSparse
from ...functional.video_tokens import VideoTokens
from ...functional.vsa import video_sparse
from .. import UsageError
from ..capture import load_capture
from .calibration import Calibration
from .errors import head_of

ROWS = 128  # queries that are looked at, evenly spread
CELLS = 128  # of a map, per side at most


@dataclass(frozen=True)
class Kept:
    """What a pattern keeps of a head's attention.

    Args:
        name: of the candidate. map: kept attention [queries, cells of keys], each row at most 1.
        share: of the attention that is kept. error, density: of the candidate.
        is_chosen: whether the head was given it.
    """

    name: str
    map: NDArray[np.float32]
    share: float
    error: float
    density: float
    is_chosen: bool


def explain(
    found: Calibration, layer: int, head: int, *, step: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Kept]:  # fmt: skip
    """What each pattern of ``found`` keeps of a head's attention in its first capture; dense first.

    Args:
        step: captured one; None: the first.

    Raises:
        UsageError: no such step, layer or head was captured.
    """
    step = found.steps[0] if step is None else step
    if (step, layer) not in found.files:
        there = ", ".join(str(n) for s, n in sorted(found.files) if s == step) or "none"
        raise UsageError(f"--explain: of step {step} the layers {there} are captured, not {layer}")
    heads = len(found.errors[step, layer])
    if not 0 <= head < heads:
        raise UsageError(f"--explain: layer {layer} has heads 0 to {heads - 1}, not {head}")
    capture = load_capture(found.files[step, layer][0]).as_bhsd()
    qkv = head_of((capture.q, capture.k, capture.v), head, torch.device(device))
    q, k, v = (x[:1] for x in qkv)
    rows = _spread(q.shape[2], ROWS).to(q.device)
    weights = _attention(q, k, rows, capture.facts.scale)
    chosen = found.choices[step, layer].candidates[head]
    kept: list[Kept] = []
    for number, candidate in enumerate(found.candidates):
        if candidate.precision != "native":  # the same pattern in another precision
            continue
        seen = _seen(candidate.pattern, q, k, v, found.tokens, rows, capture.facts.scale)
        of_seen = weights if seen is None else weights * seen
        pattern_chosen = found.candidates[chosen].pattern == candidate.pattern
        kept.append(
            Kept(
                candidate.name, _pooled(of_seen), float(of_seen.sum(1).mean()),
                float(found.errors[step, layer][head, number]),
                candidate.pattern.density(found.tokens), pattern_chosen,
            )
        )  # fmt: skip
    return kept


def _spread(length: int, count: int) -> Tensor:
    return torch.linspace(0, length - 1, min(length, count)).round().long()


def _attention(q: Tensor, k: Tensor, rows: Tensor, scale: float | None) -> Tensor:
    """Softmax over all keys of some queries, fp32 [rows, S]."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return torch.softmax(q[0, 0, rows].float() * scale @ k[0, 0].float().mT, -1)


def _seen(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, tokens: VideoTokens, rows: Tensor,
    scale: float | None,
) -> Tensor | None:  # fmt: skip
    """bool [rows, S]: which keys those queries see; None: all."""
    if isinstance(pattern, Dense):
        return None
    layout = tokens.layout((1, 1, 1) if isinstance(pattern, Radial) else pattern.tile)
    if isinstance(pattern, VideoSparse):
        top_k = None if pattern.top_k is None else min(pattern.top_k, layout.num_tiles)
        mask = video_sparse(
            q, k, v, tokens.grid, top_k=top_k, top_k_ratio=pattern.top_k_ratio, gate=0.0,
            tile=pattern.tile, text_first=tokens.text_first, score_dtype=pattern.score_dtype,
            scale=scale, return_mask=True,
        )[1]  # fmt: skip
    else:
        mask = pattern.mask(tokens, q.device)
    blocks = mask.to_dense()[0, 0]
    block_of = torch.arange(tokens.sequence_length, device=q.device) // mask.kv_block_size
    if not isinstance(pattern, Radial):  # the block of a token is its place in padded tile order
        order = layout.tile_order(q.device)
        block_of[order] = layout.padded_slots(q.device) // mask.kv_block_size
    return blocks[block_of[rows]][:, block_of]


def _pooled(weights: Tensor) -> NDArray[np.float32]:
    """[rows, S] -> [rows, cells], summed."""
    length = weights.shape[1]
    size = math.ceil(length / CELLS)
    padded = torch.nn.functional.pad(weights, (0, -length % size))
    return padded.unflatten(1, (-1, size)).sum(2).cpu().numpy()


def draw_explanation(kept: Sequence[Kept], title: str, path: Path) -> None:
    """Writes a picture (.png): the head's attention map, and what each pattern keeps of it."""
    from ..plot.style import INK, QUERY, bare, headline, new_figure, pixels, save

    columns = min(6, len(kept))
    lines = math.ceil(len(kept) / columns)
    figure = new_figure(max(6.5, 2.1 * columns + 0.6), 2.55 * lines + 1.2)
    headline(
        figure, title,
        "rows: queries, columns: keys, in raster order; dark: much attention, white: none, or not "
        "seen; framed: what the head was given",
    )  # fmt: skip
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    height = figure.get_figheight()
    figure.subplots_adjust(0.03, 0.02, 0.98, 1 - 1.35 / height, 0.12, 0.42)
    floor = 1e-2 / kept[0].map.shape[1]  # a hundredth of what even attention would give
    for place, axis in enumerate(axes):
        if place >= len(kept):
            axis.axis("off")
            continue
        one = kept[place]
        shown = np.log10(np.maximum(one.map, floor))
        axis.imshow(shown, cmap="Blues", vmin=np.log10(floor), vmax=0, aspect="auto",
                    interpolation="nearest")  # fmt: skip
        bare(axis, "")
        axis.set_title(
            f"{one.name}: error {one.error:.3f}\n{one.density:.0%} of pairs keep {one.share:.1%}",
            size=8, loc="left", color=INK, weight="bold" if one.is_chosen else "normal",
        )  # fmt: skip
        for spine in axis.spines.values():
            spine.set(visible=True, color=QUERY if one.is_chosen else INK,
                      linewidth=2.5 if one.is_chosen else 0.5)  # fmt: skip
    save([pixels(figure)], path, fps=1)
