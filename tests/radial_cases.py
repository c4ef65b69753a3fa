"""A definition of radial attention as the package is told of it."""

from __future__ import annotations

from radial_oracle import Definition
from torch import Tensor

from video_attn import BlockMask, VideoLayout
from video_attn.patterns.radial import (
    RadialRule,
    radial_mask,
)


def layout_of(definition: Definition) -> VideoLayout:
    grid = (definition.frames, 1, definition.tokens)
    return VideoLayout(grid, (1, 1, 1), definition.text, definition.text_first)


def rule_of(definition: Definition) -> RadialRule:
    return RadialRule(
        decay_factor=definition.decay,
        neighbor_fraction=definition.neighbor,
        min_window=definition.min_window,
        split_width=definition.split,
        sink_frames=definition.sink,
        pooling=definition.pooling,
    )


def ours(definition: Definition) -> BlockMask:
    return radial_mask(layout_of(definition), rule_of(definition), block_size=definition.block)


def blocks_of(mask: BlockMask) -> Tensor:
    return mask.to_dense()[0, 0]
