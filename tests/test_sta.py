"""Sliding tile attention: masks and functions against the definition in token coordinates.

Also a script: ``python tests/test_sta.py`` prints what it checked.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from functools import partial

import as_script
import oracle
import pytest
import token_masks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from video_cases import DEVICES, DTYPES, answer, random_qkv

from st_attn import sliding_tile_attention
from video_attn import VideoLayout, attention, sliding_tile, sliding_tile_mask

pytestmark = pytest.mark.usefixtures("on_quick_backend")


@dataclass(frozen=True)
class Problem:
    """A video, its text, and how the functions are called; ``valid`` counts valid text tokens."""

    name: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    windows: list[tuple[int, int, int]]
    text: int = 0
    valid: int | list[int] | None = None
    batch: int = 2
    kv_heads: int | None = None
    head_dim: int = 16
    head_dim_v: int | None = None

    @property
    def valid_of_each(self) -> list[int]:
        valid = self.text if self.valid is None else self.valid
        return [valid] * self.batch if isinstance(valid, int) else valid

    @property
    def heads(self) -> int:
        return len(self.windows)

    @property
    def length(self) -> int:
        return math.prod(self.grid) + self.text

    def token_mask(self, coordinates: list[token_masks.Triple]) -> Tensor:
        masks = [
            token_masks.sliding_tile_tokens(
                coordinates, self.grid, self.tile, self.windows, self.text, valid
            )
            for valid in self.valid_of_each
        ]
        return torch.cat(masks)

    def case(
        self, dtype: torch.dtype, device: str, coordinates: list[token_masks.Triple]
    ) -> oracle.Case:
        q, k, v, grad = random_qkv(
            (self.batch, self.heads, self.length, self.head_dim), self.kv_heads,
            head_dim_v=self.head_dim_v, dtype=dtype, device=device,
        )  # fmt: skip
        return oracle.Case(q, k, v, self.token_mask(coordinates).to(device), grad_out=grad)

    def poison(self, x: Tensor) -> Tensor:
        """NaN in the text tokens past the valid ones; video first."""
        x = x.clone()
        for b, valid in enumerate(self.valid_of_each):
            x[b, :, math.prod(self.grid) + valid :] = torch.nan
        return x


W = [(3, 1, 2), (1, 2, 9), (2, 2, 3)]
PROBLEMS = [
    Problem("whole_tiles", (4, 6, 8), (2, 3, 4), [(1, 1, 1), (2, 1, 2)]),
    Problem("one_window_for_all", (4, 6, 8), (2, 2, 2), [(1, 3, 2)] * 2),
    Problem("ragged_tiles", (5, 7, 9), (2, 3, 4), W),
    Problem("ragged_tiles_text", (5, 7, 9), (2, 3, 4), W, text=29),
    Problem("text_padding", (5, 7, 3), (2, 3, 2), W, text=17, valid=5),
    Problem("text_all_padding", (4, 4, 4), (2, 2, 2), W, text=11, valid=0),
    Problem("text_per_batch", (4, 6, 4), (2, 3, 2), W, text=30, valid=[0, 13, 30], batch=3),
    Problem("text_fills_blocks", (4, 6, 4), (2, 3, 2), W, text=24, valid=12),
    Problem("even_windows", (12, 4, 10), (2, 2, 2), [(2, 2, 4), (4, 2, 2)], batch=1),
    Problem("windows_past_the_grid", (5, 4, 3), (2, 2, 2), [(9, 9, 9), (1, 9, 1)], text=3),
    Problem("tile_past_the_grid", (3, 4, 5), (6, 8, 8), [(1, 1, 1)], text=4),
    Problem("tile_6_8_8", (7, 9, 17), (6, 8, 8), [(1, 1, 3), (2, 2, 1)], text=5, batch=1),
    Problem("one_token", (1, 1, 1), (6, 8, 8), [(3, 3, 3)], text=1),
    Problem("one_frame", (1, 9, 9), (1, 4, 4), [(1, 1, 2), (3, 3, 3)]),
    Problem("gqa", (5, 4, 6), (2, 2, 3), [*W, (1, 1, 1)], text=9, valid=4, kv_heads=2),
    Problem("head_dim_64", (4, 6, 4), (2, 3, 2), W, text=8, head_dim=64, batch=1),
    Problem("head_dim_72", (4, 6, 4), (2, 3, 2), W, head_dim=72, batch=1),
    Problem("head_dim_96_v_40", (5, 6, 4), (2, 3, 2), W, 7, 3, head_dim=96, head_dim_v=40),
    Problem("head_dim_128", (4, 4, 4), (2, 2, 2), W, head_dim=128, batch=1),
]
BY_NAME = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_tile_order_function_is_the_definition(problem, dtype, device):
    """st_attn.sliding_tile_attention: out, dq, dk, dv by the definition, padding text unread.

    Bug classes: canvases other than three, head_dim 64 left unwritten, one launch per head with the
    batch in the wrong place, text padding read, text queries forgotten.
    """
    case = problem.case(
        dtype, device, token_masks.tile_order_coordinates(problem.grid, problem.tile)
    )

    def function(q, k, v):
        return sliding_tile_attention(
            q, k, v, problem.windows, problem.text if problem.valid is None else problem.valid,
            True, problem.grid, tile_size=problem.tile,
        )  # fmt: skip

    q, k, v, grad = (problem.poison(x) for x in (case.q, case.k, case.v, case.grad_out))
    oracle.check_against_oracle(answer(function, q, k, v, grad), case, problem.name)


@BY_NAME
@pytest.mark.parametrize("text_first", [False, True], ids=["video_text", "text_video"])
@pytest.mark.parametrize("device", DEVICES)
def test_raster_function_is_the_definition(problem, text_first, device):
    """video_attn.sliding_tile: the same in raster order, text before or after, bhsd and bshd."""
    case = problem.case(torch.float32, device, token_masks.raster_coordinates(problem.grid))
    layout = "bshd" if text_first else "bhsd"

    def move(x: Tensor, video_first: bool) -> Tensor:
        if not text_first:
            return x
        tokens = (
            x.split([x.shape[2] - problem.text, problem.text], 2)
            if video_first
            else x.split([problem.text, x.shape[2] - problem.text], 2)
        )
        return torch.cat(tokens[::-1], 2)

    def function(q, k, v):
        q, k, v = (move(x, True) for x in (q, k, v))
        if layout == "bshd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = sliding_tile(
            q, k, v, problem.grid, problem.windows, tile=problem.tile, layout=layout,
            text_length=problem.valid, text_first=text_first,
        )  # fmt: skip
        return move(out.transpose(1, 2) if layout == "bshd" else out, False)

    q, k, v, grad = (problem.poison(x) for x in (case.q, case.k, case.v, case.grad_out))
    oracle.check_against_oracle(answer(function, q, k, v, grad), case, problem.name)


def test_strided_inputs_are_the_same_inputs():
    """Views of one fused projection, whose tokens are far apart, give what contiguous ones give."""
    fused = torch.randn(2, 96 + 5, 3, 4, 16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    options = {"tile_size": (2, 3, 2)}
    arguments = ((2, 1, 2), 3, True, "4x6x4")
    got = sliding_tile_attention(q, k, v, *arguments, **options)
    expected = sliding_tile_attention(*(x.contiguous() for x in (q, k, v)), *arguments, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("text", [0, 256])
def test_calls_of_the_readme(text):
    """The README's calls on its canvas: window (1, 1, 1) is attention inside each tile of 384."""
    windows, head_dim = [(1, 1, 1)] * 2, 8
    q, k, v, _ = random_qkv((1, 2, 30 * 48 * 80 + text, head_dim))
    if text:
        out = sliding_tile_attention(q, k, v, windows, 200)
    else:
        out = sliding_tile_attention(q, k, v, windows, 0, False)
    tiles = [x[:, :, : 30 * 48 * 80].unflatten(2, (300, 384)) for x in (q, k, v)]
    seen_text = [x[:, :, 30 * 48 * 80 :][:, :, : 200 if text else 0] for x in (k, v)]
    keys, values = (
        torch.cat([x, t[:, :, None].expand(-1, -1, 300, -1, -1)], 3)
        for x, t in zip(tiles[1:], seen_text, strict=True)
    )
    exact = scaled_dot_product_attention(tiles[0], keys, values).flatten(2, 3)
    torch.testing.assert_close(out[:, :, : 30 * 48 * 80], exact)
    if text:
        seen = 30 * 48 * 80 + 200
        exact = scaled_dot_product_attention(
            q[:, :, 30 * 48 * 80 : seen], k[:, :, :seen], v[:, :, :seen]
        )
        torch.testing.assert_close(out[:, :, 30 * 48 * 80 : seen], exact)
        assert (out[:, :, seen:] == 0).all()


