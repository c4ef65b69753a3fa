"""Every wrong argument of the video functions raises TypeError or ValueError that names it."""

from __future__ import annotations

import re

import pytest
import torch

from st_attn import sliding_tile_attention
from video_attn import VideoLayout, sliding_tile, video_sparse
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.patterns.video_sparse import kept_blocks
from vsa import block_sparse_attn, block_sparse_attn_from_indices, video_sparse_attn

GRID, TILE, WINDOW = (4, 4, 4), (2, 2, 2), (1, 1, 1)
LAYOUT = VideoLayout(GRID, TILE, 10)


def x(batch=2, heads=3, tokens=64, head_dim=8, **options):
    return torch.zeros(batch, heads, tokens, head_dim, **options)


def sta(q=None, k=None, v=None, window=WINDOW, text_length=0, has_text=True, shape=GRID, **options):
    q = x() if q is None else q
    k, v = (q if y is None else y for y in (k, v))
    options = {"tile_size": TILE, **options}
    return sliding_tile_attention(q, k, v, window, text_length, has_text, shape, **options)


def raster(q=None, k=None, v=None, grid=GRID, window=WINDOW, **options):
    q = x() if q is None else q
    k, v = (q if y is None else y for y in (k, v))
    return sliding_tile(q, k, v, grid, window, **{"tile": TILE, **options})


def sparse(q=None, k=None, v=None, grid=GRID, **options):
    q = x() if q is None else q
    k, v = (q if y is None else y for y in (k, v))
    if "top_k" not in options and "top_k_ratio" not in options:
        options["top_k"] = 2
    return video_sparse(q, k, v, grid, **{"tile": TILE, **options})


def padded(*arguments, q=None, k=None, v=None, sizes=None, **options):
    q = x() if q is None else q
    k, v = (q if y is None else y for y in (k, v))
    return video_sparse_attn(q, k, v, sizes, *arguments, **options)


def mapped(block_map, sizes=None, q=None):
    q = x() if q is None else q
    return block_sparse_attn(q, q, q, block_map, sizes)


def listed(indices, counts, sizes=None):
    return block_sparse_attn_from_indices(x(), x(), x(), indices, counts, sizes)


def ints(*shape, value=0, dtype=torch.int32):
    return torch.full(shape, value, dtype=dtype)


MAP = torch.ones(2, 3, 8, 8, dtype=torch.bool)

