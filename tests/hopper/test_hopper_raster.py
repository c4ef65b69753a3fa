"""Tiles fetched from raster order: bit for bit what the same kernels make of tokens in tile order.

On the CPU by emulation, with boxes of five dimensions; on an H100 or H200 the kernels themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import hopper_emulation
import pytest
import torch
from test_hopper_gpu import missing as missing_gpu
from torch import Tensor

from video_attn import BlockMask, VideoLayout
from video_attn.backends import hopper
from video_attn.calls import ForwardCall

needs_emulation = pytest.mark.skipif(
    hopper_emulation.missing() is not None, reason=f"host emulation: {hopper_emulation.missing()}"
)
needs_hopper = pytest.mark.skipif(missing_gpu() is not None, reason=str(missing_gpu()))


class Case(NamedTuple):
    """A video, and tensors of it."""

    video: VideoLayout
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    memory: str  # "bhsd", "bshd", or "packed": q, k and v of a token are neighbours

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        length, dim = self.video.sequence_length, self.head_dim
        heads = (self.heads, self.kv_heads, self.kv_heads)
        if self.memory == "bhsd":
            shapes = [(self.batch, n, length, dim) for n in heads]
            return [torch.randn(s, generator=generator).bfloat16() for s in shapes]
        whole = torch.randn(self.batch, length, sum(heads), dim, generator=generator).bfloat16()
        parts = whole.split(heads, 2)
        return [
            x.transpose(1, 2) if self.memory == "packed" else x.clone().transpose(1, 2)
            for x in parts
        ]

    def mask(self) -> BlockMask:
        """Random lists with a row without keys; the text is partly valid."""
        blocks = self.video.num_blocks
        keep = torch.rand(1, self.heads, blocks, blocks, generator=torch.Generator().manual_seed(4))
        lens = self.video.block_lens()[None].clone()
        if self.video.text_length:
            lens[:, -1] = (self.video.text_length % self.video.tile_volume + 1) // 2
        kept = keep < 0.6
        kept[0, 0, 1] = False
        size, length = self.video.tile_volume, self.video.sequence_length
        return BlockMask.from_dense(kept, size, size, lens, lens, q_len=length, kv_len=length)


CASES = {
    "planes_of_a_tile": Case(VideoLayout((4, 16, 8), (2, 8, 8), 70), 1, 2, 1, 64, "bhsd"),
    "boxes_of_four_planes": Case(VideoLayout((8, 8, 12), (8, 4, 4), 70), 1, 2, 2, 128, "bshd"),
    "batch_and_heads_in_one_axis": Case(VideoLayout((4, 8, 8), (2, 8, 8)), 2, 2, 1, 40, "bhsd"),
    "heads_in_the_channels": Case(VideoLayout((4, 4, 16), (4, 4, 8), 30), 2, 2, 2, 64, "packed"),
    "three_planes": Case(VideoLayout((3, 16, 16), (3, 8, 8)), 1, 1, 1, 64, "bshd"),
    "two_boxes_of_a_plane": Case(VideoLayout((4, 16, 8), (2, 16, 8), 9), 1, 1, 1, 128, "bhsd"),
    "boxes_of_two_planes": Case(VideoLayout((4, 8, 12), (4, 8, 4)), 1, 2, 1, 72, "packed"),
}


def move_tokens(x: Tensor, move: Callable[[Tensor, int], Tensor]) -> Tensor:
    """In the memory order of ``x`` [B, H, S, D]."""
    return move(x.transpose(1, 2), 1).transpose(1, 2) if x.stride(1) < x.stride(2) else move(x, 2)


def tile_order_call(case: Case, tensors: list[Tensor], mask: BlockMask) -> ForwardCall:
    q, k, v = (move_tokens(x, case.video.to_tiles) for x in tensors)
    return ForwardCall(q, k, v, mask, case.head_dim**-0.5)


@needs_emulation
@pytest.mark.parametrize("name", CASES)
def test_emulation(name):
    hopper_emulation.load()
    case = CASES[name]
    tensors, mask = case.tensors(), case.mask()
    call = ForwardCall(*tensors, mask, case.head_dim**-0.5, video=case.video)
    assert hopper._reads_raster(case.video, *tensors)
    with hopper_emulation.options(last_first=len(name) % 2 == 0):
        out, lse = hopper._forward(call)
        expected, expected_lse = hopper._forward(tile_order_call(case, tensors, mask))
    assert torch.equal(out, move_tokens(expected, case.video.from_tiles))
    assert torch.equal(lse, case.video.from_tiles(expected_lse, 2))
    assert out.isfinite().all() and lse.isneginf().any() and not lse.isneginf().all()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", CASES)
def test_gpu(name, gpu):
    case = CASES[name]
    tensors, mask = [x.to(gpu) for x in case.tensors()], case.mask().to(gpu)
    call = ForwardCall(*tensors, mask, case.head_dim**-0.5, video=case.video)
    assert hopper._reads_raster(case.video, *tensors)
    out, lse = hopper._forward(call)
    expected, expected_lse = hopper._forward(tile_order_call(case, tensors, mask))
    assert torch.equal(out, move_tokens(expected, case.video.from_tiles))
    assert torch.equal(lse, case.video.from_tiles(expected_lse, 2))


def boxes_by_definition(tile: tuple[int, int, int]) -> bool:
    """Every 64 tokens of the tile in raster order: a box as wide as the tile."""
    tokens = list(itertools.product(*map(range, tile)))
    if len(tokens) % 64:
        return False
    for start in range(0, len(tokens), 64):
        part = tokens[start : start + 64]
        sides = [sorted({x[axis] for x in part}) for axis in range(3)]
        whole = sides[2] == list(range(tile[2]))
        if not whole or part != list(itertools.product(*sides)):
            return False
    return True


def test_which_tiles_are_cut_in_boxes():
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
    for tile in itertools.product((1, 2, 3, 4, 6), sizes, sizes):
        fits = hopper.is_cut_in_boxes(tile)
        # Boxes of all tiles have one shape; a tile of one box more or less is no tile of theirs.
        assert not fits or boxes_by_definition(tile), tile
    assert hopper.is_cut_in_boxes((6, 8, 8)) and hopper.is_cut_in_boxes((4, 8, 4))
    assert not hopper.is_cut_in_boxes((4, 4, 4))  # a block of 64: not of these kernels
    assert not hopper.is_cut_in_boxes((3, 4, 8)) and not hopper.is_cut_in_boxes((4, 6, 6))


def test_tensors_of_six_dimensions_are_moved():
    """Two batches of heads of 40 channels that lie in the channels: no map has them."""
    case = CASES["heads_in_the_channels"]._replace(head_dim=40)
    tensors = case.tensors()
    assert not hopper._reads_raster(case.video, *tensors)
    assert hopper._reads_raster(case.video, *(x[:1] for x in tensors))
    # Batches and heads of q could share a dimension here; those of the output cannot.
    x = torch.zeros(case.video.sequence_length, 2, 2, 40).permute(1, 2, 0, 3)
    assert not hopper._reads_raster(case.video, x)


@needs_emulation
def test_the_operator_refuses_what_it_cannot_fetch():
    hopper_emulation.load()
    x = torch.randn(1, 1, 384, 64).bfloat16()
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 192, 192)
    out, lse = torch.empty_like(x), torch.empty(1, 1, 384)
    run = torch.ops.video_attn.hopper_raster_forward
    for sizes, message in (
        ((6, 8, 8, 4, 8, 8), "no tiles of the video"),  # cut by the border
        ((8, 6, 8, 4, 6, 8), "no tiles of the video"),  # 64 tokens are no box
        ((2, 8, 8, 2, 8, 8), "no tiles of the video"),  # blocks of 128
        ((600, 8, 8, 3, 8, 8), "does not fit 384 tokens"),
        ((0, 8, 8, 3, 8, 8), "does not fit 384 tokens"),
        ((6, 8, 8, 3, 0, 8), "does not fit 384 tokens"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(
                x, x, x, mask.kv_num_blocks, mask.kv_indices, None, None, 192, 192, 1.0, *sizes,
                out, lse,
            )  # fmt: skip
