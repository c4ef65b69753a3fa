"""Patterns as small objects: what a model is given, and what says how one layer attends.

A pattern knows no model. :class:`VideoTokens` says how the tokens of a call lie, and ``attend``
(:class:`TokenPattern`) does the rest; the same object serves any number of layers, sizes and
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..attention import attention
from ..block_mask import BlockMask
from ..checks import check_int, wants_gradient
from ..layout import Triple, as_triple
from ..patterns.radial import RadialRule, radial_mask
from ..patterns.scene import Scenes
from ..patterns.sliding_tile import Windows, check_windows, sliding_tile_mask
from ..patterns.valid_text import as_tensor, check_text_length
from ..patterns.video_sparse import kept_blocks
from ..static_cache import canonical_device, static_cache
from .sta import STA_TILE, sliding_tile
from .token_pattern import QKV, Options, TokenPattern
from .video_tokens import VideoTokens, in_memory_order, whole_gate
from .vsa import VSA_TILE, Gate, check_count, check_gate, check_score_dtype, video_sparse

_DENSE_BLOCK = 128


@dataclass(frozen=True)
class Dense(TokenPattern):
    """Every token sees every valid token."""

    def _attend(self, qkv: QKV, tokens: VideoTokens, gate: Gate, options: Options) -> Tensor:
        return attention(*qkv, self.mask(tokens, qkv[0].device), **options)

    def mask(
        self, tokens: VideoTokens, device: torch.device | str = "cpu", *, heads: int = 1
    ) -> BlockMask | None:
        """None where all tokens are valid, else a full mask with lengths."""
        length = tokens.sequence_length
        valid = check_text_length(tokens.valid_text, tokens.layout((1, 1, 1)))
        if not isinstance(valid, Tensor):
            if min(valid) == tokens.text_length:
                return None
            valid = as_tensor(valid, canonical_device(device))
        if tokens.text_first:
            raise ValueError(
                f"valid_text must be all {tokens.text_length} tokens where they stand before the "
                "video: invalid tokens in the middle cannot be left out"
            )
        counts, indices, starts = _full_lists(-(-length // _DENSE_BLOCK), canonical_device(device))
        end = tokens.video_length + valid.to(torch.int32).clamp(0, tokens.text_length)
        lens = (end[:, None] - starts).clamp_(0, _DENSE_BLOCK)
        return BlockMask(counts, indices, _DENSE_BLOCK, _DENSE_BLOCK, length, length, lens, lens)

    def density(self, tokens: VideoTokens, heads: int = 1) -> float:
        """1: all pairs."""
        return 1.0


@dataclass(frozen=True)
class SlidingTile(TokenPattern):
    """Sliding tile attention: each tile of the video sees a window of tiles around it.

    Args:
        window: tiles (t, h, w) seen per axis, or a sequence with one triple per query head; larger
            than the grid means all of it.
        tile: tokens (t, h, w) of a tile; tiles at the border may be partial.

    Raises:
        TypeError, ValueError: not three integers >= 1, or not one triple per head.
    """

    window: Windows
    tile: Triple = STA_TILE

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", check_windows(self.window, name="window"))
        object.__setattr__(self, "tile", as_triple(self.tile, "tile"))

    @property
    def windows(self) -> tuple[Triple, ...]:
        """One window for all heads, or one per head."""
        return cast("tuple[Triple, ...]", self.window)

    def _attend(self, qkv: QKV, tokens: VideoTokens, gate: Gate, options: Options) -> Tensor:
        q, k, v, axes = in_memory_order(*qkv)
        windows = self.windows if len(self.windows) > 1 else self.windows[0]
        out = sliding_tile(
            q, k, v, tokens.grid, windows, tile=self.tile, text_length=tokens.valid_text,
            text_first=tokens.text_first, layout=axes, **options,
        )  # fmt: skip
        return out.transpose(1, 2) if axes == "bshd" else out

    def attend_tiles(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: VideoTokens, **options: Any
    ) -> Tensor:
        """:meth:`attend` for tokens that are in the padded tile order of ``tokens`` already.

        Args:
            query, key, value: [B, N, H, D], N the ``padded_length`` of the layout; padding is never
                read, and may be anything.
            options: of :func:`video_attn.attention`.

        Returns:
            [B, N, H, Dv], in the same order.
        """
        mask = self.mask(tokens, query.device, heads=query.shape[2])
        return attention(query, key, value, mask, layout="bshd", **options)

    def mask(
        self,
        tokens: VideoTokens,
        device: torch.device | str = "cpu",
        *,
        heads: int = 1,
    ) -> BlockMask:
        """The block mask over the padded tile order of ``tokens``."""
        self.check_heads(heads)
        return sliding_tile_mask(
            tokens.layout(self.tile), self.windows, text_length=tokens.valid_text, device=device
        )

    def density(self, tokens: VideoTokens, heads: int = 1) -> float:
        heads = len(self.windows) if len(self.windows) > 1 else heads
        return self.mask(tokens, heads=heads).density()

    def check_heads(self, heads: int) -> None:
        if len(self.windows) > 1:
            check_windows(self.windows, heads, "window")

    def of_heads(self, start: int, stop: int) -> SlidingTile:
        if len(self.windows) == 1:
            return self
        return replace(self, window=self.windows[start:stop])


@dataclass(frozen=True)
class VideoSparse(TokenPattern):
    """Video sparse attention: each tile sees the tiles whose means score highest.

    Args:
        top_k_ratio: share of the tiles that are seen, in (0, 1], rounded up to whole tiles.
        top_k: their number instead; at most those there are. One of the two.
        tile: tokens (t, h, w) of a tile.
        gate: weight of the coarse branch. "auto": what the model has learned for it
            (``to_gate_compress``), and without that 0, the sparse branch alone; None: as it is;
            a number.
        score_dtype: torch.bfloat16 or torch.float16: tiles are ranked by scores rounded to it, as
            the kernels that some models were trained with do.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    top_k_ratio: float | None = None
    top_k: int | None = None
    tile: Triple = VSA_TILE
    gate: float | Literal["auto"] | None = "auto"
    score_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.top_k is None) == (self.top_k_ratio is None):
            raise ValueError(
                "top_k or top_k_ratio must be given, and not both; got "
                f"{self.top_k!r} and {self.top_k_ratio!r}"
            )
        if self.top_k_ratio is not None:
            kept_blocks(self.top_k_ratio, 1)
        else:
            check_count(self.top_k, 2**31 - 1, "top_k")
        object.__setattr__(self, "tile", as_triple(self.tile, "tile"))
        check_score_dtype(self.score_dtype)
        if self.gate != "auto":
            check_gate(self.gate, (1, 1, 1, 1), torch.empty(0))
            if isinstance(self.gate, Tensor):
                raise TypeError("gate must be 'auto', None or a number: tensors come with a call")

    def _attend(self, qkv: QKV, tokens: VideoTokens, gate: Gate, options: Options) -> Tensor:
        if self.gate != "auto":
            gate = self.gate
        elif gate is None:
            gate = 0.0
        options.setdefault("score_dtype", self.score_dtype)
        q, k, v, axes = in_memory_order(*qkv)
        if isinstance(gate, Tensor):
            gate = whole_gate(gate, tokens)
            gate = gate.transpose(1, 2) if axes == "bshd" and gate.dim() == 4 else gate
        tiles = tokens.layout(self.tile).num_tiles
        top_k = self.top_k if self.top_k is None else min(self.top_k, tiles)
        out = video_sparse(
            q, k, v, tokens.grid, top_k=top_k, top_k_ratio=self.top_k_ratio, gate=gate,
            tile=self.tile, text_length=tokens.valid_text, text_first=tokens.text_first,
            layout=axes, **options,
        )  # fmt: skip
        return out.transpose(1, 2) if axes == "bshd" else out

    def density(self, tokens: VideoTokens, heads: int = 1) -> float:
        """Pairs of tokens that are computed, over all pairs, as if all tiles were full."""
        tiles = tokens.layout(self.tile).num_tiles
        if self.top_k_ratio is not None:
            kept = kept_blocks(self.top_k_ratio, tiles)
        else:
            kept = min(self.top_k or 1, tiles)
        video, text = tokens.video_length, tokens.text_length
        seen = video * (kept / tiles * video + text) + text * (video + text)
        return seen / (video + text) ** 2


