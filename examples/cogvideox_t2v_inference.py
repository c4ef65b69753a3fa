"""Text to video with CogVideoX and radial attention.

    python examples/cogvideox_t2v_inference.py --model_id THUDM/CogVideoX-2b \\
        --prompt "A cat walking in the garden" --pattern radial \\
        --dense_layers 2 --dense_timesteps 5 --decay_factor 1.0 --enable_model_cpu_offload

Needs ``pip install 'video-attn[diffusers]'``. Prints what attention will do and what it did, with
the time of each denoising step, and writes the video.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from radial_attn.models.cogvideox import replace_cogvideox_attention, replace_sparse_forward
from video_attn.integrations import AppliedAttention
from video_attn.integrations.cogvideox import layout_of
from video_attn.patterns.scene import Scenes
from video_attn.tools.options import integers, scene_adjacency
from video_attn.tools.video import write_clip

# What is chosen where neither an option nor the preset says anything.
DEFAULTS: dict[str, Any] = {
    "dense_layers": 2,
    "dense_timesteps": 5,
    "use_sage_attention": False,
    "offload": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "short": {"dense_layers": 1, "dense_timesteps": 3},  # fewer than 30 frames
    "long": {"dense_layers": 3, "dense_timesteps": 8},  # more than 50 frames
    "low_memory": {"use_sage_attention": True, "offload": "model"},
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with those of the preset filled in."""
    parser = argparse.ArgumentParser(
        description="Text to video with CogVideoX and radial attention.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_id", default="THUDM/CogVideoX-2b", help="a name on the Hub, or a folder")
    add("--prompt", default="A cat walking in the garden")
    add("--negative_prompt", default="")
    add("--pattern", choices=("radial", "dense"), default="radial")
    add("--preset", choices=tuple(PRESETS), help="values for the options that are not given")
    add("--dense_layers", type=int, help="first layers that stay dense (default 2)")
    add("--dense_timesteps", type=int, help="first steps that stay dense (default 5)")
    add("--decay_factor", type=float, default=1.0, help="how much far frames see of each other")
    add("--use_sage_attention", action="store_true", default=None, help="INT8 attention")
    add("--use_fused_attention", action="store_true", help="q, k and v by one matrix")
    add(
        "--scene_boundaries",
        type=integers,
        help="first frame of each scene and the end: 0,15,30,45",
    )
    add("--scene_adjacency", type=scene_adjacency, default="adjacent",
        help="adjacent, all, or rows of 0 and 1: 110,111,011 (default adjacent)")  # fmt: skip
    offload = parser.add_mutually_exclusive_group()
    for kind, what in (("model", "whole models"), ("sequential", "all weights")):
        offload.add_argument(
            f"--enable_{kind}_cpu_offload", dest="offload", action="store_const", const=kind,
            help=f"keep {what} off the GPU until used",
        )  # fmt: skip
    add("--height", type=int, help="pixels (default: the model's)")
    add("--width", type=int, help="pixels (default: the model's)")
    add("--num_frames", type=int, help="frames (default: the model's)")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=6.0)
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--seed", type=int, default=42)
    add("--fps", type=float, default=8.0)
    add("--output_file", type=Path, default=Path("cogvideox_output.mp4"))
    options = parser.parse_args(arguments)
    chosen = DEFAULTS | PRESETS.get(options.preset, {})
    for name, value in chosen.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def load(options: argparse.Namespace, console: Console) -> Any:
    """The pipeline, on the GPU if there is one, offloaded if that is asked for."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(options.model_id, torch_dtype=DTYPES[options.dtype])
    pipe.set_progress_bar_config(disable=True)
    if not torch.cuda.is_available():
        if options.offload:
            console.print("No GPU here: everything is on the CPU anyway, nothing to offload.")
    elif options.offload == "model":
        pipe.enable_model_cpu_offload()
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to("cuda")
    return pipe


def apply_pattern(pipe: Any, options: argparse.Namespace) -> AppliedAttention:
    """Radial attention, or dense attention counted and measured the same way."""
    scenes = None
    if options.scene_boundaries:
        scenes = Scenes(options.scene_boundaries, options.scene_adjacency)
    replace_sparse_forward()
    return replace_cogvideox_attention(
        pipe,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        dense_layers=options.dense_layers,
        dense_timesteps=options.dense_timesteps,
        decay_factor=options.decay_factor,
        sparsity_type=options.pattern,
        use_sage_attention=options.use_sage_attention,
        use_fused_attention=options.use_fused_attention,
        scenes=scenes,
    )


def generate(pipe: Any, options: argparse.Namespace, console: Console) -> tuple[Any, list[float]]:
    """(frames [F, H, W, 3], floats from 0 to 1; seconds of each step), with a progress bar."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"), TimeRemainingColumn(),
    )  # fmt: skip
    seconds: list[float] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("denoising", total=options.num_inference_steps, pace="")
        now = time.perf_counter()

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            nonlocal now
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            before, now = now, time.perf_counter()
            seconds.append(now - before)
            progress.update(task, advance=1, pace=f"{seconds[-1]:.2f} s/step")
            return tensors

        video = pipe(
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            height=options.height,
            width=options.width,
            num_frames=options.num_frames,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            max_sequence_length=pipe.transformer.config.max_text_seq_length,
            generator=torch.Generator("cpu").manual_seed(options.seed),
            callback_on_step_end=after_step,
            output_type="np",
        ).frames[0]
    return video, seconds


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    options = parse(arguments)
    console = Console(highlight=False)
    pipe = load(options, console)
    with apply_pattern(pipe, options) as applied:
        layout = layout_of(pipe, options.height, options.width, options.num_frames)
        frames, rows, columns = layout.grid
        console.print(
            f"{options.pattern} attention over {layout.sequence_length} tokens: "
            f"{layout.text_length} text, {frames} x {rows} x {columns} video"
        )
        console.print(
            f"backend of sparse calls: {applied.backend_name()}; of dense calls: "
            f"{applied.backend_name(sparse=False)}"
        )
        console.print(
            f"density of a sparse step: {applied.density(layout.grid):.3f} (mean of all layers), "
            f"precision {applied.precision}"
        )
        video, seconds = generate(pipe, options, console)
        console.print(
            f"{applied.sparse_calls} sparse and {applied.dense_calls} dense attention calls, "
            f"{np.mean(seconds):.2f} s per step (the first, with the text encoder, "
            f"{seconds[0]:.2f} s)"
        )
    write_clip(options.output_file, (video * 255).round().astype(np.uint8), options.fps)
    console.print(f"wrote {options.output_file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
