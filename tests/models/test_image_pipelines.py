"""Pipelines that start from an image or a video, of the other families; Wan's are in
test_pipelines.py.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import transformers
from PIL import Image
from tiny_cogvideox import tiny_pipeline
from tiny_models import MODELS
from tiny_pipelines import hunyuan15, latents, ltx2, prompts

from video_attn import SlidingTile
from video_attn.integrations import Schedule, apply

STEPS, TILE = 4, (2, 2, 2)


def picture(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def cogvideox(kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    parts = tiny_pipeline(layers=2).components
    if kind == "CogVideoXImageToVideoPipeline":  # the image is twice the channels
        config = dict(parts["transformer"].config) | {"in_channels": 8}
        torch.manual_seed(0)
        parts["transformer"] = diffusers.CogVideoXTransformer3DModel.from_config(config).eval()
    call = {"prompt": "a cat", "height": 64, "width": 80, "max_sequence_length": 16}
    return getattr(diffusers, kind)(**parts), call | options


def ltx(kind: str) -> tuple[Any, dict[str, Any]]:
    """The first frame is given: it has timesteps of its own, 0."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=kind == "LTXImageToVideoPipeline"
    )
    pipe = getattr(diffusers, kind)(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None,
        transformer=MODELS["ltx"].model(),
    )  # fmt: skip
    call = {"image": picture(160, 128), "height": 128, "width": 160, "num_frames": 17}
    texts = {name: x[:1] for name, x in prompts().items()}
    return pipe, call | texts


def ltx2_from_image() -> tuple[Any, dict[str, Any]]:
    pipe, call = ltx2()
    texts = {name: x[:1] for name, x in prompts().items()}
    image = {"image": picture(call["width"], call["height"])}
    return diffusers.LTX2ImageToVideoPipeline(**pipe.components), call | texts | image


def hunyuan15_from_image() -> tuple[Any, dict[str, Any]]:
    """Its image tokens are valid, and stand in the sequence."""
    pipe, call = hunyuan15()
    torch.manual_seed(1)
    encoder = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=12, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        image_size=54, patch_size=2,
    ))  # fmt: skip
    processor = transformers.SiglipImageProcessor(size={"height": 54, "width": 54})
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(
        **pipe.components, image_encoder=encoder.eval(), feature_extractor=processor
    )
    sizes = ("height", "width")
    texts = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    return pipe, {k: v for k, v in texts.items() if k not in sizes} | {"image": picture(80, 64)}


# The pipeline, and how many attentions a step has.
PIPELINES = {
    "cogvideox, image": (
        lambda: cogvideox("CogVideoXImageToVideoPipeline", image=picture(80, 64), num_frames=17), 2
    ),
    "cogvideox, video": (
        lambda: cogvideox("CogVideoXVideoToVideoPipeline", video=[picture(80, 64)] * 17,
                          strength=1.0), 2
    ),
    "ltx, image": (lambda: ltx("LTXImageToVideoPipeline"), 2),
    "ltx, condition": (lambda: ltx("LTXConditionPipeline"), 2),
    "ltx2, image": (ltx2_from_image, 6),
    "hunyuan15, image": (hunyuan15_from_image, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_from_an_image_or_a_video(name: str) -> None:
    make, attentions = PIPELINES[name]
    pipe, options = make()
    dense = latents(pipe, options, STEPS)
    schedule = Schedule(dense_first_steps=1)
    with apply(pipe, SlidingTile((1, 1, 2), TILE), schedule=schedule) as handle:
        sparse = latents(pipe, options, STEPS)
        assert (handle.sparse_calls, handle.dense_calls) == (
            (STEPS - 1) * attentions, attentions
        )  # fmt: skip
    with apply(pipe, SlidingTile((99, 99, 99), TILE), schedule=schedule):
        everything = latents(pipe, options, STEPS)
    assert float((everything - dense).abs().max() / dense.std()) < 1e-4
    assert float((sparse - dense).abs().max() / dense.std()) > 1e-4
    assert torch.equal(latents(pipe, options, STEPS), dense)
