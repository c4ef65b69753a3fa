"""HunyuanVideo 1.5: [video, image and two texts], of which the valid ones stand first."""

from __future__ import annotations

from typing import Any

from ...functional.video_tokens import VideoTokens
from ...patterns.radial import RadialRule
from .family import Family, numbered


def _tokens(transformer: Any, inputs: dict[str, Any]) -> VideoTokens:
    """Valid are what both masks count and, unless it is all zero, the image."""
    config = transformer.config
    _, _, frames, height, width = inputs["hidden_states"].shape
    patch = config.patch_size
    grid = frames // config.patch_size_t, height // patch, width // patch
    text, glyphs = inputs["encoder_attention_mask"], inputs["encoder_attention_mask_2"]
    image = inputs["image_embeds"]
    valid = text.bool().sum(1) + glyphs.bool().sum(1) + (image != 0).any() * image.shape[1]
    length = text.shape[1] + glyphs.shape[1] + image.shape[1]
    return VideoTokens(grid, length, valid_text=valid)


FAMILY = Family(
    name="HunyuanVideo 1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    arguments=(
        "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask",
        "timestep_r", "encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds",
    ),
    attention_layers=lambda transformer: numbered(transformer, ("transformer_blocks", "attn")),
    tokens=_tokens,
    rule=RadialRule.for_model("hunyuan"),
    temporal_patch=lambda config: config.patch_size_t,
    masks_text=True,
    large_mask=True,
)  # fmt: skip
