"""plot scene: radial attention of a video of several scenes, and which scene sees which."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...patterns.scene import CHOICES, Scenes
from .. import UsageError
from ..options import file_ending_in, integers, positive_int, scene_adjacency
from . import radial, style


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn plot scene``."""
    radial.add_pattern_arguments(parser)
    add = parser.add_argument
    add("--boundaries", type=integers, default=[0, 15, 30, 45],
        help="first frame of each scene and the end of the last (default 0,15,30,45)")  # fmt: skip
    add("--adjacency", type=scene_adjacency, default="adjacent",
        help="which scene sees which: adjacent, all, or rows of 0 and 1 as 110,111,011 "
        "(default adjacent)")  # fmt: skip
    for name, default, what in (
        ("unit", "pixel", "what --boundaries counts: frames of the video, or latent frames"),
        ("straddle", "both", "the scene of a latent frame that holds a boundary"),
        ("sink", "obey", "whether an attention sink obeys the scenes"),
    ):
        add(f"--{name}", choices=CHOICES[name], default=default, help=f"{what} (default {default})")
    add("--scene-sink", action="store_true", help="the first frame of a scene is seen wholly")
    add("--temporal-patch", type=positive_int, default=1,
        help="latents of the VAE per frame of tokens (default 1; CogVideoX 1.5: 2)")  # fmt: skip
    add("--out", type=file_ending_in(style.STILLS), default=Path("scene.png"),
        help="file to write, .png (default scene.png)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Draws the picture and says where it is."""
    try:
        scenes = Scenes(
            args.boundaries, args.adjacency, unit=args.unit, straddle=args.straddle,
            sink=args.sink, scene_sink=args.scene_sink, temporal_patch=args.temporal_patch,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"{error}; change --boundaries or --adjacency") from error
    return radial.run_with_scenes(args, scenes)
