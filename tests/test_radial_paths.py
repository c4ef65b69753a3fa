"""The import paths of radial_attn that people already use."""

from __future__ import annotations

import pytest
import torch
from radial_cases import blocks_of

from radial_attn.attn_mask import MaskMap
from radial_attn.models.cogvideox import get_window_width
from video_attn import VideoLayout
from video_attn.patterns.radial import (
    RadialRule,
    radial_mask,
)


@pytest.mark.parametrize("model_type", ["wan", "hunyuan", "cogvideox"])
@pytest.mark.parametrize("distance, width", [(0, 1350), (2, 512), (4, 256), (8, 128), (12, 128)])
def test_get_window_width(model_type: str, distance: int, width: int) -> None:
    arguments = (1350, "radial", 13)
    assert get_window_width(0, distance, *arguments, model_type=model_type) == width
    assert get_window_width(12, 12 - distance, *arguments, model_type=model_type) == width
    if distance == 2:
        assert get_window_width(0, 2, *arguments, 0.3, model_type=model_type) == 512 * 0.3
        assert get_window_width(0, 2, *arguments, 0.3, 256, model_type) == 256


def test_get_window_width_of_adjacent_frames() -> None:
    assert get_window_width(4, 5, 1351, "radial", 13) == 675
    assert get_window_width(4, 5, 1351, "radial", 13, model_type="wan") == 1351
    assert get_window_width(4, 9, 1351, "dense", 13) == 1351


@pytest.mark.parametrize("arguments, words", [
    ((0, 13, 1350, "radial", 13), "j must be 0 to 12, got 13"),
    ((-1, 0, 1350, "radial", 13), "i must be 0 to 12, got -1"),
    ((0, 0, 0, "radial", 13), "token_per_frame must be >= 1, got 0"),
    ((0, 0, 1350, "sliding", 13), "sparse_type must be 'radial' or 'dense', got 'sliding'"),
    ((0, 0, 1350, "radial", 13, 1.0, 0), "block_size must be >= 1, got 0"),
    ((0, 0, 1350, "radial", 13, 1.0, 128, "mochi"), "model_type"),
])  # fmt: skip
def test_wrong_window_widths_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_window_width(*arguments)


@pytest.mark.parametrize("text, text_first", [(0, False), (10, False), (10, True)])
def test_mask_map(text: int, text_first: bool) -> None:
    masks = MaskMap(video_token_num=5 * 24, num_frame=5, text_first=text_first)
    query = torch.zeros(120 + text, 2, 8)
    layout = VideoLayout((5, 1, 24), (1, 1, 24), text, text_first)
    expected = radial_mask(layout, RadialRule.for_model("wan", 0.5), block_size=8)
    assert torch.equal(
        masks.queryLogMask(query, "radial", block_size=8, model_type="wan"), blocks_of(expected)
    )
    batched = masks.block_mask(query[None].expand(3, -1, -1, -1), "radial", 8, 0.5, "wan")
    assert torch.equal(blocks_of(batched), blocks_of(expected))
    assert masks.queryLogMask(query, "dense", 8, model_type="wan").all()
    # Another map, another size: nothing is shared between them.
    other = MaskMap(video_token_num=3 * 24, num_frame=3)
    assert other.queryLogMask(query[:72], "radial", 8, 0.5, "wan").shape == (9, 9)
    assert masks.queryLogMask(query, "radial", 8, 0.5, "wan").shape == expected.to_dense().shape[2:]


def test_wrong_mask_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="video_token_num 121 is not a multiple of 5 frames"):
        MaskMap(121, 5)
    with pytest.raises(ValueError, match="query has 100 tokens, fewer than the 120 of the video"):
        MaskMap(120, 5).queryLogMask(torch.zeros(100, 2, 8), "radial", model_type="wan")
    with pytest.raises(ValueError, match="sparse_type"):
        MaskMap(120, 5).queryLogMask(torch.zeros(120, 2, 8), "svg", model_type="wan")
    with pytest.raises(ValueError, match=r"query must be \[S, H, D\] or \[B, S, H, D\]"):
        MaskMap(120, 5).queryLogMask(torch.zeros(120, 8), "radial", model_type="wan")
