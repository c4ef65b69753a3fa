"""Radial attention: the farther apart two frames are, the fewer of their tokens see each other.

Tokens stay in raster order. Token r of query frame i sees token c of key frame j when
``|r - c| <= W``, where the window W depends on the distance of the two frames. So the whole pattern
is one small table, W for every pair of frames (:func:`frame_windows`), and :func:`radial_mask`
turns that table into a block mask. After X. Li et al., "Radial Attention: O(n log n) Sparse
Attention with Energy Decay for Long Video Generation", 2025.

A block may hold the end of one frame, the start of the next, and text. It is cut into *segments*,
runs of tokens of one frame in one block, and a block sees another when one of its segments sees one
of the other's. How many rows of a segment see column c is the smallest of four straight lines in c;
so the columns seen by at least m rows are one interval, and a pair of segments is decided by
arithmetic on its borders. No token matrix is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..block_lists import dense_from_lists, lists_from_dense
from ..block_mask import BlockMask
from ..checks import check_int, check_positive_number
from ..layout import LayoutKey, VideoLayout
from ..static_cache import canonical_device, static_cache
from .scene import Scenes
from .valid_text import TextLength, as_tensor, check_text_length

POOLINGS = ("majority", "cover", "published")
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "wan": {"sink_frames": 1},
    "hunyuan": {},
    "cogvideox": {"neighbor_fraction": 0.5},
}


@dataclass(frozen=True)
class RadialRule:
    """How the window of a pair of frames follows from their distance.

    With s tokens per frame and bl(x) the bit length of x, the window is s at distance 0,
    ``neighbor_fraction * s`` at distance 1, and beyond that
    ``max(decay_factor * 2**bl(s) / 2**bl(distance), min_window)``: it halves whenever the distance
    doubles. :meth:`for_model` gives the published settings of each model.

    Args:
        decay_factor: scales the windows from distance 2 on.
        neighbor_fraction: window of adjacent frames, in frames; 1: they see each other wholly.
        min_window: smallest window from distance 2 on, in tokens; None: the block size, as
            published. A quarter of the block size leaves one diagonal of blocks instead of three.
        split_width: where ``2**bl(s) / 2**bl(distance)`` is smaller than this, whole distances are
            dropped instead: only every ``split_width * 2**bl(distance) / 2**bl(s)``-th is kept.
            0 drops none.
        sink_frames: so many first frames are seen wholly by every token (an attention sink).
        pooling: when a segment of queries sees a segment of keys. "majority": when more than 3/5
            of the columns that any row sees are seen by more than 1/3 of the rows. "cover": when
            any row sees any column; no pair of tokens inside a window is lost. "published":
            "majority" as the published code has it: a third of a whole block's rows, however few
            there are, and a frame loses what it has past ceil(s / block size) blocks; for masks
            equal to those that a model was trained with.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    decay_factor: float = 1.0
    neighbor_fraction: float = 1.0
    min_window: int | None = None
    split_width: int = 128
    sink_frames: int = 0
    pooling: str = "majority"

    def __post_init__(self) -> None:
        for name, largest in (("decay_factor", math.inf), ("neighbor_fraction", 1.0)):
            number = check_positive_number(name, getattr(self, name), largest)
            object.__setattr__(self, name, number)
        for name in ("min_window", "split_width", "sink_frames"):
            value = getattr(self, name)
            if name != "min_window" or value is not None:
                object.__setattr__(self, name, check_int(name, value, 0))
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}")

    @classmethod
    def for_model(cls, model_type: str, decay_factor: float = 1.0) -> RadialRule:
        """The published rule of "wan" (the first frame is a sink), "hunyuan", or "cogvideox"
        (adjacent frames see half a frame to either side).

        Raises:
            ValueError: another ``model_type``.
        """
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type must be one of {', '.join(MODEL_TYPES)}; got {model_type!r}"
            )
        return cls(decay_factor=decay_factor, **MODEL_TYPES[model_type])

    @property
    def key(self) -> tuple[Any, ...]:
        """The rule as plain values, in the order of its arguments."""
        return (
            self.decay_factor, self.neighbor_fraction, self.min_window, self.split_width,
            self.sink_frames, self.pooling,
        )  # fmt: skip

    def window(self, distance: int, tokens_per_frame: int, block_size: int = 128) -> float:
        """Tokens to either side that frames ``distance`` apart see of each other."""
        if distance == 0:
            return tokens_per_frame
        if distance == 1:
            return math.floor(self.neighbor_fraction * tokens_per_frame)
        smallest = block_size if self.min_window is None else self.min_window
        return max(self.decay_factor * _halved(tokens_per_frame, distance), smallest)

    def keeps_distance(self, distance: int, tokens_per_frame: int) -> bool:
        """False where the split drops all pairs of frames of this distance."""
        width = _halved(tokens_per_frame, distance)
        return width >= self.split_width or distance % int(self.split_width / width) == 0


