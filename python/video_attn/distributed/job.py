"""What is to be attended to: a mask or a selection over the sequence, and the tokens' order."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from torch import Tensor

from ..block_mask import BlockMask
from ..functional.patterns import Dense, Pattern, Radial, SlidingTile, VideoSparse
from ..functional.video_tokens import VideoTokens
from ..functional.vsa import check_count
from ..layout import VideoLayout
from ..patterns.valid_text import block_lens, check_text_length, listed_text_blocks
from ..patterns.video_sparse import kept_blocks
from .placement import Order

PATTERNS = (Dense, Radial, SlidingTile, VideoSparse)
_KEPT = 64


@dataclass(frozen=True, eq=False)
class Selection:
    """Video sparse attention: tiles are selected by data, in every call anew.

    Args:
        layout: of the whole sequence; its slots are the padded tile order, text last.
        top_k: tiles that each tile sees.
        lens: int32 [B|1, blocks], valid tokens of each block; None: all are full.
        text_blocks: text blocks with a valid token.
    """

    layout: VideoLayout
    top_k: int
    lens: Tensor | None
    text_blocks: int


@dataclass(frozen=True, eq=False)
class Job:
    """One attention over the whole sequence, the same on all ranks.

    Args:
        mask: over the slots; None for dense attention and for a selection.
        selection: instead of a mask.
        order: how the tokens, in the order of the shards, map to slots.
        q_length, kv_length: slots; None where only the ranks together know (dense).
        is_causal: dense only.
        name: equal on all ranks exactly where the jobs are, up to the lists of the mask.
    """

    mask: BlockMask | None
    selection: Selection | None
    order: Order
    q_length: int | None
    kv_length: int | None
    is_causal: bool
    name: str

    @property
    def q_tokens(self) -> int | None:
        """Tokens, without padding, of all ranks."""
        return self.q_length if self.order is None else VideoLayout(*self.order[0]).sequence_length

    @property
    def kv_tokens(self) -> int | None:
        return self.kv_length if self.order is None else self.q_tokens


def make_job(
    mask: BlockMask | Pattern | None,
    tokens: VideoTokens | None,
    tile_order: bool,
    is_causal: bool,
    q: Tensor,
) -> Job:
    """The job of a call with these arguments, for q [B, H, held, D].

    Raises:
        TypeError, ValueError: arguments that do not fit each other or q.
    """
    if is_causal and mask is not None:
        raise ValueError("is_causal is for dense attention: it must be False with a mask")
    if tile_order and not isinstance(mask, (SlidingTile, VideoSparse)):
        raise ValueError("tile_order is for SlidingTile and VideoSparse: it must be False here")
    if mask is None or isinstance(mask, BlockMask):
        if tokens is not None:
            raise ValueError("tokens are for patterns: they must be None with a mask or without")
        if mask is None:
            name = "dense, causal" if is_causal else "dense"
            return Job(None, None, None, None, None, is_causal, name)
        _check_mask(mask, q)
        name = f"BlockMask of {mask.q_len} x {mask.kv_len} tokens"
        return Job(mask, None, None, mask.q_len, mask.kv_len, False, name)
    if not isinstance(mask, PATTERNS):
        raise TypeError(
            "mask must be a BlockMask, a pattern (SlidingTile, VideoSparse, Radial, Dense) or "
            f"None, got {type(mask).__name__}"
        )
    if not isinstance(tokens, VideoTokens):
        raise TypeError(
            f"tokens must be the VideoTokens of the whole sequence for a pattern, got {tokens!r}"
        )
    return _job_of_pattern(mask, tokens, tile_order, q)


def _check_mask(mask: BlockMask, q: Tensor) -> None:
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, but q is on {q.device}; use mask.to(q.device)")
    if mask.batch not in (1, q.shape[0]):
        raise ValueError(f"mask has batch {mask.batch}; allowed: 1 or {q.shape[0]}")
    if mask.kv_num_blocks.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"mask has {mask.kv_num_blocks.shape[1]} heads; allowed: 1 or {q.shape[1]}"
        )


def _job_of_pattern(pattern: Pattern, tokens: VideoTokens, tile_order: bool, q: Tensor) -> Job:
    valid = tokens.valid_text
    name = (
        f"{pattern} over {tokens.grid} in {'tile' if tile_order else 'raster'} order, "
        f"{tokens.text_length} others {'before' if tokens.text_first else 'after'}"
    )
    name += "" if isinstance(valid, Tensor) else f", valid {valid}"
    if isinstance(pattern, (Dense, Radial)):
        mask = pattern.mask(tokens, q.device, heads=q.shape[1])
        length = tokens.sequence_length
        return Job(mask, None, None, length, length, False, name)
    layout = tokens.layout(pattern.tile)
    order = layout.key, tile_order
    length = layout.padded_length
    if isinstance(pattern, SlidingTile):
        mask = pattern.mask(tokens, q.device, heads=q.shape[1])
        return Job(mask, None, order, length, length, False, name)
    if pattern.top_k_ratio is not None:
        top_k = kept_blocks(pattern.top_k_ratio, layout.num_tiles)
    else:
        top_k = check_count(pattern.top_k, layout.num_tiles, "top_k")
    checked = check_text_length(valid, layout, q.shape[0])
    lens = block_lens(checked, layout, q.device)
    selection = Selection(layout, top_k, lens, listed_text_blocks(checked, layout))
    return Job(None, selection, order, length, length, False, name)


def heads_of_mask(mask: BlockMask, first: int, last: int) -> BlockMask:
    """The lists of the query heads ``first`` up to ``last``."""
    if mask.kv_num_blocks.shape[1] == 1:
        return mask
    transpose = mask._transpose
    if transpose is not None:
        transpose = transpose[0][:, first:last], transpose[1][:, first:last]
    return replace(
        mask,
        kv_num_blocks=mask.kv_num_blocks[:, first:last],
        kv_indices=mask.kv_indices[:, first:last],
        _transpose=transpose,
    )


class MaskCache:
    """Results that follow from a mask, kept as long as its tensors are unchanged.

    Masks are made anew in every call while their lists, which follow from sizes, are kept: so the
    tensors are the key. They are held here, so that no other tensor can have the address of one.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[tuple[Tensor | None, ...], Any]] = OrderedDict()
        self._lock = Lock()

    def get(self, mask: BlockMask, key: Any, make: Callable[[], Any]) -> Any:
        tensors = (mask.kv_num_blocks, mask.kv_indices, mask.q_block_lens, mask.kv_block_lens)
        versions = tuple(None if x is None else (id(x), _version(x)) for x in tensors)
        sizes = (mask.q_block_size, mask.kv_block_size, mask.q_len, mask.kv_len)
        full = (versions, sizes, key)
        with self._lock:
            if full in self._kept:
                self._kept.move_to_end(full)
                return self._kept[full][1]
        result = make()
        with self._lock:
            self._kept[full] = tensors, result
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return result


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # inference tensors count no versions


_fingerprints = MaskCache()


def fingerprint(mask: BlockMask) -> str:
    """Equal for equal masks. Reads the mask on the host, once."""
    return _fingerprints.get(mask, None, lambda: _fingerprint(mask.to("cpu")))


def _fingerprint(mask: BlockMask) -> str:
    digest = hashlib.sha256(repr((mask.q_block_size, mask.kv_block_size)).encode())
    for x in (mask.to_dense(), mask.q_lens(), mask.kv_lens()):
        digest.update(repr(tuple(x.shape)).encode())
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
