"""``video-attn tokens``: how many tokens and VSA tiles a video has in a model.

The first latent frame of these models is one pixel frame, so F frames make ``(F - 1) / t + 1``
latent frames: a rule of so many pixels per token counts too few.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from ..layout import Triple, VideoLayout
from ..patterns.video_sparse import kept_blocks
from . import UsageError
from .options import positive_int, share, sizes

ENOUGH, FEW = 90, 16  # tiles from which on sparsity pays, and from which on it may


class Compression(NamedTuple):
    """Pixels per latent (time, space), latents per token, tokens of text in the same sequence."""

    frames: int
    pixels: int
    patch: Triple
    text: int = 0


MODELS = {
    "ltx2": Compression(8, 32, (1, 1, 1)),
    "ltx": Compression(8, 32, (1, 1, 1)),
    "wan": Compression(4, 8, (1, 2, 2)),
    "wan2.2-5b": Compression(4, 16, (1, 2, 2)),
    "hunyuan": Compression(4, 8, (1, 2, 2), text=256),
    "cogvideox": Compression(4, 8, (1, 2, 2), text=226),
    "cogvideox1.5": Compression(4, 8, (2, 2, 2), text=226),
    "mochi": Compression(6, 8, (1, 2, 2), text=256),
}


class TokenCount(NamedTuple):
    """What one size of video comes to."""

    grid: Triple
    tokens: int
    tiles: int
    fill: float
    kept: int
    text: int

    @property
    def rating(self) -> str:
        """Whether VSA is worth it."""
        if self.tiles >= ENOUGH:
            return "excellent for VSA"
        return "marginal" if self.tiles >= FEW else "too small"


def count_tokens(
    model: str, height: int, width: int, frames: int, tile: Triple = (4, 4, 4), ratio: float = 0.5
) -> TokenCount:
    """Tokens and tiles of a video of ``frames`` frames of ``height`` x ``width`` pixels.

    Raises:
        UsageError: a size that the model does not make.
    """
    rule = MODELS[model]
    step = rule.pixels * rule.patch[1]
    for name, size in (("height", height), ("width", width)):
        if size % step:
            raise UsageError(f"--{name} must be a multiple of {step} for {model}, got {size}")
    if (frames - 1) % rule.frames:
        low = (frames - 1) // rule.frames * rule.frames + 1
        raise UsageError(
            f"--frames must be a multiple of {rule.frames}, plus 1, for {model}: {low} or "
            f"{low + rule.frames}, not {frames}"
        )
    latents = (frames - 1) // rule.frames + 1
    grid = -(-latents // rule.patch[0]), height // step, width // step
    layout = VideoLayout(grid, tile)
    fill = layout.video_length / (layout.num_tiles * layout.tile_volume)
    kept = kept_blocks(ratio, layout.num_tiles)
    return TokenCount(grid, layout.video_length, layout.num_tiles, fill, kept, rule.text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --height, --width, --frames, --tile, --top-k-ratio."""
    parser.add_argument("--model", choices=MODELS, default="ltx2", help="default ltx2")
    for name, default in (("height", 512), ("width", 768), ("frames", 121)):
        parser.add_argument(
            f"--{name}", type=positive_int, nargs="+", default=[default], metavar="N",
            help=f"one or several (default {default}); lists go together",
        )  # fmt: skip
    parser.add_argument(
        "--tile", type=sizes("TxHxW"), default=(4, 4, 4), metavar="TxHxW",
        help="tokens of a VSA tile (default 4x4x4)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k-ratio", type=share, default=0.5, help="share of the tiles kept (default 0.5)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    counts = max(map(len, (args.height, args.width, args.frames)))
    lists = []
    for name in ("height", "width", "frames"):
        values = getattr(args, name)
        if len(values) not in (1, counts):
            raise UsageError(f"--{name} has {len(values)} values, others have {counts}")
        lists.append(values * counts if len(values) == 1 else values)
    table = Table(box=None, pad_edge=False, title=None)
    for column in ("video", "grid", "tokens", "tiles", "fill", f"kept at {args.top_k_ratio:g}", ""):
        table.add_column(column)
    for height, width, frames in zip(*lists, strict=True):
        count = count_tokens(args.model, height, width, frames, args.tile, args.top_k_ratio)
        tokens = f"{count.tokens:,}" + (f" + {count.text} text" if count.text else "")
        table.add_row(
            f"{height}x{width}x{frames}", "x".join(map(str, count.grid)), tokens,
            str(count.tiles), f"{count.fill:.2f}", str(count.kept), count.rating,
        )  # fmt: skip
    Console(soft_wrap=True).print(table)
    return 0