def test_text_length_as_int_list_or_tensor():
    """The three ways to say the valid text agree; a tensor is never read by the host."""
    q, k, v, grad = random_qkv((2, 3, 64 + 20, 8))

    def call(text_length):
        def function(q, k, v):
            return sliding_tile_attention(
                q, k, v, W, text_length, True, (4, 4, 4), tile_size=(2, 2, 2)
            )

        return answer(function, q, k, v, grad)

    for valid in (0, 7, 8, 20):
        results = [
            call(x) for x in (valid, [valid] * 2, torch.tensor([valid]), torch.tensor([valid] * 2))
        ]
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def test_a_model_may_tile_once():
    """Tile order around many layers, as the docstring of sliding_tile shows, is the same."""
    video = VideoLayout((5, 6, 7), (2, 3, 4), text_length=9)
    q, k, v, _ = random_qkv((2, 3, video.sequence_length, 8))
    mask = sliding_tile_mask(video, W)
    tiled = [video.to_tiles(x) for x in (q, k, v)]
    out = video.from_tiles(attention(tiled[0], tiled[1], attention(*tiled, mask), mask))
    once = partial(sliding_tile, grid=video.grid, window=W, tile=video.tile)
    assert torch.equal(out, once(q, k, once(q, k, v)))


# -- properties ------------------------------------------------------------------------------------

