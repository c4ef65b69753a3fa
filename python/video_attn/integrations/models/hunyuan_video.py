"""HunyuanVideo: 20 dual and 40 single blocks over one sequence of [video, text], text padded."""

from __future__ import annotations

from typing import Any

import torch

from ...functional.video_tokens import VideoTokens
from ...patterns.radial import RadialRule
from .family import Family, numbered


def _tokens(transformer: Any, inputs: dict[str, Any]) -> VideoTokens:
    """The first tokens of a prompt are valid, as many as its mask counts."""
    config = transformer.config
    _, _, frames, height, width = inputs["hidden_states"].shape
    patch = config.patch_size
    grid = frames // config.patch_size_t, height // patch, width // patch
    mask = inputs["encoder_attention_mask"]
    return VideoTokens(grid, mask.shape[1], valid_text=mask.sum(1, dtype=torch.int32))


FAMILY = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    arguments=(
        "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask",
    ),
    attention_layers=lambda transformer: numbered(
        transformer, ("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")
    ),
    tokens=_tokens,
    rule=RadialRule.for_model("hunyuan"),
    temporal_patch=lambda config: config.patch_size_t,
    masks_text=True,
)  # fmt: skip
