"""Wan 2.1 and 2.2, VACE, Wan-Animate, SkyReels V2: the video alone, text by cross-attention."""

from __future__ import annotations

from typing import Any

from ...functional.video_tokens import VideoTokens
from ...patterns.radial import RadialRule
from .family import AttentionLayer, Family, numbered


def _attention_layers(transformer: Any) -> list[AttentionLayer]:
    layers = numbered(transformer, ("blocks", "attn1"))
    for index, block in enumerate(getattr(transformer, "vace_blocks", ())):
        # A control block runs beside the block that it feeds, and shares its number.
        fed = transformer.config.vace_layers[index]
        layers.append(AttentionLayer(f"vace_blocks.{index}.attn1", block.attn1, fed))
    return layers


def _tokens(transformer: Any, inputs: dict[str, Any]) -> VideoTokens:
    """From the latents [B, C, T, H, W]: any size, and the reference frame of Wan-Animate too."""
    sizes = inputs["hidden_states"].shape[2:]
    t, h, w = (n // p for n, p in zip(sizes, transformer.config.patch_size, strict=True))
    return VideoTokens((t, h, w))


FAMILY = Family(
    name="Wan",
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    ),
    arguments=("hidden_states", "timestep", "encoder_hidden_states"),
    attention_layers=_attention_layers,
    tokens=_tokens,
    rule=RadialRule.for_model("wan"),
    temporal_patch=lambda config: config.patch_size[0],
    rotary={"WanAttnProcessor": "rotary_emb", "SkyReelsV2AttnProcessor": "rotary_emb"},
)
