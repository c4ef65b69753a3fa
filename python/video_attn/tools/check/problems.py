"""The problems of ``video-attn check``: small, odd, and one of each kind that models pose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...block_mask import BlockMask
from ...calls import problem_of
from ...layout import VideoLayout
from ...patterns.radial import radial_mask
from ...patterns.sliding_tile import sliding_tile_mask
from ...registry import Problem

MakeMask = Callable[[torch.device], BlockMask]


@dataclass(frozen=True)
class CheckProblem:
    """One problem: sizes, a mask, and what is computed.

    Args:
        name: as the table shows it.
        lengths: of queries and keys. heads: of queries and keys. dims: head_dim of q and k, of v.
        make_mask: on a device; None for dense attention.
        quick: part of ``--quick``.
    """

    name: str
    lengths: tuple[int, int] = (200, 300)
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (64, 64)
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    make_mask: MakeMask | None = None
    is_causal: bool = False
    precision: str = "native"
    quick: bool = False

    def build(self, device: torch.device) -> Built:
        """Its tensors: normal data, the same on every machine, NaN where nobody may look."""
        generator = torch.Generator().manual_seed(len(self.name))

        def normal(heads: int, length: int, dim: int) -> Tensor:
            x = torch.randn(self.batch, heads, length, dim, generator=generator)
            return x.to(device, self.dtype)

        (q_len, kv_len), (heads, kv_heads), (dim, dim_v) = self.lengths, self.heads, self.dims
        mask = None if self.make_mask is None else self.make_mask(device)
        q, k = normal(heads, q_len, dim), normal(kv_heads, kv_len, dim)
        v = normal(kv_heads, kv_len, dim_v)
        if mask is not None:
            hidden = _unlisted_keys(mask, self.batch, heads, kv_heads)
            k, v = (x.masked_fill(hidden[..., None], torch.nan) for x in (k, v))
        grad = normal(heads, q_len, dim_v)
        return Built(self, (q, k, v), grad, mask)


@dataclass(frozen=True)
class Built:
    problem: CheckProblem
    tensors: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    mask: BlockMask | None

    def question(self, direction: Any) -> Problem:
        """What the registry is asked."""
        return problem_of(
            direction, *self.tensors, self.mask, is_causal=self.problem.is_causal,
            precision=self.problem.precision,
        )  # fmt: skip


def _unlisted_keys(mask: BlockMask, batch: int, heads: int, kv_heads: int) -> Tensor:
    """bool [B, Hkv, Sk]: keys in no list of their group's heads, or past a block's valid ones."""
    blocks = mask.to_dense().any(2).expand(batch, heads, -1)
    blocks = blocks.unflatten(1, (kv_heads, -1)).any(2)
    token = torch.arange(mask.kv_len, device=mask.device)
    valid = token % mask.kv_block_size < mask.kv_lens()[:, token // mask.kv_block_size]
    return ~(blocks[..., token // mask.kv_block_size] & valid[:, None])


def _lists(
    lengths: tuple[int, int], sizes: tuple[int, int], heads: int = 1, lens: bool = False
) -> MakeMask:
    """Random lists; the first query block sees nothing."""

    def make(device: torch.device) -> BlockMask:
        generator = torch.Generator().manual_seed(sum(lengths) + sum(sizes))
        blocks = [-(-n // size) for n, size in zip(lengths, sizes, strict=True)]
        keep = torch.rand(1, heads, *blocks, generator=generator) < 0.5
        keep[..., -1] = True
        keep[:, 0, 0] = False
        q_lens, kv_lens = (
            torch.randint(1, size + 1, (1, n), generator=generator, dtype=torch.int32)
            for size, n in zip(sizes, blocks, strict=True)
        )
        mask = BlockMask.from_dense(
            keep, *sizes, *((q_lens, kv_lens) if lens else ()), q_len=lengths[0], kv_len=lengths[1]
        )
        return mask.to(device)

    return make


def _sliding(layout: VideoLayout, window: tuple[int, int, int], text: int | None) -> MakeMask:
    return lambda device: sliding_tile_mask(layout, window, text_length=text, device=device)


def _radial(layout: VideoLayout) -> MakeMask:
    return lambda device: radial_mask(layout, block_size=64, device=device)


_TILES = VideoLayout((6, 16, 24), (6, 8, 8))  # 6 whole tiles of 384 tokens
_RAGGED = VideoLayout((5, 9, 10), (4, 4, 4), 70)  # tiles that do not fill their 64 tokens, text
_FRAMES = VideoLayout((6, 10, 12), (1, 1, 1))
_PADDED = _RAGGED.padded_length  # text included

NATIVE = (
    CheckProblem("dense", dims=(128, 128), quick=True),
    CheckProblem("dense, grouped heads", (333, 257), (6, 2), (64, 64), batch=2),
    CheckProblem("dense, odd head_dim", (130, 77), dims=(40, 72), dtype=torch.float16),
    CheckProblem("dense, head_dim 256", (100, 200), dims=(256, 256)),
    CheckProblem("causal", (150, 230), dims=(64, 64), is_causal=True, quick=True),
    CheckProblem("fp32", (100, 130), dtype=torch.float32, quick=True),
    CheckProblem("lists of 64", (500, 700), (4, 2), (128, 128),
                 make_mask=_lists((500, 700), (64, 64), 4), quick=True),
    CheckProblem("lists of 64, valid lengths", (512, 640), (2, 1), (64, 64), dtype=torch.float16,
                 make_mask=_lists((512, 640), (64, 64), 2, lens=True), batch=2),
    CheckProblem("lists of 128 by 64", (512, 400), (2, 2), (128, 128),
                 make_mask=_lists((512, 400), (128, 64))),
    CheckProblem("lists of 100 by 16", (300, 200), dims=(64, 64), dtype=torch.float16,
                 make_mask=_lists((300, 200), (100, 16))),
    CheckProblem("sliding tiles of 384", (2304, 2304), (2, 2), (128, 128),
                 make_mask=_sliding(_TILES, (1, 1, 3), None), quick=True),
    CheckProblem("sliding ragged tiles, text", (_PADDED,) * 2, (2, 2), (64, 64),
                 make_mask=_sliding(_RAGGED, (1, 3, 1), 33)),
    CheckProblem("radial", (720, 720), (2, 1), (64, 64), make_mask=_radial(_FRAMES), quick=True),
)  # fmt: skip

_QUANTIZED = (
    CheckProblem("dense", (300, 500), dims=(128, 128), quick=True),
    CheckProblem("dense, grouped heads", (257, 333), (4, 2), (64, 64), batch=2),
    CheckProblem("causal", (200, 300), dims=(64, 64), is_causal=True),
    CheckProblem("lists of 64", (512, 640), (2, 2), (128, 128),
                 make_mask=_lists((512, 640), (64, 64), 2, lens=True), quick=True),
)  # fmt: skip


def problems(precisions: tuple[str, ...], quick: bool) -> list[CheckProblem]:
    """All problems, or those of ``--quick``."""
    found = [*NATIVE]
    for precision in precisions:
        if precision != "native":
            found += [
                replace(p, name=f"{precision}, {p.name}", precision=precision) for p in _QUANTIZED
            ]
    return [p for p in found if p.quick or not quick]
