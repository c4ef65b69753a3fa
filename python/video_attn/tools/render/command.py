"""``video-attn render``: one video with one attention type; captures of its q, k, v on the way."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import UsageError
from ..capture.files import FORMATS
from ..devices import chosen_device
from ..options import integers, positive_float, positive_int

PROMPT = (
    "A red panda in a small straw hat sits by a brook and plays a wooden flute; ferns move in a "
    "light wind, and the morning sun falls through the leaves."
)
DEFAULT_MODEL = "THUDM/CogVideoX-2b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn render``."""
    parser.add_argument(
        "--model_path", default=DEFAULT_MODEL, metavar="PATH",
        help=f"a pipeline on the Hub, or its folder (default {DEFAULT_MODEL})",
    )  # fmt: skip
    parser.add_argument(
        "--attention_type", default="sdpa", metavar="TYPE",
        help="sdpa, sagev1, fav2, fav3, fav3_fp8, fav3_sage, or a pattern with its options: "
        "sta:window=3x3x3, vsa:top_k_ratio=0.125, radial:dense_layers=2 (default sdpa)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="video to write, or a folder (default ./cogvideox-MODEL_TYPE.mp4)",
    )  # fmt: skip
    add_render_arguments(parser)


def add_render_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``render`` and ``compare`` share."""
    video = parser.add_argument_group("the video (defaults: the model's)")
    add = video.add_argument
    add("--prompt", default=PROMPT, help="what it shows")
    add("--negative_prompt", help="what it shall not show")
    add("--num_inference_steps", type=positive_int, metavar="N", help="denoising steps")
    add("--num_frames", type=positive_int, metavar="N", help="frames")
    add("--height", type=positive_int, metavar="N", help="pixels")
    add("--width", type=positive_int, metavar="N", help="pixels")
    add("--guidance_scale", type=float, metavar="F", help="of the prompt")
    add("--seed", type=int, default=42, metavar="N", help="of the noise (default 42)")
    add("--fps", type=positive_float, default=8.0, metavar="F", help="of the file (default 8)")
    how = parser.add_argument_group("how and where")
    add = how.add_argument
    add("--dtype", choices=("fp16", "bf16", "fp32"),
        help="of the weights (default fp16 for CogVideoX-2b, else bf16; CPU fp32)")  # fmt: skip
    add("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    add("--offload", choices=("none", "model", "sequential"), default="none",
        help="keep whole models, or all weights, off the GPU until used")  # fmt: skip
    add("--tiling", action="store_true", help="decode the video in tiles, with less memory")
    add("--compile", action="store_true", help="torch.compile of the transformer (NVIDIA only)")
    capture = parser.add_argument_group("captured inputs")
    add = capture.add_argument
    add("--save_inputs", action="store_true", help="save q, k, v of attention calls")
    add("--input_dir", type=Path, metavar="DIR", help="folder (default ./captured_inputs)")
    add("--max_captures", type=_count, metavar="N", help="how many, 0 for all (default 10)")
    add("--layers", type=integers, metavar="0,5,...", help="of these layers (default all)")
    add("--steps", type=integers, metavar="0,25,...", help="of these steps (default all)")
    add("--every", type=positive_int, metavar="N", help="every N-th of those calls (default 1)")
    add("--capture_format", choices=FORMATS, default=FORMATS[0],
        help=f"of the files (default {FORMATS[0]})")  # fmt: skip


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Renders; 1 if the captures are not complete."""
    from .attention import video_transformers
    from .kinds import parse_kind
    from .model import model_label
    from .session import render

    kind = parse_kind(args.attention_type)
    capture = capture_options(args)
    pipe = load(args)
    family = video_transformers(pipe)[0][1].name
    name = f"{model_label(args.model_path, family)}_{kind.label}.mp4"
    path = _output(args.output, name)
    try:
        outcome = render(pipe, kind, wanted_of(args), path, say=print, capture=capture)
    except UsageError:
        raise
    except ValueError as error:  # of the pipeline, or an attention call that cannot be served
        raise RuntimeError(str(error)) from error
    if outcome.capture_failure:
        print(f"FAILED: captures ended early: {outcome.capture_failure}")
    return 1 if outcome.capture_failure else 0


def _output(given: Path | None, name: str) -> Path:
    if given is None:
        return Path(name)
    if given.is_dir() or not given.suffix:
        return given / name
    if given.suffix.lower() not in (".mp4", ".mkv", ".mov"):
        raise UsageError(f"--output {given} must end in .mp4, .mkv or .mov, or be a folder")
    return given


def load(args: argparse.Namespace) -> Any:
    """The pipeline of the options."""
    from .model import load_pipeline

    if args.compile:
        _check_compile(args)
    return load_pipeline(
        args.model_path, dtype=args.dtype, device=args.device, offload=args.offload,
        tiling=args.tiling,
    )  # fmt: skip


def _check_compile(args: argparse.Namespace) -> None:
    import torch

    if torch.version.hip is not None and chosen_device(args.device).type == "cuda":
        raise UsageError("--compile is for NVIDIA GPUs; leave it out on AMD")
    if args.offload == "sequential":
        raise UsageError("--compile needs the weights in their place: not --offload sequential")


def wanted_of(args: argparse.Namespace) -> Any:
    """Everything that the video depends on, but the attention type."""
    from .session import Wanted

    names = ("prompt", "negative_prompt", "num_inference_steps", "num_frames", "height", "width",
             "guidance_scale")  # fmt: skip
    call = {name: getattr(args, name) for name in names}
    return Wanted(args.model_path, call, args.seed, args.fps, args.dtype, args.compile)


def capture_options(args: argparse.Namespace) -> Any:
    """What to capture, or None.

    Raises:
        UsageError: options of captures without --save_inputs.
    """
    from ..capture import Selection
    from .session import CaptureOptions

    named = ("input_dir", "max_captures", "layers", "steps", "every")
    given = [f"--{name}" for name in named if getattr(args, name) is not None]
    if not args.save_inputs:
        if given:
            raise UsageError(f"{', '.join(given)}: add --save_inputs, or leave it out")
        return None
    selection = Selection(
        10 if args.max_captures is None else args.max_captures,
        None if args.layers is None else tuple(args.layers),
        None if args.steps is None else tuple(args.steps),
        args.every or 1,
    )
    folder = args.input_dir or Path("captured_inputs")
    return CaptureOptions(folder, selection, args.capture_format)
