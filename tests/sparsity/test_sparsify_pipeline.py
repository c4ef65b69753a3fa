"""sparsify on a whole LTX-2 pipeline of diffusers, with sound: tiny, random, from embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparsity_cases import error
from tiny_models import MODELS, random
from torch import Tensor

import video_attn.sparsity as mtsa

TILE = (2, 2, 2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
    )
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8,),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        upsample_type=("spatiotemporal",), upsample_residual=(False,), upsample_factor=(1,),
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2,
        mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
    )  # fmt: skip
    heads = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, rope_double_precision=False, **heads
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    transformer = MODELS["ltx2"].model()
    pipe = LTX2Pipeline(scheduler, vae, audio_vae, None, None, connectors, transformer, vocoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents(pipe: Any) -> Tensor:
    """Two steps with guidance of all kinds but STG, which needs a 29th block: [1, 4, 2, 4, 5]."""
    mask = torch.ones(1, 7).long()
    return pipe(
        prompt_embeds=random(1, 7, 48), prompt_attention_mask=mask,
        negative_prompt_embeds=-random(1, 7, 48), negative_prompt_attention_mask=mask,
        height=256, width=320, num_frames=17, frame_rate=25.0, num_inference_steps=2,
        guidance_scale=4.0, generator=torch.Generator().manual_seed(0), output_type="latent",
        spatio_temporal_guidance_blocks=None, stg_scale=0.0, audio_stg_scale=0.0,
        return_dict=False,
    )[0]  # fmt: skip


def test_the_pipeline_of_ltx2(pipe: Any) -> None:
    dense = latents(pipe)
    attributes = {"method": "vsa", "top_k_ratio": 1.0, "block_size_3d": TILE}
    mtsa.sparsify(pipe, {"sparse_cfg": {"*.attn1": attributes}})
    assert error(latents(pipe), dense) < 1e-4
    states = {n: m._sparse_attention for n, m in mtsa.get_named_sparse_attention_modules(pipe)}
    used = {name: state for name, state in states.items() if state.sparse_calls}
    assert list(used) == [f"transformer.transformer_blocks.{i}.attn1" for i in range(2)]
    assert {state.last_grid for state in used.values()} == {(2, 4, 5)}
    forwards = used["transformer.transformer_blocks.0.attn1"].sparse_calls
    mtsa.set_sparse_attention_attribute(pipe, "*.attn1", {"top_k_ratio": 0.25})
    assert error(latents(pipe), dense) > 1e-2

    # The step is found in the pipeline that runs: of two steps, the last is dense.
    change = {"schedule": {"dense_last_steps": 1}}
    mtsa.set_sparse_attention_attribute(pipe, "*.attn1", change)
    for state in states.values():
        state.reset()
    latents(pipe)
    for state in used.values():
        assert (state.sparse_calls, state.dense_calls) == (
            forwards // 2, {"dense step": forwards // 2},
        )  # fmt: skip
    mtsa.unsparsify(pipe)
    assert torch.equal(latents(pipe), dense)
