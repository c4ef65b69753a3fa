"""The problems of the benchmarks: inputs, masks and what describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from video_attn import BlockMask, VideoLayout, sliding_tile_mask
from video_attn.layout import Triple

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEAR, RANDOM = "neighbouring", "random"  # which key blocks a list of VSA names


@dataclass(frozen=True)
class Case:
    """One problem: q, k, v [B, H, S, D] that want gradients, a mask (None: dense), and what
    describes them. is_causal: without a mask, every query sees the keys up to its own. raster: the
    tokens are in raster order, and the mask is over the tile order of this layout.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    mask: BlockMask | None
    problem: dict[str, Any]
    is_causal: bool = False
    raster: VideoLayout | None = None

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def quiet(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v that want no gradients."""
        q, k, v = (x.detach() for x in self.tensors)
        return q, k, v

    @property
    def dense_flops(self) -> float:
        """Of the forward pass if every query saw every (causal) key, padding included."""
        batch, heads, length, _ = self.grad.shape
        pairs = length * (length + 1) // 2 if self.is_causal else length * length
        return 4.0 * batch * heads * self.head_dim * pairs

    @property
    def head_dim(self) -> float:
        """Of one of the two products: the mean of those of q and v."""
        return (self.tensors[0].shape[3] + self.grad.shape[3]) / 2

    @property
    def flops(self) -> float:
        """Of the forward pass over the pairs that the mask keeps."""
        if self.mask is None:
            return self.dense_flops
        batch, heads = self.grad.shape[:2]
        return self.head_dim * self.mask.flops(1, batch=batch, heads=heads)


def make_dense_case(
    tokens: int, heads: int, head_dim: int, dtype: str, device: torch.device | str,
    head_dim_v: int | None = None, is_causal: bool = False, batch: int = 1,
) -> Case:  # fmt: skip
    """Normally distributed inputs for dense attention; head_dim_v: default head_dim."""
    generator = torch.Generator(device).manual_seed(0)
    dims = (head_dim, head_dim, *[head_dim_v or head_dim] * 2)
    q, k, v, grad = (
        torch.randn(batch, heads, tokens, dim, generator=generator, device=device).to(DTYPES[dtype])
        for dim in dims
    )
    described = {"dtype": dtype, "heads": heads, "tokens": tokens, "head_dim": head_dim}
    if head_dim_v is not None:
        described["head_dim_v"] = head_dim_v
    if batch > 1:
        described["batch"] = batch
    if is_causal:
        described["is_causal"] = True
    tensors = tuple(x.requires_grad_() for x in (q, k, v))
    return Case(tensors, grad, None, described, is_causal)  # type: ignore[arg-type]


def make_case(
    mask: BlockMask, heads: int, head_dim: int, dtype: str, problem: dict[str, Any]
) -> Case:
    """Normally distributed inputs for ``mask``, on its device."""
    dense = make_dense_case(mask.q_len, heads, head_dim, dtype, mask.device)
    return replace(dense, mask=mask, problem={**dense.problem, **problem})


def sta_case(
    layout: VideoLayout,
    window: Triple | Sequence[Triple],
    heads: int,
    head_dim: int,
    dtype: str,
    device: torch.device | str,
    valid_text: int | None = None,
) -> Case:
    """Sliding tiles: tokens in tile order, one window for all heads."""
    valid = layout.text_length if valid_text is None else valid_text
    mask = sliding_tile_mask(layout, window, text_length=valid, device=device, transposed=True)
    grid, tile, wide = ("x".join(map(str, x)) for x in (layout.grid, layout.tile, window))
    described = {
        "grid": grid, "tile": tile, "window": wide, "text": layout.text_length,
        "valid_text": valid, "density": round(mask.density(), 5),
    }  # fmt: skip
    return make_case(mask, heads, head_dim, dtype, described)


def vsa_case(
    tokens: int, block_size: int, top_k: int, heads: int, head_dim: int, dtype: str,
    device: torch.device | str, lists: str = RANDOM,
) -> Case:  # fmt: skip
    """``top_k`` key blocks for every head and query block, ascending.

    ``lists`` is "random", or "neighbouring": blocks on a grid choose by distance, with a little
    noise, as trained models mostly do.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = tokens // block_size
    chance = torch.rand(1, heads, blocks, blocks, generator=generator)
    if lists == NEAR:
        chance = 2.0 * chance - _distances(blocks)
    indices = chance.topk(top_k, -1).indices.sort(-1).values.int().to(device)
    mask = BlockMask.from_indices(indices, block_size, block_size, q_len=tokens, kv_len=tokens)
    mask.transposed()
    described = {"block_size": block_size, "kept_blocks": top_k, "blocks": lists}
    return make_case(mask, heads, head_dim, dtype, described)


def _distances(blocks: int) -> Tensor:
    """Distances between blocks on a grid of about 12 : 8 : 8, [blocks, blocks]."""
    height = max(1, round((blocks / 1.5) ** (1 / 3)))
    number = torch.arange(blocks)
    t, y, x = number // (height * height), number // height % height, number % height
    place = torch.stack([t, y, x], -1).float()
    return torch.cdist(place, place)
