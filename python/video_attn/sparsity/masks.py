"""Attention masks that say nothing but "the last tokens are padding", read as lengths.

Such a mask is true for all video tokens and for the first so many of the others. Any other has no
form in blocks and lengths; that is said, never ignored.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ..functional.patterns import VideoTokens

_LOW = -1e4  # an additive mask hides what it adds this much to, or less

library = torch.library.Library("video_attn", "FRAGMENT")
library.define("valid_text(Tensor mask, SymInt video, bool text_first) -> Tensor")


class UnsupportedError(ValueError):
    """What a call asks for and its method cannot do."""


def valid_text(mask: Tensor, tokens: VideoTokens) -> Tensor:
    """Valid tokens beside the video, int32 [B|1], that a key-padding mask leaves.

    Args:
        mask: bool (True: seen) or additive floats (0: seen, -1e4 or less: hidden), as
            ``scaled_dot_product_attention`` takes it: [B|1, H|1, 1, S].
        tokens: the S tokens that are masked.

    Raises:
        UnsupportedError: another shape, or other values. The values are read: on a GPU that waits
            for the stream, once for all layers that are given one mask.
    """
    length = tokens.sequence_length
    if mask.dim() != 4 or mask.shape[2] != 1 or mask.shape[3] != length:
        raise UnsupportedError(
            f"attn_mask has shape {tuple(mask.shape)}; what becomes lengths is key padding "
            f"[B, 1, 1, {length}]"
        )
    if torch.compiler.is_compiling():
        return torch.ops.video_attn.valid_text(mask, tokens.video_length, tokens.text_first)
    known = _last.find(mask, tokens)
    if known is None:
        known = torch.ops.video_attn.valid_text(mask, tokens.video_length, tokens.text_first)
        _last.keep(mask, tokens, known)
    return known


class _Last(threading.local):
    """The last answer of this thread: the layers of a model are given one mask."""

    def __init__(self) -> None:
        self.entry: tuple[Any, ...] = (lambda: None, 0, None, None)

    def find(self, mask: Tensor, tokens: VideoTokens) -> Tensor | None:
        of, version, key, result = self.entry
        return result if (of() is mask and (version, key) == self._key(mask, tokens)) else None

    def keep(self, mask: Tensor, tokens: VideoTokens, result: Tensor) -> None:
        self.entry = (weakref.ref(mask), *self._key(mask, tokens), result)

    @staticmethod
    def _key(mask: Tensor, tokens: VideoTokens) -> tuple[int, Any]:
        version = 0 if mask.is_inference() else mask._version
        return version, (tokens.grid, tokens.text_length, tokens.text_first)


_last = _Last()


def _valid_text(mask: Tensor, video: int, text_first: bool) -> Tensor:
    if mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask == 0
        if not bool((seen | (mask <= _LOW)).all()):
            raise UnsupportedError(
                "attn_mask is a bias: key padding adds 0 to what is seen and -1e4 or less to what "
                "is hidden, nothing between"
            )
    first = seen[:, 0, 0]
    text = first.shape[1] - video
    beside = first[:, :text] if text_first else first[:, video:]
    lengths = beside.sum(-1, dtype=torch.int32)
    prefix = torch.arange(text, device=mask.device) < lengths[:, None]
    whole = torch.ones_like(first[:, :video])
    meant = torch.cat([prefix, whole] if text_first else [whole, prefix], 1)
    if not bool((seen == meant[:, None, None]).all()):
        raise UnsupportedError(
            "attn_mask hides tokens of the video, or other than the last ones beside it: what "
            "becomes lengths is padding after the valid tokens"
        )
    return lengths


library.impl("valid_text", _valid_text, "CompositeExplicitAutograd")
torch.library.register_fake(
    "video_attn::valid_text",
    lambda mask, video, text_first: mask.new_empty(mask.shape[0], dtype=torch.int32),
    lib=library,
)
