"""Mochi: [video, text], attended one batch item at a time with its valid text alone."""

from __future__ import annotations

from typing import Any

from ...functional.video_tokens import VideoTokens
from ...patterns.radial import RadialRule
from .family import Family, numbered


def _tokens(transformer: Any, inputs: dict[str, Any]) -> VideoTokens:
    """The grid; how much text there is, each call of attention shows."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    patch = transformer.config.patch_size
    return VideoTokens((frames, height // patch, width // patch))


FAMILY = Family(
    name="Mochi",
    transformers=("MochiTransformer3DModel",),
    arguments=(
        "hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask",
    ),
    attention_layers=lambda transformer: numbered(transformer, ("transformer_blocks", "attn1")),
    tokens=_tokens,
    rule=RadialRule(),
    temporal_compression=6,
    gathers_text=True,
)  # fmt: skip
