"""VideoTokens: how the tokens of one attention call lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..layout import Triple, VideoLayout
from ..patterns.valid_text import TextLength, check_text_length


@dataclass(frozen=True)
class VideoTokens:
    """How the tokens of one attention call lie: the grid of the video in raster order, and what
    stands beside it.

    Args:
        grid: (T, H, W) tokens of the video.
        text_length: all tokens of the sequence that are no video: text, or others that see
            everything and are seen by everything.
        text_first: they stand before the video, not after it.
        valid_text: how many of them are valid, the first ones: an int, one per batch item, or an
            integer tensor [B] on the device of the call. None: all. The others are never read and
            give 0.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    grid: Triple
    text_length: int = 0
    text_first: bool = False
    valid_text: TextLength = None

    def __post_init__(self) -> None:
        layout = self.layout((1, 1, 1))
        object.__setattr__(self, "grid", layout.grid)
        check_text_length(self.valid_text, layout)

    @property
    def video_length(self) -> int:
        """Video tokens."""
        return self.layout((1, 1, 1)).video_length

    @property
    def sequence_length(self) -> int:
        """All tokens."""
        return self.video_length + self.text_length

    def layout(self, tile: Triple) -> VideoLayout:
        """The sequence cut into tiles of ``tile``."""
        return VideoLayout(self.grid, tile, self.text_length, self.text_first)

    def check(self, query: Tensor, key: Tensor) -> None:
        """Raises ValueError unless queries and keys are these tokens."""
        for name, x in (("query", query), ("key", key)):
            if x.shape[2] != self.sequence_length:
                raise ValueError(
                    f"{name} has {x.shape[2]} tokens, but the video of {self.grid} tokens with "
                    f"{self.text_length} others has {self.sequence_length}"
                )


def in_memory_order(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, str]:
    """(query, key, value, layout) of tensors [B, H, S, D]: as [B, S, H, D], "bshd", where the heads
    of a token are neighbours in memory, so that a gather of tokens moves them all at once.
    """
    if query.stride(1) >= query.stride(2):
        return query, key, value, "bhsd"
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), "bshd"


def whole_gate(gate: Tensor, tokens: VideoTokens) -> Tensor:
    """A gate of the video alone, padded to the whole sequence: text has no coarse branch."""
    if gate.dim() != 4 or gate.shape[2] != tokens.video_length or tokens.text_length == 0:
        return gate
    sides = (tokens.text_length, 0) if tokens.text_first else (0, tokens.text_length)
    return F.pad(gate, (0, 0, *sides))
