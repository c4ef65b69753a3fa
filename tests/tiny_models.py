"""Tiny random transformers of every family that apply() knows, and one call of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import diffusers
import torch
from torch import Tensor, nn

from video_attn.layout import Triple

GRID: Triple = (3, 4, 5)  # tokens; odd sizes, so that tiles are ragged
TEXT = 7
VALID = (7, 3)  # valid text of the two batch items


@dataclass
class Tiny:
    """How to make a model, a call of it, and what is known of its sequence."""

    kind: str
    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    layers: int
    text: int = 0
    text_first: bool = False
    valid: tuple[int, ...] | None = None
    heads: int = 2
    grid: Triple = GRID
    rename: dict[str, str] = field(default_factory=dict)

    def model(self, weights: int = 0) -> Any:
        return self.with_config(weights)

    def with_config(self, weights: int = 0, **changes: Any) -> Any:
        """The model with other values in its configuration."""
        torch.manual_seed(weights)
        model = getattr(diffusers, self.kind)(**self.config | changes).eval()
        sharpen(model)
        return model


def sharpen(model: nn.Module) -> None:
    """Random projections make attention almost uniform; sharper ones make a mask matter."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in ("norm_q", "norm_added_q") and weight is not None:
            nn.init.constant_(weight, 3.0)


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The video that one call of the model gives."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator)


def text_mask(batch: int, length: int = TEXT) -> Tensor:
    valid = torch.tensor([VALID[i % 2] for i in range(batch)])
    return (torch.arange(length) < valid[:, None]).long()


_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


def _wan(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 3, 8, 10),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random(batch, 6, 16),
    }


def _vace(batch: int) -> dict[str, Any]:
    return _wan(batch) | {"control_hidden_states": random(batch, 8, 3, 8, 10)}


def _animate(batch: int) -> dict[str, Any]:
    return _wan(batch) | {
        "hidden_states": random(batch, 12, 3, 8, 10),
        "pose_hidden_states": random(batch, 4, 2, 8, 10),
        "face_pixel_values": random(batch, 3, 5, 16, 16),
        "encoder_hidden_states_image": random(batch, 4, 16),
        "encoder_hidden_states": random(batch, 512, 16),
    }


def _cogvideox(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 3, 4, 8, 10),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
    }


def _hunyuan(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, *GRID),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch),
        "pooled_projections": random(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def _hunyuan15(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, *GRID),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch),
        "encoder_hidden_states_2": random(batch, 4, 8),
        "encoder_attention_mask_2": (torch.arange(4) < 2).long().expand(batch, 4).contiguous(),
        "image_embeds": torch.zeros(batch, 3, 12),
    }


def _mochi(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 3, 8, 10),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": text_mask(batch).bool(),
    }


def _ltx(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 60, 8),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(batch),
        "num_frames": 3,
        "height": 4,
        "width": 5,
    }


def _ltx2(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 60, 4),
        "audio_hidden_states": random(batch, 5, 4),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "audio_encoder_hidden_states": random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(batch),
        "audio_encoder_attention_mask": text_mask(batch),
        "num_frames": 3,
        "height": 4,
        "width": 5,
        "fps": 25.0,
        "audio_num_frames": 5,
    }


MODELS = {
    "wan": Tiny("WanTransformer3DModel", _WAN, _wan, 2),
    "vace": Tiny(
        "WanVACETransformer3DModel",
        _WAN | {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 8}, _vace, 5,
    ),
    "animate": Tiny(
        "WanAnimateTransformer3DModel",
        _WAN | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 16, "added_kv_proj_dim": 24,
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4,
            "motion_encoder_dim": 16, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        }, _animate, 2,
    ),
    "skyreels": Tiny("SkyReelsV2Transformer3DModel", _WAN, _wan, 2),
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 2, "text_embed_dim": 16, "num_layers": 2, "sample_width": 10,
            "sample_height": 8, "sample_frames": 9, "patch_size": 2, "max_text_seq_length": TEXT,
            "temporal_compression_ratio": 4,
        }, _cogvideox, 2, TEXT, True,
    ),
    "hunyuan": Tiny(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
            "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1,
            "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16,
            "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        }, _hunyuan, 2, TEXT, False, VALID,
    ),
    "hunyuan15": Tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1,
            "patch_size_t": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12,
            "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v",
        }, _hunyuan15, 2, TEXT + 4 + 3, False, tuple(n + 2 for n in VALID),
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, "patch_size": 1, "patch_size_t": 1,
            "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
            "num_layers": 2, "caption_channels": 16,
        }, _ltx, 2,
    ),
    "ltx2": Tiny(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "patch_size": 1, "patch_size_t": 1,
            "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
            "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2,
            "caption_channels": 16, "rope_double_precision": False,
        }, _ltx2, 2,
    ),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        {
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
            "time_embed_dim": 4, "max_sequence_length": TEXT,
        }, _mochi, 2, TEXT, False, VALID,
    ),
}  # fmt: skip
