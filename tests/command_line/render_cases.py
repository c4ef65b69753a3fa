"""What tests of `video-attn render` share: a tiny CogVideoX, a short call of it, its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from tiny_cogvideox import saved

from video_attn import cli
from video_attn.tools.render.command import PROMPT
from video_attn.tools.render.model import load_pipeline
from video_attn.tools.video import Clip

LAYERS, STEPS, TOKENS = 3, 2, 34  # of the model; of a run; 16 text and 3 x 2 x 3 video
SMALL = ["--num_inference_steps", "2", "--height", "32", "--width", "48", "--num_frames", "9",
         "--device", "cpu"]  # fmt: skip


def render(*words: str, model: str = "2b") -> int:
    return cli.main(["render", "--model_path", str(saved(model)), *SMALL, *words])


def record_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def frames_of(path: Path) -> Clip:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def load() -> Any:
    options = {"dtype": None, "device": "cpu", "offload": "none", "tiling": False}
    return load_pipeline(str(saved("2b")), **options)


def own_video(pipe: Any) -> np.ndarray:
    return pipe(
        PROMPT, negative_prompt="", num_inference_steps=2, height=32, width=48, num_frames=9,
        max_sequence_length=16, generator=torch.Generator("cpu").manual_seed(42),
        output_type="np",
    ).frames[0]  # fmt: skip
