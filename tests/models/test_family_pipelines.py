"""The pipelines of the other families: their loops, schedulers and guidance, attention applied.

Wan's are in test_pipelines.py, CogVideoX's in test_cogvideox.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_models import MODELS, TEXT, output, random, text_mask
from torch import Tensor

from video_attn import SlidingTile
from video_attn.integrations import Schedule, apply

STEPS, TILE = 4, (2, 2, 2)


def ltx() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None,
        text_encoder=None, tokenizer=None, transformer=MODELS["ltx"].model(),
    )  # fmt: skip
    return pipe, {"height": 128, "width": 160, "num_frames": 17, **prompts(pipe)}


def mochi() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, transformer=MODELS["mochi"].model(),
    )  # fmt: skip
    options = prompts(pipe)
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        options[name] = options[name].bool()
    return pipe, {"height": 64, "width": 80, "num_frames": 13, **options}


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


def skyreels() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2Pipeline(
        tokenizer=None, text_encoder=None, transformer=MODELS["skyreels"].model(), vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )  # fmt: skip
    return pipe, {
        "height": 64, "width": 80, "num_frames": 9, "prompt_embeds": random(2, 6, 16),
        "negative_prompt_embeds": torch.zeros(2, 6, 16),
    }  # fmt: skip


def prompts(pipe: Any) -> dict[str, Any]:
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
    "mochi": (mochi, 1),
    "hunyuan": (hunyuan, 1),
    "skyreels": (skyreels, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_steps_and_sparsity_of_a_pipeline(name: str, dtype: torch.dtype) -> None:
    """In bf16 the timesteps that the transformer is given are rounded; the steps are right."""
    make, calls = PIPELINES[name]
    pipe, options = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.to(dtype)
    options = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
               for k, v in options.items()}  # fmt: skip

    def latents() -> Tensor:
        return pipe(
            **options, num_inference_steps=STEPS, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(3),
        ).frames.float()  # fmt: skip

    dense = latents()
    schedule = Schedule(dense_first_steps=1, dense_last_steps=1)
    layers = MODELS[name].layers * calls
    with apply(pipe, SlidingTile((1, 1, 2), TILE), schedule=schedule) as handle:
        sparse = latents()
        assert (handle.sparse_calls, handle.dense_calls) == ((STEPS - 2) * layers, 2 * layers)
    with apply(pipe, SlidingTile((9, 9, 9), TILE), schedule=schedule):
        everything = latents()
    bound = 1e-4 if dtype == torch.float32 else 0.1
    assert float((everything - dense).abs().max() / dense.std()) < bound
    if dtype == torch.float32:
        assert float((sparse - dense).abs().max() / dense.std()) > 1e-3
    assert torch.equal(latents(), dense)


def same(got: Tensor, expected: Tensor) -> bool:
    """To rounding: products may differ with the alignment of weights in a file."""
    return float((got - expected).abs().max() / expected.std()) < 1e-4


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_from_disk(name: str, tmp_path: Path) -> None:
    """Saved with attention applied: what is loaded is the plain pipeline, and takes it again."""
    pipe, options = PIPELINES[name][0]()
    pattern = SlidingTile((1, 1, 2), TILE)

    def latents(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            **options, num_inference_steps=2, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(3),
        ).frames  # fmt: skip

    dense = latents(pipe)
    with apply(pipe, pattern):
        sparse = latents(pipe)
        pipe.save_pretrained(tmp_path)
    absent = {part: None for part, value in pipe.components.items() if value is None}
    loaded = type(pipe).from_pretrained(tmp_path, local_files_only=True, **absent)
    assert same(latents(loaded), dense)
    with apply(loaded, pattern):
        assert same(latents(loaded), sparse)
    assert not same(sparse, dense)


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_from_disk(name: str, tmp_path: Path) -> None:
    """Every class: the same sparse output, and the same dense one."""
    tiny = MODELS[name]
    model, inputs, pattern = tiny.model(), tiny.inputs(1), SlidingTile((1, 1, 2), TILE)
    dense = output(model, inputs)
    with apply(model, pattern):
        sparse = output(model, inputs)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    assert same(output(loaded, inputs), dense)
    with apply(loaded, pattern):
        assert same(output(loaded, inputs), sparse)
