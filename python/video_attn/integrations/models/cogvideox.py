"""CogVideoX 2b, 5b and 1.5: one sequence of [text, video], all text tokens valid."""

from __future__ import annotations

from typing import Any

from ...functional.video_tokens import VideoTokens
from ...patterns.radial import RadialRule
from .family import Family, numbered


def _tokens(transformer: Any, inputs: dict[str, Any]) -> VideoTokens:
    """From the latents [B, T, C, H, W] and the text embeddings [B, tokens, C]."""
    config = transformer.config
    _, latents, _, height, width = inputs["hidden_states"].shape
    frames = -(-latents // (config.patch_size_t or 1))
    grid = frames, height // config.patch_size, width // config.patch_size
    return VideoTokens(grid, inputs["encoder_hidden_states"].shape[1], text_first=True)


FAMILY = Family(
    name="CogVideoX",
    transformers=("CogVideoXTransformer3DModel",),
    arguments=("hidden_states", "encoder_hidden_states", "timestep"),
    attention_layers=lambda transformer: numbered(transformer, ("transformer_blocks", "attn1")),
    tokens=_tokens,
    rule=RadialRule.for_model("cogvideox"),
    temporal_patch=lambda config: config.patch_size_t or 1,
)
