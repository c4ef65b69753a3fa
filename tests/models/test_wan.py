"""Sliding tile attention in a Wan pipeline, on tiny weights, against SDPA with a token mask."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import av
import numpy as np
import pytest
import torch
from diffusers import (
    WanPipeline,
)
from tiny_wan_pipeline import LAYERS, tiny_pipeline
from token_masks import raster_coordinates, sliding_tile_tokens
from torch import Tensor
from torch.nn import functional as F

from video_attn import Radial
from video_attn.integrations import Schedule
from video_attn.integrations.attention_call import AttentionCall
from video_attn.integrations.intercept import call_with_attention
from video_attn.integrations.wan import apply_sliding_tile

HEIGHT, WIDTH, FRAMES = 64, 96, 13  # 4 latent frames of 4 x 6 tokens
GRID, TILE, WINDOW = (4, 4, 6), (2, 2, 2), (1, 1, 2)
STEPS = 3
ROOT = Path(__file__).parents[2]


def latents(pipe: WanPipeline) -> np.ndarray:
    """The video before the VAE, the same for the same pipeline."""
    frames = pipe(
        prompt="a cat", negative_prompt="", height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=4.0, max_sequence_length=16,
        generator=torch.Generator("cpu").manual_seed(3), output_type="latent",
    ).frames  # fmt: skip
    return frames.numpy()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


def defined_latents(pipe: WanPipeline) -> np.ndarray:
    """The same with torch's attention and the token mask of the definition."""
    keep = sliding_tile_tokens(raster_coordinates(GRID), GRID, TILE, [WINDOW])

    def attend(call: AttentionCall) -> Tensor:
        return F.scaled_dot_product_attention(
            call.query, call.key, call.value, attn_mask=keep, scale=call.scale
        )

    class Defined:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, *arguments: Any) -> Tensor:
            return call_with_attention(attend, self.inner, *arguments)

    for block in pipe.transformer.blocks:
        block.attn1.set_processor(Defined(block.attn1.processor))
    return latents(pipe)


def test_sliding_tile_is_the_definition_and_differs_from_dense() -> None:
    pipe = tiny_pipeline()
    dense = latents(pipe)
    with apply_sliding_tile(pipe, WINDOW, tile=TILE) as applied:
        sparse = latents(pipe)
    assert (applied.sparse_calls, applied.dense_calls) == (2 * STEPS * LAYERS, 0)
    assert error(sparse, defined_latents(tiny_pipeline())) < 1e-4
    assert error(sparse, dense) > 1e-2


def test_a_window_over_everything_is_dense_and_undo_restores_every_bit() -> None:
    pipe = tiny_pipeline()
    dense = latents(pipe)
    with apply_sliding_tile(pipe, GRID, tile=TILE) as applied:
        assert error(latents(pipe), dense) < 1e-4
    assert applied.sparse_calls > 0
    assert np.array_equal(latents(pipe), dense)
    applied.undo()  # a second undo does nothing
    assert np.array_equal(latents(pipe), dense)


def test_schedule_counts_and_two_pipelines_do_not_meet() -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    dense = latents(other)
    schedule = Schedule(dense_layers=1, dense_first_steps=1)
    with apply_sliding_tile(pipe, WINDOW, tile=TILE, schedule=schedule) as applied:
        latents(pipe)
        assert np.array_equal(latents(other), dense)
    calls = 2 * STEPS * LAYERS  # guidance runs every step twice
    assert applied.sparse_calls == 2 * (STEPS - 1) * (LAYERS - 1)
    assert applied.sparse_calls + applied.dense_calls == calls


def test_both_experts_of_wan_2_2_are_served() -> None:
    pipe = tiny_pipeline(experts=2)
    with apply_sliding_tile(pipe, WINDOW, tile=TILE) as applied:
        latents(pipe)
    assert (applied.sparse_calls, applied.dense_calls) == (2 * STEPS * LAYERS, 0)


def test_wrong_input_is_refused_by_name() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(TypeError, match="pipe must be .*WanTransformer3DModel"):
        apply_sliding_tile(object(), WINDOW)
    with pytest.raises(ValueError, match="window"):
        apply_sliding_tile(pipe, (0, 1, 1))
    with pytest.raises(ValueError, match="overrides"):
        apply_sliding_tile(pipe, WINDOW, schedule=Schedule(overrides={(0, 0): Radial()}))
    with pytest.raises(ValueError, match="dense_layers"):
        apply_sliding_tile(pipe, WINDOW, schedule=Schedule(dense_layers=LAYERS + 1))
    with (
        apply_sliding_tile(pipe, WINDOW),
        pytest.raises(RuntimeError, match="applied"),
    ):
        apply_sliding_tile(pipe, WINDOW)


def test_the_documented_script_writes_a_video(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What the script would run is run here: its own process would only import it all again."""
    model, output = tmp_path / "model", tmp_path / "sta.mp4"
    tiny_pipeline().save_pretrained(model)
    command = ["bash", "scripts/inference/v1_inference_wan_STA.sh"]
    options = [
        "--height", str(HEIGHT), "--width", str(WIDTH), "--num_frames", str(FRAMES),
        "--num_inference_steps", "3", "--dense_timesteps", "1", "--window", "1x1x2",
        "--tile", "2x2x2", "--dtype", "float32", "--output_file", str(output),
    ]  # fmt: skip
    environment = os.environ | {"PYTHON": "echo", "MODEL_BASE": str(model)}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    path, *words = done.stdout.split()
    spec = importlib.util.spec_from_file_location("wan_t2v_sta", ROOT / path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(words) == 0
    assert "8 sparse and 4 dense attention calls" in capsys.readouterr().out
    with av.open(str(output)) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