def radial_mask(
    layout: VideoLayout,
    rule: RadialRule | None = None,
    *,
    block_size: int = 128,
    scenes: Scenes | None = None,
    text_length: TextLength = None,
    device: torch.device | str = "cpu",
    transposed: bool = False,
) -> BlockMask:
    """The mask of radial attention over a video in raster order, with text before or after it.

    Text sees everything and is seen by everything, and so is any block that holds some. Every block
    sees itself. The lists are built once per (layout, rule, block size, scenes, device) and kept.

    Args:
        layout: grid, text length and text position. The tile plays no part.
        rule: default ``RadialRule()``.
        block_size: tokens of a block, any positive number.
        scenes: which frames may see each other at all.
        text_length: valid text tokens, the first ones: an int, one per batch item, or an integer
            tensor [B] on ``device`` (never read by the host). Text past them neither sees nor is
            seen. Default: all; with text before the video, no other value can be said by a block
            mask.
        transposed: also build, and keep, the lists that a backward pass needs.

    Returns:
        BlockMask of ``layout.sequence_length`` queries and keys, for all batches and heads.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; scenes that do not fit the
            frames of ``layout``.
    """
    rule = RadialRule() if rule is None else rule
    for name, value, kind in (("layout", layout, VideoLayout), ("rule", rule, RadialRule)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if scenes is not None and not isinstance(scenes, Scenes):
        raise TypeError(f"scenes must be a Scenes or None, got {type(scenes).__name__}")
    block_size = index(check_int("block_size", block_size, 1))
    scenes_key = None if scenes is None else scenes.key
    key = (layout.key, rule.key, scenes_key, block_size, canonical_device(device))
    length = layout.sequence_length
    lens = _block_lens(layout, block_size, text_length, key[-1])
    return BlockMask(
        *_lists(*key), block_size, block_size, length, length, lens, lens,
        _transposed_lists(*key) if transposed else None,
    )  # fmt: skip


def frame_windows(
    layout: VideoLayout, rule: RadialRule, block_size: int = 128, scenes: Scenes | None = None
) -> Tensor:
    """int32 [T, T]: the window of query frame i into key frame j in tokens, up to a whole frame;
    -1 sees nothing.
    """
    frames, tokens = layout.grid[0], _tokens_per_frame(layout)
    by_distance = [
        math.floor(min(rule.window(d, tokens, block_size), tokens))
        if rule.keeps_distance(d, tokens)
        else -1
        for d in range(frames)
    ]
    frame = torch.arange(frames, device="cpu")
    windows = torch.tensor(by_distance, dtype=torch.int32, device="cpu")
    windows = windows[(frame[:, None] - frame).abs()]
    windows[:, : rule.sink_frames] = tokens
    return windows if scenes is None else scenes.restrict(windows, tokens, rule.sink_frames)


def frame_density(layout: VideoLayout, mask: BlockMask) -> Tensor:
    """float64 [T, T]: the share of the token pairs of query frame i and key frame j that ``mask``
    computes.

    For any mask over the raster order of ``layout``, the mean of its batches and heads. Reads the
    mask on the host.

    Raises:
        ValueError: the mask has other lengths than ``layout``.
    """
    for name, length in (("q_len", mask.q_len), ("kv_len", mask.kv_len)):
        if length != layout.sequence_length:
            raise ValueError(
                f"mask has {name} {length}, but layout has {layout.sequence_length} tokens"
            )
    mask = mask.to("cpu")
    keep = mask.to_dense().double().mean(1)
    rows = _frame_overlap(layout, mask.q_block_size, mask.q_lens())
    columns = _frame_overlap(layout, mask.kv_block_size, mask.kv_lens())
    return (rows @ keep @ columns.mT).mean(0) / _tokens_per_frame(layout) ** 2


def density_by_distance(density: Tensor) -> Tensor:
    """float64 [T]: the mean of a :func:`frame_density` over the frame pairs of each distance."""
    both = (density + density.T) / 2
    return torch.stack([both.diagonal(distance).mean() for distance in range(len(density))])


class _Segments(NamedTuple):
    """Runs of tokens of one frame in one block, in the order of the sequence; int32 [N] each."""

    block: Tensor
    frame: Tensor  # -1: text
    first: Tensor  # position of the first token in its frame
    last: Tensor
    ordinal: Tensor  # of the segment in its frame, from 0


def _shapes(
    layout_key: LayoutKey, rule_key: Any, scenes_key: Any, block_size: int, device: Any
) -> list[tuple[int, ...]]:
    """Of lists for sizes that are left open: as wide as there are blocks."""
    blocks = -(-VideoLayout(*layout_key).sequence_length // block_size)
    return [(1, 1, blocks), (1, 1, blocks, blocks)]


@static_cache(torch.int32, _shapes)
def _lists(
    layout_key: tuple[Any, ...],
    rule_key: tuple[Any, ...],
    scenes_key: tuple[Any, ...] | None,
    block_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(kv_num_blocks [1, 1, N], kv_indices [1, 1, N, longest list]), int32."""
    layout, rule = VideoLayout(*layout_key), RadialRule(*rule_key)
    scenes = None if scenes_key is None else Scenes(*scenes_key)
    segments = _segments(layout, block_size)
    windows = frame_windows(layout, rule, block_size, scenes)
    seen = _seen(segments, windows, layout, rule, block_size)
    blocks = -(-layout.sequence_length // block_size)
    rows = torch.zeros(blocks, seen.shape[1], dtype=torch.int32)
    rows.index_add_(0, segments.block, seen.int())
    pairs = torch.eye(blocks, dtype=torch.int32)
    pairs.index_add_(1, segments.block, rows)
    counts, indices = lists_from_dense(pairs > 0)
    indices = indices[:, : int(counts.max())].contiguous()
    return counts[None, None].to(device), indices[None, None].to(device)


@static_cache(torch.int32, _shapes)
def _transposed_lists(*key: Any) -> tuple[Tensor, Tensor]:
    counts, indices = _lists(*key)
    return lists_from_dense(dense_from_lists(counts, indices, counts.shape[-1]).mT)


def _block_lens(
    layout: VideoLayout, block_size: int, text_length: TextLength, device: torch.device
) -> Tensor | None:
    """int32 [B|1, N]: valid tokens of each block; None when all text is valid."""
    valid = check_text_length(text_length, layout)
    if not isinstance(valid, Tensor):
        if min(valid) == layout.text_length:
            return None
        valid = as_tensor(valid, device)
    if valid.device != device:
        raise ValueError(
            f"text_length must be on the device of the mask, {device}, got {valid.device}"
        )
    if layout.text_first:
        raise ValueError(
            f"text_length must be all {layout.text_length} text tokens when the text is before the "
            f"video: invalid tokens in the middle cannot be left out, got {text_length!r}"
        )
    blocks = -(-layout.sequence_length // block_size)
    starts = torch.arange(blocks, dtype=torch.int32, device=device) * block_size
    end = layout.video_length + valid.to(torch.int32).clamp(0, layout.text_length)
    return (end[:, None] - starts).clamp_(0, block_size)


def _segments(layout: VideoLayout, block_size: int) -> _Segments:
    tokens, length = _tokens_per_frame(layout), layout.sequence_length
    video_start = _video_start(layout)
    frame_starts = video_start + torch.arange(layout.grid[0] + 1) * tokens
    block_starts = torch.arange(0, length, block_size)
    starts = torch.cat([block_starts, frame_starts[frame_starts < length]]).unique()
    lengths = torch.cat([starts[1:], torch.tensor([length])]) - starts
    frame = torch.div(starts - video_start, tokens, rounding_mode="floor")
    frame_start = video_start + frame * tokens
    first, block = starts - frame_start, starts // block_size
    ordinal = block - frame_start // block_size
    is_text = (starts < video_start) | (starts >= video_start + layout.video_length)
    frame = frame.masked_fill(is_text, -1)
    return _Segments(*(x.int() for x in (block, frame, first, first + lengths - 1, ordinal)))


def _seen(
    segments: _Segments, windows: Tensor, layout: VideoLayout, rule: RadialRule, block_size: int
) -> Tensor:
    """bool [N, N]: which segment of queries sees which segment of keys."""
    frame = segments.frame
    window = windows[frame][:, frame]  # whatever stands here for text is overruled at the end
    first_row, last_row = segments.first[:, None], segments.last[:, None]
    first_column, last_column = segments.first, segments.last
    height = last_row - first_row + 1

    def columns_seen_by(needed: Tensor) -> Tensor:
        """How many columns at least ``needed`` >= 1 of the rows see."""
        # Rows that see column c: the least of height, 2W + 1, c + W - first_row + 1 and
        # last_row - c + W + 1.
        low = torch.maximum(first_column, first_row + needed - 1 - window)
        high = torch.minimum(last_column, last_row - needed + 1 + window)
        possible = (height >= needed) & (2 * window + 1 >= needed)
        return (high - low + 1).clamp_(min=0) * possible

    touched = columns_seen_by(torch.ones_like(height))
    if rule.pooling == "cover":
        seen = touched > 0
    else:
        rows = height if rule.pooling == "majority" else torch.full_like(height, block_size)
        seen = 5 * columns_seen_by(rows // 3 + 1) > 3 * touched
    if rule.pooling == "published":
        inside = segments.ordinal < -(-_tokens_per_frame(layout) // block_size)
        seen &= inside[:, None] & inside
    is_text = frame < 0
    return seen | is_text[:, None] | is_text


def _frame_overlap(layout: VideoLayout, block_size: int, lens: Tensor) -> Tensor:
    """float64 [B, T, N]: tokens of each frame among the valid ones of each block; lens [B, N]."""
    tokens = _tokens_per_frame(layout)
    frame_start = (
        _video_start(layout) + torch.arange(layout.grid[0], device="cpu")[:, None] * tokens
    )
    block_start = torch.arange(lens.shape[1], device="cpu") * block_size
    first = torch.maximum(frame_start, block_start)
    end = torch.minimum(frame_start + tokens, (block_start + lens)[:, None])
    return (end - first).clamp_(min=0).double()


def _tokens_per_frame(layout: VideoLayout) -> int:
    return layout.grid[1] * layout.grid[2]


def _video_start(layout: VideoLayout) -> int:
    return layout.text_length if layout.text_first else 0


def _halved(tokens_per_frame: int, distance: int) -> float:
    """2**bl(s) / 2**bl(distance): a power of two above s, halved at distances 1, 2, 4, 8, ..."""
    return 2.0 ** (tokens_per_frame.bit_length() - distance.bit_length())
