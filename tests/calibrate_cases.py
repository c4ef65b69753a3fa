"""Heads whose kind is known, in a small video, and captures of them: for the tests of calibrate."""

from __future__ import annotations

from pathlib import Path

import torch
from known_heads import known_head
from torch import Tensor

from video_attn import VideoTokens
from video_attn.tools.capture import Capture, Facts
from video_attn.tools.capture.files import file_name, save_capture

GRID, TILE, DIM = (6, 8, 8), (2, 2, 2), 32
TOKENS = VideoTokens(GRID)
OPTIONS = {"sta_tile": TILE, "vsa_tile": TILE, "block_size": 16}
COMMAND = ["--sta-tile", "2x2x2", "--vsa-tile", "2x2x2", "--block-size", "16", "--device", "cpu"]


def head(kind: str, seed: int = 0) -> list[Tensor]:
    """q, k, v [1, 1, S, D] of one head of a known kind."""
    return known_head(kind, GRID, dim=DIM, seed=seed)


def capture_layer(folder: Path, call: int, kinds: list[str], **facts: object) -> None:
    folder.mkdir(exist_ok=True)
    heads = [head(kind, seed) for seed, kind in enumerate(kinds)]
    q, k, v = (torch.cat(parts, 1) for parts in zip(*heads, strict=True))
    options = {"layer": call, "step": 0, "grid": GRID, "text_length": 0, "text_first": False}
    capture = Capture(q, k, v, Facts(kernel="sdpa", call_idx=call, **options | facts))
    save_capture(capture, folder / file_name("sdpa", call, "safetensors"))
