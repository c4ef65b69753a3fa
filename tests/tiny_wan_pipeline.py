"""A whole tiny Wan pipeline, with its text encoder."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_cogvideox import tiny_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

LAYERS = 2


def tiny_pipeline(*, experts: int = 1) -> WanPipeline:
    """The real classes of Wan with random weights; two experts are Wan 2.2."""
    torch.manual_seed(0)
    transformers = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
            out_channels=16, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=LAYERS,
        ).eval()
        for _ in range(experts)
    ]  # fmt: skip
    for transformer in transformers:  # sharper attention makes the mask matter
        for block in transformer.blocks:
            torch.nn.init.constant_(block.attn1.norm_q.weight, 3.0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    config = UMT5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4,
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    pipe = WanPipeline(
        tiny_tokenizer(),
        UMT5EncoderModel(config).eval(),
        vae.eval(),
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        *transformers,
        boundary_ratio=0.5 if experts == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
