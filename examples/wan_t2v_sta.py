"""Text to video with Wan and sliding tile attention (STA).

    python examples/wan_t2v_sta.py --model_id Wan-AI/Wan2.1-T2V-14B-Diffusers \\
        --prompt "A cat walking in the garden" --window 3x3x3 --dense_timesteps 12

Needs ``pip install 'video-attn[diffusers]'``. Prints what attention did and writes the video.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from video_attn.integrations import Schedule
from video_attn.integrations.wan import apply_sliding_tile
from video_attn.tools.options import sizes
from video_attn.tools.video import write_clip

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Text to video with Wan and sliding tile attention.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_id", default="Wan-AI/Wan2.1-T2V-14B-Diffusers", help="Hub name, or a folder")
    add("--prompt", default="A cat walking in the garden")
    add("--negative_prompt", default="")
    add("--window", type=sizes("TxHxW"), default=(3, 3, 3), help="tiles seen (default 3x3x3)")
    add("--tile", type=sizes("TxHxW"), default=(6, 8, 8), help="tokens of a tile (6x8x8)")
    add("--dense_layers", type=int, default=0, help="first layers that stay dense (default 0)")
    add("--dense_timesteps", type=int, help="first steps that stay dense (default a quarter)")
    add("--height", type=int, default=768, help="pixels (default 768)")
    add("--width", type=int, default=1280, help="pixels (default 1280)")
    add("--num_frames", type=int, default=69, help="frames (default 69)")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=5.0)
    add("--enable_model_cpu_offload", action="store_true", help="keep idle models off the GPU")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--seed", type=int, default=1024)
    add("--fps", type=float, default=16.0)
    add("--output_file", type=Path, default=Path("wan_sta_output.mp4"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    from diffusers import WanPipeline

    options = parse(arguments)
    console = Console(highlight=False)
    pipe = WanPipeline.from_pretrained(options.model_id, torch_dtype=DTYPES[options.dtype])
    if torch.cuda.is_available() and options.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload()
    elif torch.cuda.is_available():
        pipe.to("cuda")
    elif options.enable_model_cpu_offload:
        console.print("No GPU here: everything is on the CPU anyway, nothing to offload.")
    dense = 0.24 if options.dense_timesteps is None else options.dense_timesteps
    schedule = Schedule(dense_layers=options.dense_layers, dense_first_steps=dense)
    with apply_sliding_tile(pipe, options.window, tile=options.tile, schedule=schedule) as applied:
        start = time.perf_counter()
        video = pipe(
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            height=options.height,
            width=options.width,
            num_frames=options.num_frames,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(options.seed),
            output_type="np",
        ).frames[0]
        console.print(
            f"{applied.sparse_calls} sparse and {applied.dense_calls} dense attention calls, "
            f"{time.perf_counter() - start:.1f} s"
        )
    write_clip(options.output_file, (video * 255).round().astype(np.uint8), options.fps)
    console.print(f"wrote {options.output_file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
