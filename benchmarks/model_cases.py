"""The video transformers at their real sizes, a few layers of each, and one call of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from video_attn import VideoTokens
from video_attn.layout import Triple

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class ModelCase:
    """A model: its class, what of its configuration is not the default, and a call.

    ``small`` is a configuration of the same kind for a CPU; ``inputs`` makes the arguments of a
    call for latents of ``latents`` (T, H, W), by ``make(*shape)`` for random features and ``video``
    for the latents.
    """

    title: str
    kind: str
    config: dict[str, Any]
    small: dict[str, Any]
    latents: Triple
    tokens: Triple
    inputs: Callable[[Any, Tensor, Make], dict[str, Any]]
    channels: int
    batch: int = 1


def smooth_video(batch: int, channels: int, latents: Triple) -> Tensor:
    """Random latents [B, C, T, H, W] that vary slowly in space and time, as those of a video."""
    t, h, w = latents
    coarse = torch.randn(batch, channels, max(2, t // 4), max(2, h // 8), max(2, w // 8))
    smooth = F.interpolate(coarse, size=latents, mode="trilinear", align_corners=True)
    return smooth + 0.1 * torch.randn_like(smooth)


def _text_mask(make: Make, length: int, valid: int) -> Tensor:
    mask = torch.arange(length, device=make(1).device) < valid
    return mask[None].long()


def _wan(config: Any, video: Tensor, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": video,
        "timestep": torch.full((1,), 500.0, device=video.device),
        "encoder_hidden_states": make(1, 512, config.text_dim),
    }


def _hunyuan(config: Any, video: Tensor, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": video,
        "timestep": torch.full((1,), 500, device=video.device),
        "encoder_hidden_states": make(1, 256, config.text_embed_dim),
        "encoder_attention_mask": _text_mask(make, 256, 90),
        "pooled_projections": make(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0, device=video.device, dtype=video.dtype),
    }


def _cogvideox(config: Any, video: Tensor, make: Make) -> dict[str, Any]:
    _, _, t, h, w = video.shape
    tokens = t * (h // 2) * (w // 2)
    angles = torch.rand(tokens, config.attention_head_dim, device=video.device) * 6
    rotary = (angles.cos(), angles.sin()) if config.use_rotary_positional_embeddings else None
    return {
        "hidden_states": video.transpose(1, 2).contiguous(),
        "encoder_hidden_states": make(video.shape[0], config.max_text_seq_length,
                                      config.text_embed_dim),
        "timestep": torch.full((video.shape[0],), 500, device=video.device),
        "image_rotary_emb": rotary,
    }  # fmt: skip


def _ltx2(config: Any, video: Tensor, make: Make) -> dict[str, Any]:
    batch, _, t, h, w = video.shape
    return {
        "hidden_states": video.flatten(2).transpose(1, 2).contiguous(),
        "audio_hidden_states": make(batch, 126, config.audio_in_channels),
        "encoder_hidden_states": make(batch, 256, config.caption_channels),
        "audio_encoder_hidden_states": make(batch, 256, config.caption_channels),
        "timestep": torch.full((batch,), 500.0, device=video.device),
        "num_frames": t,
        "height": h,
        "width": w,
        "fps": 25.0,
        "audio_num_frames": 126,
    }


def _mochi(config: Any, video: Tensor, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": video,
        "encoder_hidden_states": make(1, 256, config.text_embed_dim),
        "timestep": torch.full((1,), 500, device=video.device),
        "encoder_attention_mask": _text_mask(make, 256, 90).bool(),
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CASES = {
    "wan": ModelCase(
        "Wan 14B, 720p", "WanTransformer3DModel", {"num_layers": 4},
        _HEADS | {"num_layers": 1, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32},
        (21, 90, 160), (21, 45, 80), _wan, 16,
    ),
    "hunyuan": ModelCase(
        "HunyuanVideo, 720p", "HunyuanVideoTransformer3DModel",
        {"num_layers": 1, "num_single_layers": 1},
        _HEADS | {
            "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
        },
        (33, 90, 160), (33, 45, 80), _hunyuan, 16,
    ),
    "cogvideox": ModelCase(
        "CogVideoX-5b, batch 2", "CogVideoXTransformer3DModel",
        {
            "num_layers": 2, "num_attention_heads": 48, "use_rotary_positional_embeddings": True,
            "sample_height": 60, "sample_width": 90, "sample_frames": 49,
        },
        _HEADS | {
            "num_layers": 1, "use_rotary_positional_embeddings": True, "text_embed_dim": 16,
            "time_embed_dim": 4, "sample_height": 12, "sample_width": 20, "sample_frames": 9,
        },
        (13, 60, 90), (13, 30, 45), _cogvideox, 16, 2,
    ),
    "ltx2": ModelCase(
        "LTX-2, 32,640 tokens", "LTX2VideoTransformer3DModel", {"num_layers": 2},
        _HEADS | {
            "num_layers": 1, "cross_attention_dim": 32, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
            "caption_channels": 16, "rope_double_precision": False,
        },
        (17, 40, 48), (17, 40, 48), _ltx2, 128,
    ),
    "mochi": ModelCase(
        "Mochi, 480p", "MochiTransformer3DModel", {"num_layers": 2},
        _HEADS | {"num_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 16,
                  "time_embed_dim": 4},
        (28, 60, 106), (28, 30, 53), _mochi, 12,
    ),
}  # fmt: skip
SMALL_LATENTS: Triple = (3, 12, 20)


def video_tokens(case: ModelCase, small: bool) -> VideoTokens:
    """The tokens of the video in a call of the model, without text."""
    if not small:
        return VideoTokens(case.tokens)
    sizes = zip(SMALL_LATENTS, case.latents, case.tokens, strict=True)
    t, h, w = (small // (latent // token) for small, latent, token in sizes)
    return VideoTokens((t, h, w))


def make_model(case: ModelCase, device: torch.device, dtype: torch.dtype, small: bool) -> Any:
    """The model with random weights, made where it runs."""
    import diffusers

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            kind = getattr(diffusers, case.kind)
            model = kind(**(case.small if small else case.config)).eval()
    finally:
        torch.set_default_dtype(before)
    for name in model._keep_in_fp32_modules or ():  # as from_pretrained does
        for path, module in model.named_modules():
            if name in path.split("."):
                module.float()
    return model.requires_grad_(False)


def make_inputs(case: ModelCase, model: Any, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    """A call of the model, on its device."""
    torch.manual_seed(1)
    device = next(model.parameters()).device

    def make(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    latents = SMALL_LATENTS if small else case.latents
    video = smooth_video(case.batch, case.channels, latents).to(device, dtype)
    return case.inputs(model.config, video, make)
