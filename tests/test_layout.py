"""VideoLayout against coordinates computed one token at a time."""

from __future__ import annotations

import math

import pytest
import token_masks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_attn import VideoLayout
from video_attn.layout import as_triple

sizes = st.tuples(*[st.integers(1, 5)] * 3)
layouts = st.builds(
    VideoLayout, grid=sizes, tile=sizes, text_length=st.integers(0, 9), text_first=st.booleans()
)
some = settings(max_examples=60)


def raster_positions(layout: VideoLayout) -> dict[token_masks.Triple, int]:
    """Where each video token stands in the raster sequence."""
    start = layout.text_length if layout.text_first else 0
    return {c: start + i for i, c in enumerate(token_masks.raster_coordinates(layout.grid))}


def padded_positions(layout: VideoLayout) -> list[int]:
    """The raster position of the token in every slot of the padded tile order, -1 for padding."""
    raster = raster_positions(layout)
    slots = token_masks.padded_coordinates(layout.grid, layout.tile)
    text_start = 0 if layout.text_first else layout.video_length
    text = [text_start + i for i in range(layout.text_length)]
    return [-1 if c is None else raster[c] for c in slots] + text


@some
@given(layouts)
def test_orders_and_slots(layout):
    padded = padded_positions(layout)
    packed = [p for p in padded if p >= 0]
    assert layout.tile_order().tolist() == packed
    assert layout.padded_slots().tolist() == [i for i, p in enumerate(padded) if p >= 0]
    assert layout.padded_length == len(padded)
    assert layout.sequence_length == len(packed)
    assert sorted(packed) == list(range(layout.sequence_length))


@some
@given(layouts)
def test_padding_is_cleared_and_nothing_else(layout):
    padded = torch.tensor(padded_positions(layout))
    assert torch.equal(layout.tile_places(), padded.int())
    x = torch.full((2, len(padded), 3), torch.nan)
    x[:, padded >= 0] = 1
    layout.clear_padding(x)
    assert torch.equal(x, (padded >= 0).float()[:, None].expand_as(x))
    with pytest.raises(ValueError, match="padded_length"):
        layout.clear_padding(torch.zeros(2, len(padded) + 1, 3))


@some
@given(layouts)
def test_sizes_and_lens(layout):
    volume = layout.tile_volume
    padded = padded_positions(layout)
    slots = [padded[i : i + volume] for i in range(0, len(padded), volume)]
    assert layout.num_blocks == len(slots) == layout.num_tiles + layout.num_text_blocks
    assert layout.block_lens().tolist() == [sum(p >= 0 for p in slot) for slot in slots]
    assert layout.block_lens().dtype == torch.int32
    assert layout.is_ragged == (-1 in padded)
    assert layout.video_length == math.prod(layout.grid)
    tiles = {tuple(a // b for a, b in zip(c, layout.tile, strict=True))
             for c in token_masks.raster_coordinates(layout.grid)}  # fmt: skip
    assert layout.num_tiles == len(tiles)
    assert layout.tile_grid == tuple(max(t[axis] for t in tiles) + 1 for axis in range(3))
    for slot in slots:
        valid = [p >= 0 for p in slot]
        assert valid == sorted(valid, reverse=True), "valid tokens come first in a slot"


@some
@given(layouts)
def test_permutations_move_every_token_to_its_slot(layout):
    x = torch.arange(1.0, layout.sequence_length + 1)
    padded = padded_positions(layout)
    expected = torch.tensor([0.0 if p < 0 else p + 1.0 for p in padded])
    tiles = layout.to_tiles(x[:, None])
    assert torch.equal(tiles[:, 0], expected)
    assert torch.equal(layout.from_tiles(tiles)[:, 0], x)
    packed = x[layout.tile_order()]
    assert torch.equal(layout.pad_tiles(packed[:, None])[:, 0], expected)
    assert torch.equal(layout.unpad_tiles(expected[:, None])[:, 0], packed)


@some
@given(layouts, st.integers(0, 3))
def test_any_dimension_and_garbage_in_padding(layout, dim):
    """What stands in the padding never comes back to the raster order."""
    shape = [2, 3, 2, 3]
    shape[dim] = layout.sequence_length
    x = torch.randn(shape)
    for negative in (dim, dim - 4):
        tiles = layout.to_tiles(x, dim=negative)
        holes = torch.tensor([p < 0 for p in padded_positions(layout)])
        view = [1] * 4
        view[dim] = -1
        tiles = tiles.masked_fill(holes.view(view), torch.nan)
        assert torch.equal(layout.from_tiles(tiles, dim=negative), x)


def views(channels: int, dtype: torch.dtype, length: int) -> dict[str, torch.Tensor]:
    """[2, 3, length, channels] in memory of all kinds."""
    size = 2 * 3 * length * channels
    x = torch.randint(0, 2, (size + 3,)).to(dtype)
    whole = x[:size].view(2, 3, length, channels)
    found = {
        "whole": whole,
        "of odd offset": x[3:].view(2, 3, length, channels),
        "heads between tokens": x[:size].view(2, length, 3, channels).transpose(1, 2),
        "part of the channels": torch.cat([whole, whole], -1)[..., 1 : 1 + channels],
        "channels apart": torch.stack([whole, whole], -1)[..., 1],
        "one for all": whole[:, :1].expand(2, 3, length, channels),
    }
    if dtype.is_complex:
        found["conjugate"] = (whole * 1j).conj()
    if dtype.is_floating_point:
        found["negative"] = torch._neg_view(whole)
    return found


@pytest.mark.parametrize("channels", [1, 2, 8, 20])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.complex64, torch.bool], ids=str
)
def test_every_dtype_and_memory_order(dtype, channels):
    """Rows are moved in wide words where that is possible: no value may know."""
    layout = VideoLayout((3, 2, 5), (2, 2, 3), text_length=2)
    padded = torch.tensor(padded_positions(layout))
    for name, x in views(channels, dtype, layout.sequence_length).items():
        tiles = layout.to_tiles(x)
        expected = torch.where(padded[:, None] < 0, torch.zeros((), dtype=dtype), x[:, :, padded])
        assert torch.equal(tiles, expected), name
        assert tiles.is_contiguous() and tiles.dtype == dtype, name
        assert torch.equal(layout.from_tiles(tiles), x), name
        assert torch.equal(layout.to_tiles(x.transpose(1, 2), 1), tiles.transpose(1, 2)), name


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 5, 3)], ids=["whole", "ragged"])
@pytest.mark.parametrize("name", ["to_tiles", "from_tiles", "pad_tiles", "unpad_tiles"])
def test_gradients(name, grid, text_first):
    """Linear maps: checked numerically, twice over, and the padding's gradient is dropped."""
    layout = VideoLayout(grid, (2, 2, 2), text_length=3, text_first=text_first)
    is_input_padded = name in ("from_tiles", "unpad_tiles")
    length = layout.padded_length if is_input_padded else layout.sequence_length
    x = torch.randn(2, length, 2, dtype=torch.float64, requires_grad=True)
    move = getattr(layout, name)
    assert torch.autograd.gradcheck(move, x)
    assert torch.autograd.gradgradcheck(move, x)
    if is_input_padded:
        (grad,) = torch.autograd.grad(move(x).sum(), x)
        assert grad[0, :, 0].tolist() == [float(p >= 0) for p in padded_positions(layout)]