sizes = st.tuples(*[st.integers(1, 7)] * 3)
windows = st.tuples(*[st.integers(1, 5)] * 3)


@given(grid=sizes, tile=sizes, window=windows)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_tile_sees_w_tiles_per_axis(grid, tile, window):
    """Every query tile sees exactly w tiles per axis: w in a row, the tile itself among them."""
    layout = VideoLayout(grid, tile)
    keep = sliding_tile_mask(layout, window).to_dense()[0, 0]
    tiles = list(itertools.product(*map(range, layout.tile_grid)))
    for i, row in enumerate(keep.tolist()):
        seen = [tiles[j] for j, sees in enumerate(row) if sees]
        assert tiles[i] in seen
        per_axis = [sorted({tile[axis] for tile in seen}) for axis in range(3)]
        for coordinates, wide, total in zip(per_axis, window, layout.tile_grid, strict=True):
            assert len(coordinates) == min(wide, total)
            assert coordinates[-1] - coordinates[0] == len(coordinates) - 1
        assert len(seen) == math.prod(map(len, per_axis))


@given(grid=sizes, tile=sizes, window=st.lists(windows, min_size=1, max_size=3), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_lists_are_the_definition(grid, tile, window, data):
    """The closed form of lists, lengths and transposed lists: the definition, token by token."""
    text = data.draw(st.integers(0, 2 * math.prod(tile)))
    valid = data.draw(st.integers(0, text))
    layout = VideoLayout(grid, tile, text)
    mask = sliding_tile_mask(layout, window, text_length=valid, transposed=True)
    coordinates = token_masks.padded_coordinates(grid, tile)
    expected = token_masks.sliding_tile_tokens(coordinates, grid, tile, window, text, valid)
    got = mask.to_token_mask()
    assert torch.equal(got.expand_as(expected), expected)
    lists = sliding_tile_mask(layout, window, text_length=valid)
    for a, b in zip(mask.transposed(), lists.transposed(), strict=True):
        assert torch.equal(a, b)
    indices, counts = mask.kv_indices, mask.kv_num_blocks
    rises = indices[..., 1:] > indices[..., :-1]
    listed = torch.arange(1, indices.shape[-1]) < counts[..., None]
    assert bool((rises | ~listed).all()), "lists must be ascending"


@given(grid=sizes, tile=sizes)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_window_over_the_grid_is_dense(grid, tile):
    """A window as large as the grid gives dense attention, text included."""
    q, k, v, _ = random_qkv((1, 2, math.prod(grid) + 6, 8))
    out = sliding_tile(q, k, v, grid, (7, 7, 7), tile=tile)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))


def test_heads_may_be_permuted():
    """Each head has its own window: permuted heads and windows give permuted outputs."""
    windows = [(1, 1, 1), (3, 1, 2), (2, 2, 2), (1, 3, 1)]
    q, k, v, _ = random_qkv((2, 4, 6 * 6 * 6, 16))
    order = [2, 0, 3, 1]
    out = sliding_tile(q, k, v, (6, 6, 6), windows, tile=(2, 2, 2))
    permuted = sliding_tile(
        *(x[:, order] for x in (q, k, v)), (6, 6, 6), [windows[i] for i in order], tile=(2, 2, 2)
    )
    assert torch.equal(permuted, out[:, order])
    assert not torch.allclose(out[:, 0], out[:, 1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees():
    """A foreign oracle: FlexAttention, the window rule as a mask_mod over raster coordinates."""
    grid, tile, window, text, valid = (5, 6, 7), (2, 3, 2), (2, 1, 3), 21, 9
    video, length = math.prod(grid), math.prod(grid) + text

    def near(q_at, kv_at, axis):
        tiles = -(-grid[axis] // tile[axis])
        wide = min(window[axis], tiles)
        low = (q_at // tile[axis] - wide // 2).clamp(0, tiles - wide)
        return (kv_at // tile[axis] >= low) & (kv_at // tile[axis] < low + wide)

    def mask_mod(b, h, q, k):
        in_window = (
            near(q // (grid[1] * grid[2]), k // (grid[1] * grid[2]), 0)
            & near(q // grid[2] % grid[1], k // grid[2] % grid[1], 1)
            & near(q % grid[2], k % grid[2], 2)
        )
        both_video = (q < video) & (k < video) & in_window
        valid_query, valid_key = q < video + valid, k < video + valid
        return valid_query & valid_key & (both_video | (q >= video) | (k >= video))

    q, k, v, _ = random_qkv((2, 3, length, 16))
    flex_mask = create_block_mask(mask_mod, None, None, length, length, "cpu", BLOCK_SIZE=16)
    expected = flex_attention(q, k, v, block_mask=flex_mask)  # on a CPU it has no backward
    got = sliding_tile(q, k, v, grid, window, tile=tile, text_length=valid)
    torch.testing.assert_close(got, expected)


if __name__ == "__main__":
    sys.exit(as_script.main(__file__, "test_video_runtime.py"))
