"""CogVideoX pipelines of some hundred thousand random weights, made offline in a moment.

All components are the real classes of diffusers and transformers, so saving, loading, text
encoding, guidance, denoising and decoding are the real code. :func:`defined_attention` makes such a
pipeline compute what radial attention is defined to be, by torch's attention and a token mask.
"""

from __future__ import annotations

import contextlib
import os
import string
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from radial_oracle import Definition, block_mask
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from video_attn.integrations.cogvideox import layout_of
from video_attn.patterns.radial import RadialRule

TEXT = 16  # tokens of a prompt
HEIGHT, WIDTH, FRAMES = 64, 80, 17  # 5 latent frames of 4 x 5 tokens
LAYERS, STEPS, BLOCK = 3, 4, 4
MODELS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"rotary": True},
    "1.5": {"rotary": True, "patch_t": 2},
}
# In tiny frames the published split of 128 drops all far frames, so most tests turn it off.
RULE = RadialRule(decay_factor=0.2, neighbor_fraction=0.25, split_width=0, min_window=2)
EVERYTHING = RadialRule(decay_factor=1e6, split_width=0)
_FOLDERS = tempfile.TemporaryDirectory(prefix="tiny-cogvideox-")  # removed at exit


def tiny_pipeline(
    *, rotary: bool = False, patch_t: int | None = None, layers: int = 3, weights: int = 0
) -> CogVideoXPipeline:
    """A pipeline as 2b (default), 5b (``rotary``) or 1.5 (``rotary``, ``patch_t=2``) has it."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(weights)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=layers,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=FRAMES,
        patch_size=2,
        patch_size_t=patch_t,
        patch_bias=patch_t is None,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    # Random projections make attention almost uniform; sharper ones make the mask matter.
    for block in transformer.transformer_blocks:
        torch.nn.init.constant_(block.attn1.norm_q.weight, 3.0)
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    config = T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        feed_forward_proj="relu", pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer, T5EncoderModel(config).eval(), vae.eval(), transformer.eval(),
        CogVideoXDDIMScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: CogVideoXPipeline, *, steps: int = 4, **options: Any) -> np.ndarray:
    """The frames of a short video, floats [F, H, W, 3], the same for the same pipeline."""
    arguments: dict[str, Any] = {
        "prompt": "a cat walks",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "max_sequence_length": TEXT,
        "generator": torch.Generator("cpu").manual_seed(7),
        "output_type": "np",
    }
    return pipe(**(arguments | options)).frames[0]


def tiny_tokenizer() -> T5Tokenizer:
    """Letters, the space mark, and the special tokens."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -6.0) for letter in string.ascii_lowercase + string.punctuation]
    return T5Tokenizer(vocab=special + letters, extra_ids=0)


@cache
def saved(name: str) -> Path:
    """The folder of a model of ``MODELS``, saved as its real checkpoint would be."""
    folder = Path(_FOLDERS.name) / name
    tiny_pipeline(layers=LAYERS, **MODELS[name]).save_pretrained(folder)
    return folder


def load(name: str = "5b") -> CogVideoXPipeline:
    """A pipeline of its own from that folder; 5b: rotary positions, no temporal patch."""
    pipe = CogVideoXPipeline.from_pretrained(saved(name), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: CogVideoXPipeline, **options: Any) -> np.ndarray:
    """The video before the VAE, which would only blur what attention did."""
    return render(pipe, steps=STEPS, output_type="latent", **options).numpy()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


@contextlib.contextmanager
def defined_attention(
    pipe: CogVideoXPipeline, mask_of: Callable[[int, int], Tensor | None]
) -> Iterator[list[int]]:
    """Runs the DiT's attention with ``mask_of(step, layer)``, bool [1|H, S, S] or None.

    The text encoder calls the same function of torch; it is told by its length.
    """
    sdpa, calls = F.scaled_dot_product_attention, [0]
    layout = layout_of(pipe)

    def masked(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[2] != layout.sequence_length:
            return sdpa(query, key, value, **options)
        step, layer = divmod(calls[0], LAYERS)
        calls[0] += 1
        return sdpa(query, key, value, attn_mask=mask_of(step, layer))

    F.scaled_dot_product_attention = masked
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = sdpa


def token_mask(pipe: CogVideoXPipeline, rule: RadialRule = RULE, **options: Any) -> Tensor:
    """bool [S, S] of the definition, for the sequence [text, video] of ``pipe``."""
    frames, rows, columns = layout_of(pipe).grid
    definition = Definition(
        frames, rows * columns, BLOCK, TEXT, text_first=True, decay=rule.decay_factor,
        neighbor=rule.neighbor_fraction, min_window=rule.min_window, split=rule.split_width,
        sink=rule.sink_frames, **options,
    )  # fmt: skip
    blocks = block_mask(definition)
    tokens = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return tokens[: definition.length, : definition.length]
