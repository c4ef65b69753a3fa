"""Starting points for the models: ``apply(pipe, **presets.wan_720p())``.

Each is a dictionary of arguments of :func:`video_attn.integrations.apply`, to be changed at will.
Dense steps are shares of all steps, so that runs of few and of many steps keep the same part.
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
    """
    return {
        "pattern": SlidingTile((3, 3, 3)),
        "schedule": Schedule(dense_first_steps=0.24),
        "precision": precision,
    }


def wan_480p(*, precision: str = "native") -> Preset:
    """Wan at 480p, where tiles are few: wider windows."""
    return {
        "pattern": SlidingTile((3, 3, 5)),
        "schedule": Schedule(dense_first_steps=0.24, dense_layers=1),
        "precision": precision,
    }


def wan_few_steps(*, precision: str = "native") -> Preset:
    """Wan with a LoRA of 4 to 8 steps: the first quarter of the steps dense, which is one of 4."""
    return {
        "pattern": SlidingTile((3, 3, 5)),
        "schedule": Schedule(dense_first_steps=0.25),
        "precision": precision,
    }


def wan_radial(*, precision: str = "native") -> Preset:
    """Wan with radial attention, as published: decay 0.2, one dense layer, a quarter of the steps
    dense.
    """
    return {
        "pattern": Radial(RadialRule.for_model("wan", decay_factor=0.2)),
        "schedule": Schedule(dense_layers=1, dense_first_steps=0.24),
        "precision": precision,
    }


def fast_wan(*, precision: str = "native") -> Preset:
    """Models that were trained with video sparse attention: a fifth of the tiles, the learned gate,
    no dense step.
    """
    pattern = VideoSparse(top_k_ratio=0.2, score_dtype=torch.bfloat16)
    return {"pattern": pattern, "precision": precision}


def hunyuan_video(*, precision: str = "native") -> Preset:
    """HunyuanVideo and 1.5 at 720p: sliding tiles; a quarter of the steps dense."""
    return {
        "pattern": SlidingTile((3, 3, 3)),
        "schedule": Schedule(dense_first_steps=0.24),
        "precision": precision,
    }


def hunyuan_radial(*, precision: str = "native") -> Preset:
    """HunyuanVideo with radial attention as published, decay 0.95; a quarter of the steps dense."""
    return {
        "pattern": Radial(RadialRule.for_model("hunyuan", decay_factor=0.95)),
        "schedule": Schedule(dense_first_steps=0.24),
        "precision": precision,
    }


def cogvideox(*, precision: str = "native") -> Preset:
    """CogVideoX 2b, 5b and 1.5: radial attention, two dense layers, a tenth of the steps dense."""
    return {
        "pattern": Radial(),
        "schedule": Schedule(dense_layers=2, dense_first_steps=0.1),
        "precision": precision,
    }


def ltx(*, precision: str = "native") -> Preset:
    """LTX-Video and LTX-2: the tiles that score highest, three of ten; a quarter of the steps
    dense.
    """
    return {
        "pattern": VideoSparse(top_k_ratio=0.3),
        "schedule": Schedule(dense_first_steps=0.25),
        "precision": precision,
    }


def mochi(*, precision: str = "native") -> Preset:
    """Mochi at 480p: sliding tiles; a fifth of the steps dense."""
    return {
        "pattern": SlidingTile((3, 3, 5)),
        "schedule": Schedule(dense_first_steps=0.2),
        "precision": precision,
    }
