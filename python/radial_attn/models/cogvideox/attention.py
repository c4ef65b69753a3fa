"""The attention processor of CogVideoX and the window of a pair of frames."""

from __future__ import annotations

from video_attn.integrations import CogVideoXSparseAttnProcessor2_0
from video_attn.patterns.radial import RadialRule

__all__ = ["CogVideoXSparseAttnProcessor2_0", "get_window_width"]


def get_window_width(
    i: int,
    j: int,
    token_per_frame: int,
    sparse_type: str,
    num_frame: int,
    decay_factor: float = 1,
    block_size: int = 128,
    model_type: str = "cogvideox",
) -> float:
    """How many tokens to either side a token of frame ``i`` sees in frame ``j``.

    Args:
        i, j: frames, 0 to ``num_frame`` - 1. token_per_frame: tokens of a latent frame.
        sparse_type: "radial", or "dense": always a whole frame.
        decay_factor: scales the windows of frames two or more apart.
        block_size: the smallest window of those. model_type: "cogvideox", "wan" or "hunyuan".

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.
    """
    for name, value, smallest, largest in (
        ("num_frame", num_frame, 1, None),
        ("token_per_frame", token_per_frame, 1, None),
        ("block_size", block_size, 1, None),
        ("i", i, 0, num_frame - 1),
        ("j", j, 0, num_frame - 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < smallest or (largest is not None and value > largest):
            allowed = f">= {smallest}" if largest is None else f"{smallest} to {largest}"
            raise ValueError(f"{name} must be {allowed}, got {value}")
    rule = RadialRule.for_model(model_type, decay_factor)
    if sparse_type == "dense":
        return token_per_frame
    if sparse_type != "radial":
        raise ValueError(f"sparse_type must be 'radial' or 'dense', got {sparse_type!r}")
    return rule.window(abs(i - j), token_per_frame, block_size)