ROWS = {
    # st_attn.sliding_tile_attention
    "sta_q_not_a_tensor": (lambda: sta(q=[1.0]), TypeError, "q must be a Tensor"),
    "sta_q_3_dims": (lambda: sta(q=torch.zeros(3, 64, 8)), ValueError, "q must be [B, H, S, D]"),
    "sta_cross_attention": (lambda: sta(k=x(tokens=65), v=x(tokens=65)), ValueError, "k must have"),
    "sta_v_tokens": (lambda: sta(v=x(tokens=65)), ValueError, "v must have as many tokens"),
    "sta_dtype": (lambda: sta(q=x(dtype=torch.int32)), TypeError, "q must be float16"),
    "sta_k_dtype": (lambda: sta(k=x(dtype=torch.half)), TypeError, "k must have the dtype of q"),
    "sta_head_dim": (lambda: sta(q=x(head_dim=257)), ValueError, "head_dim of q must be 1 to 256"),
    "sta_gqa": (lambda: sta(k=x(heads=2), v=x(heads=2)), ValueError, "multiple of k's heads"),
    "sta_window_0": (lambda: sta(window=(0, 1, 1)), ValueError, "window_size must be three"),
    "sta_window_2_axes": (lambda: sta(window=(1, 1)), ValueError, "window_size must be three"),
    "sta_window_float": (lambda: sta(window=(1.5, 1, 1)), TypeError, "window_size"),
    "sta_window_later_float": (lambda: sta(window=(1, 1.0, 1)), ValueError, "window_size must be"),
    "sta_window_bool": (lambda: sta(window=(True, 1, 1)), ValueError, "window_size must be three"),
    "sta_windows_too_few": (
        lambda: sta(window=[WINDOW] * 2), ValueError, "window_size must be one",
    ),
    "sta_windows_too_many": (lambda: sta(window=[WINDOW] * 24), ValueError, "query head (3)"),
    "sta_windows_none": (lambda: sta(window=[]), ValueError, "window_size must be one (t, h, w)"),
    "sta_windows_bad_one": (
        lambda: sta(window=[WINDOW, WINDOW, (1, -1, 1)]), ValueError, "window_size must be three",
    ),
    "sta_window_missing": (lambda: sta(window=None), TypeError, "window_size must be"),
    "sta_window_tensor": (
        lambda: sta(window=ints(3, 3, value=1)), TypeError, "window_size must be",
    ),
    "sta_shape_text": (lambda: sta(shape="4x4"), ValueError, "seq_shape must be three integers"),
    "sta_shape_words": (lambda: sta(shape="4xfourx4"), ValueError, "seq_shape must be three"),
    "sta_shape_0": (lambda: sta(shape=(4, 0, 4)), ValueError, "seq_shape must be three integers"),
    "sta_shape_too_long": (lambda: sta(shape="30x48x80"), ValueError, "seq_shape (30, 48, 80) has"),
    "sta_shape_none": (lambda: sta(shape=None), TypeError, "seq_shape must be"),
    "sta_tile_0": (lambda: sta(tile_size=(0, 1, 1)), ValueError, "tile_size must be three"),
    "sta_text_too_long": (lambda: sta(text_length=1), ValueError, "text_length must be 0 to 0"),
    "sta_text_negative": (
        lambda: sta(q=x(tokens=70), text_length=-1), ValueError, "text_length must be 0 to 6",
    ),
    "sta_text_float": (lambda: sta(text_length=1.0), TypeError, "text_length must be an int"),
    "sta_text_bool": (lambda: sta(text_length=True), TypeError, "text_length must hold ints"),
    "sta_text_string": (lambda: sta(text_length="3"), TypeError, "text_length must be an int"),
    "sta_text_per_batch_count": (
        lambda: sta(q=x(tokens=70), text_length=[1, 2, 3]), ValueError, "per batch item (2), got 3",
    ),
    "sta_text_per_batch_value": (
        lambda: sta(q=x(tokens=70), text_length=[1, 7]), ValueError, "text_length must be 0 to 6",
    ),
    "sta_text_per_batch_type": (
        lambda: sta(q=x(tokens=70), text_length=[1, 0.5]), TypeError, "text_length must hold ints",
    ),
    "sta_text_tensor_dtype": (
        lambda: sta(text_length=torch.zeros(2)), TypeError, "text_length must be an integer tensor",
    ),
    "sta_text_tensor_shape": (
        lambda: sta(text_length=ints(3)), ValueError, "text_length must be a tensor [1] or [2]",
    ),
    "sta_text_tensor_scalar": (
        lambda: sta(text_length=ints()), ValueError, "text_length must be a tensor",
    ),
    "sta_text_tensor_device": (
        lambda: sta(text_length=ints(2).to("meta")),
        ValueError, "text_length must be on the device",
    ),
    "sta_no_text_but_tokens": (
        lambda: sta(q=x(tokens=70), has_text=False), ValueError, "has_text is False, but q has 70",
    ),
    "sta_no_text_but_length": (
        lambda: sta(q=x(tokens=70), has_text=False, text_length=6),
        ValueError, "text_length must be 0",
    ),
    "sta_has_text_type": (lambda: sta(has_text=1), TypeError, "has_text must be True or False"),
    "sta_scale": (lambda: sta(scale=-1), ValueError, "scale must be a finite number > 0"),
    "sta_precision": (lambda: sta(precision="int3"), ValueError, "precision must be one of"),
    "sta_backend": (lambda: sta(backend="magic"), ValueError, "backend must be one of"),
    "sta_unknown": (lambda: sta(sparsity=0.5), TypeError, "sparsity"),
    # video_attn.sliding_tile
    "raster_layout": (lambda: raster(layout="sbhd"), ValueError, "layout must be 'bhsd' or 'bshd'"),
    "raster_grid": (lambda: raster(grid=(4, 4)), ValueError, "grid must be three integers"),
    "raster_grid_too_long": (lambda: raster(grid=(4, 4, 5)), ValueError, "grid (4, 4, 5) has 80"),
    "raster_tile": (lambda: raster(tile=(2, 2, -2)), ValueError, "tile must be three integers"),
    "raster_window": (lambda: raster(window=[(1, 1, 1)] * 4), ValueError, "window must be one"),
    "raster_text_first": (lambda: raster(text_first=None), TypeError, "text_first must be True"),
    "raster_text": (lambda: raster(text_length=3), ValueError, "text_length must be 0 to 0"),
    "raster_bshd_heads": (
        lambda: raster(q=x(2, 64, 3, 8), window=[WINDOW] * 64, layout="bshd"), ValueError, "window",
    ),
    "raster_unknown": (lambda: raster(causal=True), TypeError, "causal"),
    # the mask itself
    "mask_device": (
        lambda: sliding_tile_mask(LAYOUT, WINDOW, text_length=ints(2).to("meta")),
        ValueError, "text_length",
    ),
    "mask_windows": (lambda: sliding_tile_mask(LAYOUT, "3x3"), ValueError, "windows must be three"),
    # video_attn.video_sparse
    "sparse_neither": (
        lambda: video_sparse(x(), x(), x(), GRID, tile=TILE), ValueError, "top_k or top_k_ratio",
    ),
    "sparse_both": (lambda: sparse(top_k=2, top_k_ratio=0.5), ValueError, "top_k or top_k_ratio"),
    "sparse_top_k_0": (lambda: sparse(top_k=0), ValueError, "top_k must be 1 to 8"),
    "sparse_top_k_9": (lambda: sparse(top_k=9), ValueError, "top_k must be 1 to 8"),
    "sparse_top_k_float": (lambda: sparse(top_k=2.0), TypeError, "top_k must be an int"),
    "sparse_top_k_bool": (lambda: sparse(top_k=True), TypeError, "top_k must be an int"),
    "sparse_ratio_0": (
        lambda: sparse(top_k_ratio=0.0), ValueError, "top_k_ratio must be in (0, 1]",
    ),
    "sparse_ratio_2": (lambda: sparse(top_k_ratio=2), ValueError, "top_k_ratio must be in (0, 1]"),
    "sparse_ratio_nan": (
        lambda: sparse(top_k_ratio=float("nan")), ValueError, "top_k_ratio must be",
    ),
    "sparse_ratio_text": (
        lambda: sparse(top_k_ratio="0.5"), TypeError, "top_k_ratio must be a num",
    ),
    "sparse_ratio_bool": (lambda: sparse(top_k_ratio=True), TypeError, "top_k_ratio must be a num"),
    "sparse_gate_type": (lambda: sparse(gate="yes"), TypeError, "gate must be None, a number"),
    "sparse_gate_bool": (lambda: sparse(gate=True), TypeError, "gate must be None, a number"),
    "sparse_gate_nan": (lambda: sparse(gate=float("nan")), ValueError, "gate must be finite"),
    "sparse_gate_dtype": (lambda: sparse(gate=ints(1)), TypeError, "gate must be a floating-point"),
    "sparse_gate_shape": (lambda: sparse(gate=x(tokens=32)), ValueError, "gate must broadcast to"),
    "sparse_gate_dims": (lambda: sparse(gate=x()[None]), ValueError, "gate must broadcast to"),
    "sparse_gate_layout": (
        lambda: sparse(gate=x(), q=x(2, 64, 3, 8), layout="bshd"),
        ValueError, "gate must broadcast",
    ),
    "sparse_gate_device": (lambda: sparse(gate=x(device="meta")), ValueError, "gate must be on"),
    "sparse_text_device": (
        lambda: sparse(text_length=ints(2).to("meta")), ValueError, "text_length must be on the",
    ),
    "sparse_text": (lambda: sparse(text_length=[0, 1]), ValueError, "text_length must be 0 to 0"),
    "sparse_cross": (lambda: sparse(k=x(tokens=72), v=x(tokens=72)), ValueError, "k must have the"),
    "sparse_grid": (lambda: sparse(grid="4x4x4x4"), ValueError, "grid must be three integers"),
    "sparse_return_mask": (lambda: sparse(return_mask=1), TypeError, "return_mask must be True"),
    "sparse_scale": (lambda: sparse(scale=float("inf")), ValueError, "scale must be a finite"),
    "sparse_unknown": (lambda: sparse(sparsity=0.1), TypeError, "sparsity"),
    "kept_no_blocks": (lambda: kept_blocks(0.5, 0), ValueError, "num_blocks must be >= 1"),
    # vsa.video_sparse_attn
    "padded_q_type": (lambda: padded(2, 8, q=[1.0]), TypeError, "q must be a Tensor"),
    "padded_k_dims": (lambda: padded(2, 8, k=x()[0]), ValueError, "k must be [B, H, S, D]"),
    "padded_dtype": (lambda: padded(2, 8, q=ints(2, 3, 64, 8)), TypeError, "q must be float16"),
    "map_q_dims": (lambda: mapped(MAP, q=x()[0]), ValueError, "q must be [B, H, S, D]"),
    "padded_no_topk": (lambda: padded(), TypeError, "missing the argument 'topk'"),
    "padded_topk_9": (lambda: padded(9, 8), ValueError, "topk must be 1 to 8"),
    "padded_topk_0": (lambda: padded(0, 8), ValueError, "topk must be 1 to 8"),
    "padded_topk_float": (lambda: padded(2.0, 8), TypeError, "topk must be an int"),
    "padded_topk_twice": (
        lambda: padded(2, 8, topk=2), TypeError, "two values for argument 'topk'",
    ),
    "padded_unknown": (lambda: padded(2, 8, heads=1), TypeError, "keyword argument 'heads'"),
    "padded_too_many": (lambda: padded(2, 8, None, 1), TypeError, "at most 7 positional"),
    "padded_too_many_sizes": (
        lambda: padded(ints(8), 2, 8, None, 1), TypeError, "at most 8 positional",
    ),
    "padded_block_0": (lambda: padded(2, 0), ValueError, "block_size must be >= 1"),
    "padded_block_2_axes": (lambda: padded(2, (4, 2)), TypeError, "block_size must be a number"),
    "padded_block_float": (lambda: padded(2, 8.0), TypeError, "block_size must be a number"),
    "padded_block_part": (lambda: padded(2, (2, 2, 2.0)), TypeError, "block_size must be"),
    "padded_tokens": (lambda: padded(2, 7), ValueError, "q must have a multiple of block_size 7"),
    "padded_k_tokens": (
        lambda: padded(2, 8, k=x(tokens=60), v=x(tokens=60)), ValueError, "k must have a multiple",
    ),
    "padded_no_q_sizes": (
        lambda: padded(2, 8, sizes=ints(2, value=8), k=x(tokens=16), v=x(tokens=16)),
        ValueError, "q_variable_block_sizes must be given",
    ),
    "padded_sizes_type": (
        lambda: padded(2, 8, sizes=[8] * 8), TypeError, "variable_block_sizes must be a Tensor",
    ),
    "padded_sizes_dtype": (
        lambda: padded(2, 8, sizes=torch.ones(8)), TypeError, "variable_block_sizes must be int32",
    ),
    "padded_sizes_count": (
        lambda: padded(2, 8, sizes=ints(7)), ValueError, "variable_block_sizes must be [8]",
    ),
    "padded_sizes_batch": (
        lambda: padded(2, 8, sizes=ints(3, 8)), ValueError, "variable_block_sizes must be [8]",
    ),
    "padded_sizes_too_large": (
        lambda: padded(2, 8, sizes=ints(8, value=9)), ValueError, "variable_block_sizes must hold",
    ),
    "padded_sizes_negative": (
        lambda: padded(2, 8, sizes=ints(8, value=-1)), ValueError, "variable_block_sizes must hold",
    ),
    "padded_q_sizes": (
        lambda: padded(ints(7), 2, 8), ValueError, "q_variable_block_sizes must be [8]",
    ),
    "padded_sizes_device": (
        lambda: padded(2, 8, sizes=ints(8).to("meta")),
        ValueError, "variable_block_sizes must be on",
    ),
    "padded_gate": (
        lambda: padded(2, 8, x(heads=2)), ValueError, "compress_attn_weight must broadcast",
    ),
    # vsa.block_sparse_attn and the list form
    "map_type": (lambda: mapped([[True]]), TypeError, "block_map must be a bool tensor"),
    "map_dtype": (lambda: mapped(MAP.int()), TypeError, "block_map must be a bool tensor"),
    "map_dims": (lambda: mapped(MAP[0, 0]), ValueError, "block_map must be [B|1, H|1, Nq, Nk]"),
    "map_empty": (lambda: mapped(MAP[..., :0]), ValueError, "block_map must be"),
    "map_rows": (lambda: mapped(MAP[:, :, :7]), ValueError, "q must have a multiple of 7 tokens"),
    "map_columns": (lambda: mapped(MAP[..., :7]), ValueError, "k must have a multiple of 7 tokens"),
    "map_heads": (lambda: mapped(MAP[:, :2]), ValueError, "block_map must have"),
    "map_batch": (lambda: mapped(MAP.repeat(2, 1, 1, 1)), ValueError, "block_map must have"),
    "map_device": (lambda: mapped(MAP.to("meta")), ValueError, "block_map must be on"),
    "map_sizes": (
        lambda: mapped(MAP, ints(8, value=9)), ValueError, "variable_block_sizes must hold",
    ),
    "list_dtype": (
        lambda: listed(torch.zeros(2, 3, 8, 2), ints(2, 3, 8)), TypeError, "q2k_idx must be int32",
    ),
    "list_heads": (
        lambda: listed(ints(2, 2, 8, 1), ints(2, 2, 8)), ValueError, "q2k_idx must have",
    ),
    "list_counts_shape": (
        lambda: listed(ints(2, 3, 8, 2), ints(2, 3, 7)),
        ValueError, "q2k_num must have the shape of q2k_idx",
    ),
    "list_out_of_range": (
        lambda: listed(ints(2, 3, 8, 1, value=8), ints(2, 3, 8, value=1)),
        ValueError, "q2k_idx must hold",
    ),
    "list_negative": (
        lambda: listed(ints(2, 3, 8, 1, value=-1), ints(2, 3, 8, value=1)),
        ValueError, "q2k_idx must hold",
    ),
    "list_twice": (
        lambda: listed(ints(2, 3, 8, 2), ints(2, 3, 8, value=2)), ValueError, "at most once",
    ),
    "list_counts_too_large": (
        lambda: listed(ints(2, 3, 8, 1), ints(2, 3, 8, value=2)), ValueError, "q2k_num must hold",
    ),
    "list_sizes": (
        lambda: listed(ints(2, 3, 8, 1), ints(2, 3, 8), ints(9)),
        ValueError, "multiple of 9 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_bad_input(row):
    """A wrong argument raises before any kernel runs; the message names it and what is allowed."""
    call, error, message = ROWS[row]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_the_same_calls_work_when_right():
    """The helpers above, given what is right, do not raise: the rows fail for their own reason."""
    for out in (sta(), raster(), sparse(), padded(2, 8), mapped(MAP)[0]):
        assert out.shape == x().shape
    out, lse = listed(ints(2, 3, 8, 1), ints(2, 3, 8, value=1), ints(8, value=8))
    assert out.shape == x().shape and lse.shape == x().shape[:3]
