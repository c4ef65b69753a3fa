"""The attention calls that the demo compares. One line in ``PATTERNS`` adds another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...attention import attention
from ...block_mask import BlockMask
from ...functional import video_sparse, video_sparse_attn
from ...layout import Triple, VideoLayout
from ...patterns.radial import RadialRule, radial_mask
from ...patterns.sliding_tile import sliding_tile_mask
from ...patterns.video_sparse import kept_blocks
from .tokens import Tokens


class Settings(NamedTuple):
    """What the command line says about patterns: tile in tokens, window in tiles, kept share."""

    tile: Triple
    window: Triple
    top_k_ratio: float


def _unmoved(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Call:
    """One way to run attention on the tokens, ready to be timed.

    Args:
        run: the timed call; its output is in the pattern's own order.
        mask: what it attends to, over the pattern's own order; None for dense attention.
        order: raster order to the pattern's own. restore: an output back to raster order.
        order_name: calls with the same name have the same order and blocks.
        is_ours: served by a backend of this package.
    """

    run: Callable[[], Tensor]
    mask: BlockMask | None = None
    order: Callable[[Tensor], Tensor] = _unmoved
    restore: Callable[[Tensor], Tensor] = _unmoved
    order_name: str = "raster"
    is_ours: bool = True


class Pattern(NamedTuple):
    """A row of the demo's table."""

    title: str
    prepare: Callable[[Tokens, Settings], Call]


def _dense_torch(tokens: Tokens, settings: Settings) -> Call:
    q, k, v = tokens.q, tokens.k, tokens.v
    return Call(lambda: scaled_dot_product_attention(q, k, v), is_ours=False)


def _dense(tokens: Tokens, settings: Settings) -> Call:
    q, k, v = tokens.q, tokens.k, tokens.v
    return Call(lambda: attention(q, k, v))


def _sliding_tile(tokens: Tokens, settings: Settings) -> Call:
    layout = VideoLayout(tokens.grid, settings.tile)
    mask = sliding_tile_mask(layout, settings.window, device=tokens.q.device)
    q, k, v = map(layout.to_tiles, (tokens.q, tokens.k, tokens.v))
    return _in_tiles(lambda: attention(q, k, v, mask), mask, layout)


def _video_sparse(tokens: Tokens, settings: Settings) -> Call:
    layout = VideoLayout(tokens.grid, settings.tile)
    top_k = kept_blocks(settings.top_k_ratio, layout.num_tiles)
    _, mask = video_sparse(
        tokens.q, tokens.k, tokens.v, tokens.grid,
        tile=settings.tile, top_k=top_k, gate=0, return_mask=True,
    )  # fmt: skip
    q, k, v = map(layout.to_tiles, (tokens.q, tokens.k, tokens.v))
    lens = layout.block_lens(q.device) if layout.is_ragged else None
    # Gate 0: there is no trained gate here, and without one the coarse branch is only blur.
    run = lambda: video_sparse_attn(q, k, v, lens, top_k, layout.tile, 0.0)  # noqa: E731
    return _in_tiles(run, mask, layout)


def _radial(tokens: Tokens, settings: Settings) -> Call:
    layout = VideoLayout(tokens.grid, settings.tile)  # of which radial attention needs no tile
    size = layout.tile_volume
    # A clip this short has no far frames: narrower windows than those of the published models.
    rule = RadialRule(decay_factor=0.2, neighbor_fraction=0.2, min_window=size // 4)
    mask = radial_mask(layout, rule, block_size=size, device=tokens.q.device)
    q, k, v = tokens.q, tokens.k, tokens.v
    return Call(lambda: attention(q, k, v, mask), mask, order_name=f"raster, blocks of {size}")


def _in_tiles(run: Callable[[], Tensor], mask: BlockMask, layout: VideoLayout) -> Call:
    name = f"tiles of {'x'.join(map(str, layout.tile))}"
    return Call(run, mask, layout.to_tiles, layout.from_tiles, name)


# The first is what the others are measured against. Titles say it in a table and on pictures.
PATTERNS = {
    "torch": Pattern("dense (torch SDPA)", _dense_torch),
    "dense": Pattern("dense", _dense),
    "sta": Pattern("sliding tile (STA)", _sliding_tile),
    "vsa": Pattern("video sparse (VSA)", _video_sparse),
    "radial": Pattern("radial", _radial),
}


@torch.no_grad()
def block_weights(tokens: Tokens, call: Call) -> Tensor:
    """What dense attention gives to every block of the call's mask: fp32 [3, Nq, Nk].

    An entry is the softmax weight that a query of the row's block spends on the column's block, on
    average over its valid queries; a row sums to 1.

    Raises:
        ValueError: the call has no mask.
    """
    mask = call.mask
    if mask is None:
        raise ValueError("call must have a mask; dense attention keeps all weights")
    q, k = call.order(tokens.q)[0].float(), call.order(tokens.k)[0].float()
    padding = (-k.shape[1]) % mask.kv_block_size
    positions = torch.arange(mask.kv_block_size, device=k.device)
    valid = (positions < mask.kv_lens()[0, :, None]).flatten()
    keys = torch.nn.functional.pad(k, (0, 0, 0, padding)).mT
    rows = []
    for index, length in enumerate(mask.q_lens()[0].tolist()):
        start = index * mask.q_block_size
        scores = q[:, start : start + length] @ keys / k.shape[2] ** 0.5
        weights = scores.masked_fill(~valid, -torch.inf).softmax(-1)
        rows.append(weights.unflatten(-1, (-1, mask.kv_block_size)).sum(-1).mean(1))
    return torch.stack(rows, 1)


def kept_weight(weights: Tensor, mask: BlockMask) -> float:
    """The share of dense attention's weight that lies in the blocks ``mask`` keeps, in [0, 1]."""
    kept = (weights * mask.to_dense()[0]).sum(-1).mean(0)
    lens = mask.q_lens()[0].float()
    return float((kept * lens).sum() / lens.sum())