@dataclass(frozen=True)
class Radial(TokenPattern):
    """Radial attention: the farther apart two frames are, the less they see of each other.

    Args:
        rule: how the windows shrink; a sequence with one rule, or "dense", per query head; None:
            the published rule of the model it is given to, else ``RadialRule()``.
        block_size: tokens of a block of the mask.
        scenes: which scenes of the video may see each other.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    rule: RadialRule | Sequence[RadialRule | Literal["dense"]] | None = None
    block_size: int = 128
    scenes: Scenes | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rule, Sequence) and not isinstance(self.rule, str):
            object.__setattr__(self, "rule", tuple(self.rule))
        rules = self.rule if isinstance(self.rule, tuple) else (self.rule,)
        for rule in rules:
            allowed = isinstance(rule, RadialRule) or (
                rule == "dense" if isinstance(self.rule, tuple) else rule is None
            )
            if not allowed:
                raise TypeError(
                    "rule must be a RadialRule, None, or a RadialRule or 'dense' for every head; "
                    f"got {rule!r}"
                )
        if self.rule == ():
            raise ValueError("rule must be a RadialRule or one per query head, got none")
        object.__setattr__(self, "block_size", check_int("block_size", self.block_size, 1))
        if self.scenes is not None and not isinstance(self.scenes, Scenes):
            raise TypeError(f"scenes must be a Scenes or None, got {type(self.scenes).__name__}")

    def _attend(self, qkv: QKV, tokens: VideoTokens, gate: Gate, options: Options) -> Tensor:
        query = qkv[0]
        mask = self.mask(
            tokens, query.device, heads=query.shape[1], transposed=wants_gradient(*qkv)
        )
        return attention(*qkv, mask, **options)  # nothing is moved

    def mask(
        self,
        tokens: VideoTokens,
        device: torch.device | str = "cpu",
        *,
        heads: int = 1,
        transposed: bool = False,
    ) -> BlockMask:
        """The block mask over the raster order of ``tokens``."""
        if not isinstance(self.rule, tuple):
            return self._mask_of(self.rule, tokens, device, transposed)
        self.check_heads(heads)
        return self._mask_of_heads(tokens, device)

    def density(self, tokens: VideoTokens, heads: int = 1) -> float:
        heads = len(self.rule) if isinstance(self.rule, tuple) else heads
        return self.mask(tokens, heads=heads).density()

    def check_heads(self, heads: int) -> None:
        if isinstance(self.rule, tuple) and len(self.rule) != heads:
            raise ValueError(
                f"rule must be one, or one per query head ({heads}); got {len(self.rule)}"
            )

    def of_heads(self, start: int, stop: int) -> Radial:
        if not isinstance(self.rule, tuple):
            return self
        return replace(self, rule=self.rule[start:stop])

    def _mask_of(
        self,
        rule: Any,
        tokens: VideoTokens,
        device: torch.device | str,
        transposed: bool = False,
    ) -> BlockMask:
        return radial_mask(
            tokens.layout((1, *tokens.grid[1:])), rule, block_size=self.block_size,
            scenes=self.scenes, text_length=tokens.valid_text, device=device,
            transposed=transposed,
        )  # fmt: skip

    def _mask_of_heads(self, tokens: VideoTokens, device: torch.device | str) -> BlockMask:
        different = {
            rule: self._mask_of(None if rule == "dense" else rule, tokens, device)
            for rule in dict.fromkeys(self.rule)  # type: ignore[arg-type]
        }
        some = next(iter(different.values()))
        full = torch.ones_like(some.to_dense())
        keep = [
            full if rule == "dense" else different[rule].to_dense()
            for rule in self.rule  # type: ignore[union-attr]
        ]
        length, size = tokens.sequence_length, self.block_size
        return BlockMask.from_dense(
            torch.cat(keep, 1), size, size, q_len=length, kv_len=length,
            q_block_lens=some.q_block_lens, kv_block_lens=some.kv_block_lens,
        ).compact()  # fmt: skip


Pattern = Dense | SlidingTile | VideoSparse | Radial


@static_cache(
    torch.int32, lambda blocks, device: [(1, 1, blocks), (1, 1, blocks, blocks), (blocks,)]
)
def _full_lists(blocks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(kv_num_blocks, kv_indices, first token of each block) where every block sees every block."""
    every = torch.arange(blocks, dtype=torch.int32, device=device)
    counts = torch.full((1, 1, blocks), blocks, dtype=torch.int32, device=device)
    return counts, every.expand(1, 1, blocks, -1).contiguous(), every * _DENSE_BLOCK
