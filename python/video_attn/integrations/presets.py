"""Starting points for the models: ``apply(pipe, **presets.wan_720p())``.

Each is a dictionary of arguments of :func:`video_attn.integrations.apply`, to be changed at will.
Dense steps are shares of all steps, so that runs of few and of many steps keep the same part. Every
number is somebody's who published it, and where it is said; what is "chosen here" was measured on
no model: ``video-attn calibrate`` finds better ones for yours.

- Radial: arXiv 2506.19852 and the scripts beside it. 12 of 50 steps dense (0.24) gave Wan 2.1 the
  best PSNR of 0 to 13, "a quarter" is the authors' rule for other numbers of steps.
- STA: arXiv 2502.04507 and its code: the search for windows in Wan skips 12 of 50 steps (0.24).
- VSA: arXiv 2505.13389, FastVideo's documentation, and ModelOpt's default configuration.
"""

from __future__ import annotations

from typing import Any

import torch

from ..functional.patterns import Radial, SlidingTile, VideoSparse
from ..patterns.radial import RadialRule
from .schedule import Schedule

Preset = dict[str, Any]


def wan_720p(*, precision: str = "native") -> Preset:
    """Wan 2.1 and 2.2 14B at 720p: sliding tiles, about an eighth of all pairs; a quarter of the
    steps dense.

    Window: the smaller one of STA's table 1, 18 x 24 x 24 tokens. Steps: STA.
    """
    return {
        "pattern": SlidingTile((3, 3, 3)),
        "schedule": Schedule(dense_first_steps=0.24),
        "precision": precision,
    }


def wan_480p(*, precision: str = "native") -> Preset:
    """Wan at 480p, where tiles are few: wider windows.

    Window: chosen here. Steps and the dense layer: Radial's script for Wan 2.1.
    """
    return {
        "pattern": SlidingTile((3, 3, 5)),
        "schedule": Schedule(dense_first_steps=0.24, dense_layers=1),
        "precision": precision,
    }


def wan_few_steps(*, precision: str = "native") -> Preset:
    """Wan with a LoRA of 4 to 8 steps: the first quarter of the steps dense, which is one of 4.

    Window: chosen here. Steps: Radial's scripts, 1 of 4 (lightx2v) and 2 of 8 (FusionX).
    """
    return {
        "pattern": SlidingTile((3, 3, 5)),
        "schedule": Schedule(dense_first_steps=0.25),
        "precision": precision,
    }


def wan_radial(*, precision: str = "native") -> Preset:
    """Wan 2.1 with radial attention: decay 0.2, one dense layer, a quarter of the steps dense.

    All numbers: Radial's script for Wan 2.1. (For Wan 2.2 it has decay 0.8 and 11 of 40 steps.)
    """
    return {
        "pattern": Radial(RadialRule.for_model("wan", decay_factor=0.2)),
        "schedule": Schedule(dense_layers=1, dense_first_steps=0.24),
        "precision": precision,
    }


def fast_wan(*, precision: str = "native") -> Preset:
    """Models that were trained with video sparse attention: a fifth of the tiles, the learned gate,
    no dense step. They are of few steps (3) themselves.

    Ratio: FastVideo distilled the 1.3B model at a sparsity of 0.8 (the 14B one at 0.9: ratio 0.1).
    """
    pattern = VideoSparse(top_k_ratio=0.2, score_dtype=torch.bfloat16)
    return {"pattern": pattern, "precision": precision}


def hunyuan_720p(*, precision: str = "native") -> Preset:
    """HunyuanVideo and 1.5 at 720p: sliding tiles, a tenth of all pairs; a quarter of the steps
    dense.

    Window: the smaller one of STA's table 1, 18 x 24 x 24 tokens (9 % of the pairs); quality
    first: the larger one, (5, 5, 5) tiles, 42 %. Steps: Radial's script for HunyuanVideo, 12 of 50.
    """
    return {
        "pattern": SlidingTile((3, 3, 3)),
        "schedule": Schedule(dense_first_steps=0.24),
        "precision": precision,
    }


def hunyuan_few_steps(*, precision: str = "native") -> Preset:
    """HunyuanVideo distilled to 4 to 8 steps: wider windows, the first quarter of the steps dense.

    Window: the larger one of STA's table 1, 30 x 40 x 40 tokens. Steps: Radial's rule of a quarter.
    """
    return {
        "pattern": SlidingTile((5, 5, 5)),
        "schedule": Schedule(dense_first_steps=0.25),
        "precision": precision,
    }


def hunyuan_radial(*, precision: str = "native") -> Preset:
    """HunyuanVideo with radial attention: decay 0.95; a quarter of the steps dense.

    All numbers: Radial's script for HunyuanVideo, 12 of 50 steps.
    """
    return {
        "pattern": Radial(RadialRule.for_model("hunyuan", decay_factor=0.95)),
        "schedule": Schedule(dense_first_steps=0.24),
        "precision": precision,
    }


def cogvideox_480p(*, precision: str = "native") -> Preset:
    """CogVideoX 2b and 5b at 480p, and 1.5: radial attention, two dense layers, a tenth of the
    steps dense.

    All numbers: the defaults of radial attention for CogVideoX, 2 layers and 5 of 50 steps.
    """
    return {
        "pattern": Radial(),
        "schedule": Schedule(dense_layers=2, dense_first_steps=0.1),
        "precision": precision,
    }


def ltx2(*, precision: str = "native") -> Preset:
    """LTX-2 and LTX-Video: the tiles that score highest, three of ten; a quarter of the steps
    dense.

    Ratio: ModelOpt's VSA configuration for LTX-2. Steps: Radial's rule of a quarter.
    """
    return {
        "pattern": VideoSparse(top_k_ratio=0.3),
        "schedule": Schedule(dense_first_steps=0.25),
        "precision": precision,
    }


def ltx2_few_steps(*, precision: str = "native") -> Preset:
    """LTX-2 distilled to 8 steps: half of the tiles, the first two steps dense.

    Ratio: ModelOpt's example for LTX-2 (``--top-k-ratio`` 0.5). Steps: Radial's rule of a quarter.
    """
    return {
        "pattern": VideoSparse(top_k_ratio=0.5),
        "schedule": Schedule(dense_first_steps=0.25),
        "precision": precision,
    }


def mochi(*, precision: str = "native") -> Preset:
    """Mochi at 480p: sliding tiles; a fifth of the steps dense. Both chosen here."""
    return {
        "pattern": SlidingTile((3, 3, 5)),
        "schedule": Schedule(dense_first_steps=0.2),
        "precision": precision,
    }


# Shorter names of the same.
hunyuan_video, cogvideox, ltx = hunyuan_720p, cogvideox_480p, ltx2
