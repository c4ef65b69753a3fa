"""Radial attention from its definition, token by token and block by block, with loops.

Nothing here knows of intervals, segments or caches: a frame pair is an s x s matrix of booleans,
and a block pair looks at the parts of those matrices that lie in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Definition:
    """The published rule with its options; ``allowed[i][j]`` lets frame i see frame j at all."""

    frames: int
    tokens: int
    block: int
    text: int = 0
    text_first: bool = False
    decay: float = 1.0
    neighbor: float = 1.0
    min_window: int | None = None
    split: int = 128
    sink: int = 0
    pooling: str = "majority"
    allowed: tuple[tuple[bool, ...], ...] | None = None
    sink_exempt: bool = False

    @property
    def video_start(self) -> int:
        return self.text if self.text_first else 0

    @property
    def length(self) -> int:
        return self.frames * self.tokens + self.text

    def frame_of(self, position: int) -> int | None:
        """The frame of a position of the sequence; None for text."""
        inside = position - self.video_start
        return inside // self.tokens if 0 <= inside < self.frames * self.tokens else None

    def window(self, i: int, j: int) -> float:
        """|r - c| may be at most this; -1 when frame i does not see frame j."""
        s, distance = self.tokens, abs(i - j)
        barred = self.allowed is not None and not self.allowed[i][j]
        if j < self.sink and (self.sink_exempt or not barred):
            return s
        if barred:
            return -1
        power = 2 ** s.bit_length() / 2 ** distance.bit_length()
        if self.split and power < self.split and distance % int(self.split / power) != 0:
            return -1
        if distance == 0:
            return s
        if distance == 1:
            return math.floor(s * self.neighbor)
        return max(power * self.decay, self.block if self.min_window is None else self.min_window)


def frame_pair(definition: Definition, i: int, j: int) -> Tensor:
    """bool [s, s]: which token of frame i sees which of frame j."""
    position = torch.arange(definition.tokens)
    return (position[:, None] - position).abs() <= definition.window(i, j)


def token_mask(definition: Definition) -> Tensor:
    """bool [S, S] of the whole sequence, before any pooling to blocks."""
    seen = torch.ones(definition.length, definition.length, dtype=torch.bool)
    s, start = definition.tokens, definition.video_start
    for i in range(definition.frames):
        for j in range(definition.frames):
            rows, columns = start + i * s, start + j * s
            seen[rows : rows + s, columns : columns + s] = frame_pair(definition, i, j)
    return seen


def block_mask(definition: Definition) -> Tensor:
    """bool [N, N]: a block sees another when some frame pair in them says so, or one holds text."""
    tokens, size, length = token_mask(definition), definition.block, definition.length
    blocks = -(-length // size)
    runs: list[list[tuple[int | None, list[int]]]] = []  # of each block: (frame, positions)
    for block in range(blocks):
        found: dict[int | None, list[int]] = {}
        for position in range(block * size, min((block + 1) * size, length)):
            found.setdefault(definition.frame_of(position), []).append(position)
        runs.append(list(found.items()))
    keep = torch.eye(blocks, dtype=torch.bool)
    for row in range(blocks):
        for column in range(blocks):
            for i, queries in runs[row]:
                for j, keys in runs[column]:
                    part = tokens[queries][:, keys]
                    keep[row, column] |= i is None or j is None or pools(definition.pooling, part)
    return keep


def pools(pooling: str, part: Tensor) -> bool:
    """Whether the tokens of one frame pair inside one block pair make the block pair seen."""
    counts = part.sum(0)
    touched = int((counts > 0).sum())
    if pooling == "cover":
        return touched > 0
    hot = int((counts / part.shape[0] > 1 / 3).sum())
    return touched > 0 and hot / touched > 0.6


def published_block_mask(definition: Definition) -> Tensor:
    """bool [S // B, S // B]: the procedure of the published code, its losses included.

    Text after the video. Every pair of frames is laid on an empty canvas that starts at a block
    border and has ceil(s / B) blocks; what lies outside of the grid is clipped.
    """
    size, s = definition.block, definition.tokens
    blocks, video_blocks = definition.length // size, definition.frames * s // size
    grid = torch.zeros(blocks, blocks, dtype=torch.bool)
    grid[video_blocks:] = True
    grid[:, video_blocks:] = True
    side = -(-s // size)
    for i in range(definition.frames):
        for j in range(definition.frames):
            canvas = torch.zeros((side + 1) * size, (side + 1) * size)
            down, right = i * s % size, j * s % size
            pair = frame_pair(definition, i, j).float()
            canvas[down : down + s, right : right + s] = pair
            canvas = canvas[: side * size, : side * size]
            for row in range(side):
                for column in range(side):
                    part = canvas[row * size :, column * size :][:size, :size]
                    density = part.sum(0) / size
                    hot, nonzero = (density > 1 / 3).sum().item(), (density > 0).sum().item()
                    at = i * s // size + row, j * s // size + column
                    if hot / (nonzero + 1e-9) > 0.6 and max(at) < blocks:
                        grid[at] = True
    return grid


def frame_scenes(
    boundaries: list[int], frames: int, compression: int = 4, patch: int = 1, padding: int = 0
) -> list[set[int]]:
    """The scenes of each latent frame, pixel frame by pixel frame.

    The VAE makes latent 0 of pixel frame 0 and every further latent of ``compression`` frames;
    ``padding`` latents stand before them, and ``patch`` latents make a frame of tokens. Frames
    after the last boundary are of the last scene, and padding is of the first frame's.
    """
    scenes: list[set[int]] = [set() for _ in range(frames)]
    latents = frames * patch - padding
    for pixel in range(1 + (latents - 1) * compression):
        scene = max(k for k, start in enumerate(boundaries[:-1]) if start <= pixel)
        latent = 0 if pixel == 0 else (pixel - 1) // compression + 1
        scenes[(latent + padding) // patch].add(scene)
    return scenes


def allowed_pairs(scenes: list[set[int]], adjacency: list[list[bool]]) -> list[list[bool]]:
    """Which frame may see which: when some scene of the one may see some scene of the other."""
    return [
        [any(adjacency[a][b] for a in rows for b in keys) for keys in scenes] for rows in scenes
    ]
