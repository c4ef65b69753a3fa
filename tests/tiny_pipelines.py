"""Tiny pipelines of the families beside Wan and CogVideoX, without text encoders: embeddings go in.

Each maker gives (pipeline, arguments of a call); :func:`latents` what a run gives.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image
from tiny_models import MODELS, TEXT, random, text_mask
from tiny_wan import tiny_vae
from torch import Tensor

SIZE = {"height": 64, "width": 80}  # 4 x 5 tokens of Wan's and Mochi's


def ltx() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None,
        text_encoder=None, tokenizer=None, transformer=MODELS["ltx"].model(),
    )  # fmt: skip
    return pipe, {"height": 128, "width": 160, "num_frames": 17, **prompts()}


def mochi() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, transformer=MODELS["mochi"].model(),
    )  # fmt: skip
    options = prompts()
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        options[name] = options[name].bool()
    return pipe, {**SIZE, "num_frames": 13, **options}


def hunyuan() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=MODELS["hunyuan"].model(), vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=None,
        tokenizer_2=None,
    )  # fmt: skip
    return pipe, {
        "height": 32, "width": 48, "num_frames": 9, "prompt_embeds": random(2, TEXT, 16),
        "prompt_attention_mask": text_mask(2), "pooled_prompt_embeds": random(2, 8),
    }  # fmt: skip


def hunyuan15() -> tuple[Any, dict[str, Any]]:
    """Two texts, and a guider that calls the transformer twice in each step."""
    from diffusers.guiders import ClassifierFreeGuidance

    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1,
        downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    model = MODELS["hunyuan15"].with_config(in_channels=2 * 4 + 1)
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, transformer=model, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=None,
        tokenizer_2=None, guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip
    texts: dict[str, Any] = {}
    for start in ("", "negative_"):
        texts[f"{start}prompt_embeds"] = random(2, TEXT, 16) * (start == "")
        texts[f"{start}prompt_embeds_mask"] = text_mask(2)
        texts[f"{start}prompt_embeds_2"] = random(2, 4, 8)
        texts[f"{start}prompt_embeds_mask_2"] = text_mask(2, 4)
    return pipe, {**SIZE, "num_frames": 9, **texts}


def ltx2() -> tuple[Any, dict[str, Any]]:
    """Video and audio: everything but the text encoder is there."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        patch_size=8, decoder_causal=False, temporal_compression_ratio=4,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2,
        mel_bins=8,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=8, text_proj_in_factor=2, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1]],
    )  # fmt: skip
    pipe = diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        audio_vae=audio_vae, text_encoder=None, tokenizer=None, connectors=connectors,
        transformer=MODELS["ltx2"].with_config(caption_channels=8), vocoder=vocoder,
    )  # fmt: skip
    return pipe, {"height": 64, "width": 96, "num_frames": 9, **prompts()}


def skyreels() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2Pipeline(
        tokenizer=None, text_encoder=None, transformer=MODELS["skyreels"].model(), vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )  # fmt: skip
    return pipe, {**SIZE, "num_frames": 9, **embeddings(2)}


def vace() -> tuple[Any, dict[str, Any]]:
    """Of one prompt, which is all that it takes."""
    model = MODELS["vace"].with_config(in_channels=16, out_channels=16, vace_in_channels=96)
    pipe = diffusers.WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=tiny_vae(), transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return pipe, {**SIZE, "num_frames": 9, **embeddings(1)}


def animate() -> tuple[Any, dict[str, Any]]:
    """A reference image with its encoder, poses and faces."""
    torch.manual_seed(1)
    encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    ))  # fmt: skip
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    model = MODELS["animate"].with_config(in_channels=36, latent_channels=16, out_channels=16)
    pipe = diffusers.WanAnimatePipeline(
        tokenizer=None, text_encoder=None, vae=tiny_vae(), transformer=model,
        image_encoder=encoder.eval(), image_processor=processor,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip

    def frames(width: int, height: int) -> list[Image.Image]:
        return [Image.new("RGB", (width, height), (20 * n, 90, 140)) for n in range(5)]

    return pipe, {
        **SIZE, "image": frames(80, 64)[2], "pose_video": frames(80, 64),
        "face_video": frames(16, 16), "segment_frame_length": 5, "guidance_scale": 3.0,
        **embeddings(1, 512),
    }  # fmt: skip


def embeddings(batch: int, length: int = 6) -> dict[str, Tensor]:
    """Prompts of Wan's pipelines."""
    return {
        "prompt_embeds": random(batch, length, 16),
        "negative_prompt_embeds": torch.zeros(batch, length, 16),
    }


def prompts() -> dict[str, Any]:
    """Two prompts of different length, with guidance."""
    return {
        "prompt_embeds": random(2, TEXT, 16),
        "prompt_attention_mask": text_mask(2),
        "negative_prompt_embeds": torch.zeros(2, TEXT, 16),
        "negative_prompt_attention_mask": text_mask(2),
    }


# The pipeline, and how often a step calls the transformer.
PIPELINES = {
    "ltx": (ltx, 1),
    "ltx2": (ltx2, 3),  # with both texts, without a part of attention, without the other modality
    "mochi": (mochi, 1),
    "hunyuan": (hunyuan, 1),
    "hunyuan15": (hunyuan15, 2),
    "skyreels": (skyreels, 2),
    "vace": (vace, 2),
    "animate": (animate, 2),
}


def latents(pipe: Any, options: dict[str, Any], steps: int) -> Tensor:
    """fp32: what a run gives before the VAE."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    run = pipe(
        **options, num_inference_steps=steps, output_type="latent", generator=generator
    )  # fmt: skip
    return run.frames.float()
