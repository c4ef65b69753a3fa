"""Tiny Wan pipelines without a text encoder: embeddings go in, latents come out, in a moment."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from tiny_models import random, sharpen
from torch import Tensor

from video_attn import SlidingTile
from video_attn.integrations import Schedule

HEIGHT, WIDTH, FRAMES = 64, 96, 9  # 3 latent frames of 4 x 6 tokens
STEPS, LAYERS = 4, 2
PATTERN = SlidingTile((1, 1, 2), (2, 2, 2))
FIRST = Schedule(dense_first_steps=1)
CALLS = 2 * LAYERS  # of a step: guidance runs the transformer twice


def tiny_vae() -> Any:
    torch.manual_seed(1)
    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def tiny_transformer(channels: int = 16) -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels,
        out_channels=16, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=LAYERS,
    ).eval()  # fmt: skip
    sharpen(model)
    return model


def tiny_wan(
    kind: str = "WanPipeline", transformer: Any = None, scheduler: Any = None, **options: Any
) -> Any:
    """A pipeline of ``kind`` around ``transformer``; default one of its own."""
    if scheduler is None:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    pipe = getattr(diffusers, kind)(
        tokenizer=None, text_encoder=None, vae=tiny_vae(), scheduler=scheduler,
        transformer=tiny_transformer() if transformer is None else transformer, **options,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **options: Any) -> Tensor:
    """The video before the VAE, the same for the same pipeline."""
    arguments: dict[str, Any] = {
        "prompt_embeds": random(1, 6, 16),
        "negative_prompt_embeds": torch.zeros(1, 6, 16),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "generator": torch.Generator("cpu").manual_seed(3),
        "output_type": "latent",
    }
    arguments |= options
    return pipe(**{k: v for k, v in arguments.items() if v is not None}).frames


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return float((got - expected).abs().max() / expected.std())


def counts(handle: Any) -> tuple[int, int]:
    """(sparse, dense) calls of an applied pattern."""
    return handle.sparse_calls, handle.dense_calls
