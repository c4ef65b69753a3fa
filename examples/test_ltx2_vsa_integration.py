"""Video sparse attention in LTX-2: a video with it and without, or one layer alone.

    python test_ltx2_vsa_integration.py --checkpoint path/to/model.safetensors \\
        --text-encoder-path path/to/gemma --compare
    python test_ltx2_vsa_integration.py --top_k_ratio 0.3 --video_shape 16 28 48 --device cpu \\
        --dtype float32

With ``--checkpoint`` it runs the LTX-2 pipeline of diffusers (``pip install
'video-attn[diffusers]'``); without, one attention layer over a video of ``--video_shape``. The exit
code is 0 when everything ran and every check held.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import video_attn.sparsity as mtsa
from video_attn.tools import UsageError
from video_attn.tools.options import share
from video_attn.tools.token_table import count_tokens
from video_attn.tools.video import write_clip

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STG_BLOCK = 28  # whose attention the guidance of the pipeline leaves out
console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    both = parser.add_argument_group("both")
    both.add_argument("--top-k-ratio", "--top_k_ratio", type=share, default=0.5,
                      help="share of the tiles kept (0.5)")  # fmt: skip
    both.add_argument("--block-size", "--block_size", type=int, nargs=3, default=[4, 4, 4],
                      metavar=("T", "H", "W"), help="tokens of a tile (4 4 4)")  # fmt: skip
    both.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    both.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    both.add_argument("--seed", type=int, default=42)
    video = parser.add_argument_group("a video, with the pipeline")
    video.add_argument("--checkpoint", help="a safetensors file, or a folder of diffusers")
    video.add_argument("--text-encoder-path", help="folder of the Gemma text encoder")
    video.add_argument("--prompt", default="A cat walking through a garden in the morning sun")
    video.add_argument("--negative-prompt", default="worst quality, blurry, jittery, distorted")
    video.add_argument("--height", type=int, default=512)
    video.add_argument("--width", type=int, default=768)
    video.add_argument("--num-frames", type=int, default=121)
    video.add_argument("--frame-rate", type=float, default=25.0)
    video.add_argument("--num-inference-steps", type=int, default=30)
    video.add_argument("--guidance-scale", type=float, default=4.0)
    video.add_argument("--no-vsa", action="store_true", help="dense attention alone")
    video.add_argument("--compare", action="store_true", help="dense first, then sparse")
    video.add_argument("--skip-audio", action="store_true", help="write no sound")
    video.add_argument("--offload", action="store_true", help="keep on the GPU what runs")
    video.add_argument("--output", type=Path, default=Path("output_vsa.mp4"))
    video.add_argument("--output-baseline", type=Path, default=Path("output_baseline.mp4"))
    layer = parser.add_argument_group("a layer alone, without --checkpoint")
    layer.add_argument("--video_shape", "--video-shape", type=int, nargs=3, default=[16, 28, 48],
                       metavar=("T", "H", "W"), help="tokens of the video (16 28 48)")  # fmt: skip
    layer.add_argument("--batch_size", "--batch-size", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.no_vsa and options.compare:
        parser.error("--compare needs the sparse run that --no-vsa leaves out")
    if options.checkpoint is None and (options.compare or options.no_vsa):
        parser.error("--compare and --no-vsa are for a video: give --checkpoint")
    sizes = [*options.block_size, *options.video_shape, options.batch_size]
    if min(sizes) < 1:
        parser.error("--block_size, --video_shape and --batch_size must be positive")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this torch finds no GPU: give --device cpu")
    if options.checkpoint is not None:
        try:
            options.tokens = count_tokens(
                "ltx2", options.height, options.width, options.num_frames,
                tuple(options.block_size), options.top_k_ratio,
            )  # fmt: skip
        except UsageError as error:
            parser.error(str(error).replace("--frames", "--num-frames"))
    return options


def vsa_config(options: argparse.Namespace) -> dict[str, Any]:
    """Sparse video self-attention (attn1); text, audio and cross-modal attention stay dense."""
    return {
        "sparse_cfg": {
            "*.attn1": {
                "method": "vsa",
                "top_k_ratio": options.top_k_ratio,
                "block_size_3d": options.block_size,
                "collect_stats": True,
            },
            "*.attn2": {"enable": False},
            "*.audio_attn*": {"enable": False},
            "*.audio_to_video*": {"enable": False},
            "*.video_to_audio*": {"enable": False},
        },
    }


# -- a video ---------------------------------------------------------------------------------------


def load_pipeline(options: argparse.Namespace) -> Any:
    """The LTX-2 pipeline of diffusers, from a folder or a single file."""
    import diffusers
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    dtype, more = DTYPES[options.dtype], {}
    if options.text_encoder_path:
        more["text_encoder"] = Gemma3ForConditionalGeneration.from_pretrained(
            options.text_encoder_path, dtype=dtype
        )
        more["tokenizer"] = AutoTokenizer.from_pretrained(options.text_encoder_path)
    path = Path(options.checkpoint)
    make = diffusers.LTX2Pipeline.from_pretrained
    if path.is_file():
        make = diffusers.LTX2Pipeline.from_single_file
    elif not path.exists():
        raise FileNotFoundError(f"--checkpoint {path} does not exist")
    pipe = make(str(path), dtype=dtype, **more)
    if options.offload:
        pipe.enable_model_cpu_offload(device=options.device)
        return pipe
    return pipe.to(options.device)


@dataclass
class Run:
    """One generation: seconds, frames [T, H, W, 3] in 0..1, sound or None."""

    seconds: float
    frames: Any
    audio: Any


def generate(pipe: Any, options: argparse.Namespace, what: str) -> Run:
    """A warm-up of one step, then the generation, with the device waited for."""
    console.print(f"{what}: warm-up, then {options.num_inference_steps} steps ...")
    _call(pipe, options, steps=1)
    for _, module in mtsa.get_named_sparse_attention_modules(pipe):
        module._sparse_attention.reset()
    _wait(options.device)
    start = time.perf_counter()
    out = _call(pipe, options, steps=options.num_inference_steps)
    _wait(options.device)
    return Run(time.perf_counter() - start, np.asarray(out[0])[0], out[1])


def _call(pipe: Any, options: argparse.Namespace, steps: int) -> Any:
    layers = len(pipe.transformer.transformer_blocks)
    guided = {} if layers > STG_BLOCK else {
        "spatio_temporal_guidance_blocks": None, "stg_scale": 0.0, "audio_stg_scale": 0.0,
    }  # fmt: skip
    return pipe(
        prompt=options.prompt, negative_prompt=options.negative_prompt, height=options.height,
        width=options.width, num_frames=options.num_frames, frame_rate=options.frame_rate,
        num_inference_steps=steps, guidance_scale=options.guidance_scale, output_type="np",
        generator=torch.Generator("cpu").manual_seed(options.seed), return_dict=False, **guided,
    )  # fmt: skip


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def save_video(run: Run, pipe: Any, options: argparse.Namespace, path: Path) -> None:
    """Frames, and the sound unless it is skipped or there is none."""
    frames = (np.asarray(run.frames) * 255).round().clip(0, 255).astype(np.uint8)
    if options.skip_audio or run.audio is None:
        write_clip(path, frames, options.frame_rate)
    else:
        from diffusers.utils.export_utils import encode_video

        encode_video(
            torch.from_numpy(frames), fps=round(options.frame_rate), output_path=str(path),
            audio=run.audio[0].float().cpu(),
            audio_sample_rate=pipe.vocoder.config.output_sampling_rate,
        )  # fmt: skip
    console.print(f"wrote {path}")


def psnr(first: Any, second: Any) -> float:
    """Of two videos in 0..1, in dB."""
    error = float(np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def run_video(options: argparse.Namespace) -> int:
    """Generates what the options ask for; 1 if the sparse attention never ran."""
    count = options.tokens
    console.print(
        f"{options.height}x{options.width}, {options.num_frames} frames: {count.tokens} tokens in "
        f"{count.tiles} tiles, of which a tile sees {count.kept}: {count.rating}"
    )
    pipe = load_pipeline(options)
    dense = None
    if options.compare or options.no_vsa:
        dense = generate(pipe, options, "dense")
        save_video(dense, pipe, options, options.output_baseline)
        console.print(f"dense: {dense.seconds:.2f} s")
    if options.no_vsa:
        return 0
    mtsa.sparsify(pipe, vsa_config(options))
    sparse = generate(pipe, options, f"VSA at {options.top_k_ratio:g}")
    save_video(sparse, pipe, options, options.output)
    mtsa.print_sparse_attention_summary(pipe, console)
    states = [m._sparse_attention for _, m in mtsa.get_named_sparse_attention_modules(pipe)]
    calls = sum(state.sparse_calls for state in states)
    if calls == 0:
        console.print("[red]VSA never ran[/red]")
        return 1
    densities = [d for state in states if (d := state.mean_density()) is not None]
    density = sum(densities) / len(densities)
    console.print(f"VSA: {sparse.seconds:.2f} s, {calls} sparse calls, density {density:.3f}")
    if dense is not None:
        speed_up = dense.seconds / sparse.seconds
        quality = psnr(sparse.frames, dense.frames)
        console.print(f"speed-up {speed_up:.2f}x, PSNR to dense {quality:.1f} dB")
    return 0


# -- a layer alone ---------------------------------------------------------------------------------


class VideoAttention(nn.Module):
    """An attention layer as the documentation has it, gate included."""

    def __init__(self, hidden_dim: int = 512, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_dim, hidden_dim)
        self.to_k = nn.Linear(hidden_dim, hidden_dim)
        self.to_v = nn.Linear(hidden_dim, hidden_dim)
        self.to_gate_compress = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def run_layer(options: argparse.Namespace) -> int:
    """Dense, ratio 1 and the ratio that was asked for; 1 if ratio 1 is not dense attention."""
    torch.manual_seed(options.seed)
    dtype, tokens = DTYPES[options.dtype], math.prod(options.video_shape)
    layer = VideoAttention().to(options.device, dtype)
    x = torch.randn(options.batch_size, tokens, 512, dtype=dtype, device=options.device)
    attributes = {
        "method": "vsa", "block_size_3d": options.block_size, "top_k_ratio": 1.0, "gate": "none",
        "video_shape": options.video_shape, "collect_stats": True,
    }  # fmt: skip
    shown = "x".join(map(str, options.video_shape))
    console.print(f"one layer, 8 heads x 64, {options.batch_size} x {shown} = {tokens} tokens, "
                  f"{options.dtype} on {options.device}")  # fmt: skip
    with torch.no_grad():
        dense, dense_seconds = _timed(lambda: layer(x), options.device)
        mtsa.sparsify(layer, {"sparse_cfg": {"*": attributes}})
        whole, _ = _timed(lambda: layer(x), options.device)
        asked = {"top_k_ratio": options.top_k_ratio, "gate": "auto"}
        mtsa.set_sparse_attention_attribute(layer, "*", asked)
        layer._sparse_attention.reset()
        out, seconds = _timed(lambda: layer(x), options.device)
    error = _relative(whole, dense)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    sound = error < limit and bool(out.isfinite().all())
    console.print(f"ratio 1 against dense: relative error {error:.2e} (limit {limit:g})")
    console.print(
        f"ratio {options.top_k_ratio:g}: density {1 - layer.get_stats()['average_sparsity']:.3f}, "
        f"{seconds * 1e3:.2f} ms against {dense_seconds * 1e3:.2f} ms dense, speed-up "
        f"{dense_seconds / seconds:.2f}x"
    )
    console.print("passed" if sound else "[red]FAILED[/red]")
    return 0 if sound else 1


def _timed(run: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    """The output and the best of three calls, after one that does not count."""
    out, times = run(), []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        out = run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return out, min(times)


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).float().norm() / expected.float().norm())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return run_layer(options) if options.checkpoint is None else run_video(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