def test_gradients_are_bitwise_repeatable():
    layout = VideoLayout((3, 5, 7), (2, 2, 4), text_length=5)
    x = torch.randn(layout.sequence_length, 4, requires_grad=True)
    g = torch.randn(layout.padded_length, 4)
    grads = [torch.autograd.grad(layout.to_tiles(x), x, g)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert torch.equal(grads[0], layout.from_tiles(g))


def test_packed_order_is_not_copied_when_nothing_is_padded():
    layout = VideoLayout((4, 4, 4), (2, 2, 2), text_length=3)
    x = torch.randn(layout.sequence_length, 2)
    assert layout.pad_tiles(x) is x
    assert layout.unpad_tiles(x) is x


def test_layout_of_the_original_video():
    """The case everybody runs: 30x48x80 tokens in tiles of 6x8x8 and 256 text tokens."""
    layout = VideoLayout((30, 48, 80), (6, 8, 8), text_length=256)
    assert layout.tile_grid == (5, 6, 10)
    assert (layout.num_tiles, layout.tile_volume, layout.num_text_blocks) == (300, 384, 1)
    assert layout.sequence_length == layout.padded_length == 115_200 + 256
    assert not layout.is_ragged
    assert layout.block_lens().tolist() == [384] * 300 + [256]


def test_layouts_are_values():
    """Equal layouts are one cache entry; forms of the same three numbers are equal."""
    layout = VideoLayout((4, 6, 8), (2, 2, 2), 3)
    for same in ("4x6x8", [4, 6, 8], (4, 6, 8)):
        assert VideoLayout(same, 2, 3) == layout
        assert hash(VideoLayout(same, "2x2x2", 3)) == hash(layout)
    assert VideoLayout((4, 6, 8), (2, 2, 2), 3, True) != layout
    assert layout.tile_order().data_ptr() == VideoLayout("4x6x8", 2, 3).tile_order().data_ptr()
    with pytest.raises(AttributeError):
        layout.grid = (1, 1, 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("30x48x80", (30, 48, 80)), ([1, 2, 3], (1, 2, 3)), (4, (4, 4, 4)), (" 3x 4 x5", (3, 4, 5))],
)
def test_three_integers(value, expected):
    assert as_triple(value, "grid") == expected


def test_inference_mode_first_then_training():
    """Index tables made under inference mode serve a training step afterwards."""
    layout = VideoLayout((3, 4, 5), (2, 2, 2), text_length=1)
    with torch.inference_mode():
        layout.to_tiles(torch.randn(layout.sequence_length, 2))
        layout.block_lens()
    x = torch.randn(layout.sequence_length, 2, requires_grad=True)
    layout.from_tiles(layout.to_tiles(x)).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.gpu
def test_same_on_gpu(gpu):
    layout = VideoLayout((5, 7, 9), (2, 4, 4), text_length=7, text_first=True)
    x = torch.randn(2, layout.sequence_length, 8)
    moved = layout.to_tiles(x.to(gpu))
    assert torch.equal(moved.cpu(), layout.to_tiles(x))
    assert torch.equal(layout.from_tiles(moved).cpu(), x)
    assert layout.block_lens(gpu).device == moved.device
