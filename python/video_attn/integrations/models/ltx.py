"""LTX-Video and LTX-2: packed latents, text by cross-attention, condition tokens beside the video.

LTX-Video puts the tokens of extra conditions before the video, LTX-2 after it. They see everything
and are seen by everything, as text in other models. The audio of LTX-2 stays as it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from ...functional.video_tokens import VideoTokens
from ...layout import Triple
from ...patterns.radial import RadialRule
from .family import Family, numbered


def _tokens(transformer: Any, inputs: dict[str, Any], *, conditions_first: bool) -> VideoTokens:
    length = inputs["hidden_states"].shape[1]
    sizes: list[Any] = [inputs.get(name) for name in ("num_frames", "height", "width")]
    if None not in sizes:
        config = transformer.config
        patches = (config.patch_size_t, config.patch_size, config.patch_size)
        t, h, w = (int(n) // p for n, p in zip(sizes, patches, strict=True))
    elif conditions_first and inputs.get("video_coords") is not None:
        t, h, w = _grid_of_coordinates(inputs["video_coords"][0])
    else:
        raise ValueError(
            "the transformer was called without num_frames, height and width, so the grid of its "
            f"{length} tokens is unknown"
        )
    return VideoTokens((t, h, w), length - t * h * w, text_first=conditions_first)


def _grid_of_coordinates(coordinates: Tensor) -> Triple:
    """The grid of the video from (time, row, column) of all tokens, [3, N]; the video is last.

    Walking back from the end, the frames of the video follow each other in time without a gap.
    """
    times, rows, columns = coordinates.float().cpu()
    height, width = rows.unique().numel(), columns.unique().numel()
    last = times.flip(0).unfold(0, height * width, height * width)
    frames = [frame[0].item() for frame in last if frame.min() == frame.max()]
    count = 1
    for later, earlier in pairwise(frames):
        if earlier >= later:
            break
        count += 1
    return count, height, width


FAMILY = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    arguments=(
        "hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask",
        "num_frames", "height", "width",
    ),
    attention_layers=lambda transformer: numbered(transformer, ("transformer_blocks", "attn1")),
    tokens=lambda transformer, inputs: _tokens(transformer, inputs, conditions_first=True),
    rule=RadialRule(),
    temporal_compression=8,
    temporal_patch=lambda config: config.patch_size_t,
    rotary={"LTXVideoAttnProcessor": "image_rotary_emb"},
)  # fmt: skip

FAMILY_2 = Family(
    name="LTX-2",
    transformers=("LTX2VideoTransformer3DModel",),
    arguments=(
        "hidden_states", "audio_hidden_states", "encoder_hidden_states",
        "audio_encoder_hidden_states", "timestep",
    ),
    attention_layers=lambda transformer: numbered(transformer, ("transformer_blocks", "attn1")),
    tokens=lambda transformer, inputs: _tokens(transformer, inputs, conditions_first=False),
    rule=RadialRule(),
    temporal_compression=8,
    temporal_patch=lambda config: config.patch_size_t,
    rotary={"LTX2AudioVideoAttnProcessor": "query_rotary_emb"},
)  # fmt: skip
