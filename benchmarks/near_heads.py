"""How far attention is from dense attention in fp32, in heads that look near."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from video_attn import VideoTokens
from video_attn.functional.patterns import Pattern
from video_attn.tools.calibrate.errors import dense_in_fp32

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from known_heads import known_head, smooth_features

WIDTHS = (4.0, 8.0, 8.0)  # tokens that a query looks around, in time, height and width


class NearHeads:
    """Two heads of smooth random features at the tokens of a video.

    A query looks at tokens up to some 4 frames and 8 rows and columns away; values are alike in
    tokens up to some 8 apart.
    """

    def __init__(
        self, tokens: VideoTokens, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.tokens = tokens
        heads = [
            known_head("local", tokens.grid, dim=head_dim, seed=n, widths=WIDTHS, device=device)
            for n in range(2)
        ]
        values = [smooth_features(tokens.grid, head_dim, seed=n, device=device) for n in range(2)]
        query = torch.cat([head[0] for head in heads], 1).to(dtype)
        self.qkv = query, query.clone(), torch.stack(values)[None].to(dtype)
        self._exact = dense_in_fp32(*self.qkv, None)

    def error(self, pattern: Pattern, precision: str) -> float:
        """Relative L2 of the output of ``pattern`` in ``precision``."""
        out = pattern.attend(*self.qkv, self.tokens, precision=precision).float()
        return float((out - self._exact).norm() / self._exact.norm())
