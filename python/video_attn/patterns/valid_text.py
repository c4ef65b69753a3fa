"""How many text tokens of a sequence are valid, and the block lengths that say so to a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import as_int, broadcasts
from ..layout import LayoutKey, VideoLayout
from ..static_cache import static_cache

TextLength = int | Sequence[int] | Tensor | None
ValidText = tuple[int, ...] | Tensor


def check_text_length(
    text_length: TextLength, layout: VideoLayout, batch: int | None = None
) -> ValidText:
    """The valid text tokens as a tuple (one number, or one per batch item) or a tensor [B].

    None means all of the layout's text. The values of a tensor are not read: it may be on a GPU.
    There they count as if limited to 0 .. ``layout.text_length``.

    Raises:
        TypeError: neither an int, a sequence of ints nor an integer tensor.
        ValueError: out of range, or not one per batch item.
    """
    if text_length is None:
        return (layout.text_length,)
    if isinstance(text_length, Tensor):
        _check_tensor(text_length, batch)
        return text_length
    single = isinstance(text_length, int) or as_int(text_length) is not None
    values: object = (text_length,) if single else text_length
    if type(values).__module__ == "numpy":
        values = list(values)  # type: ignore[call-overload]
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(
            f"text_length must be an int, a sequence of ints or a Tensor [B], got {text_length!r}"
        )
    for value in values:
        if as_int(value) is None:
            raise TypeError(f"text_length must hold ints, got {text_length!r}")
        if not 0 <= value <= layout.text_length:
            raise ValueError(
                f"text_length must be 0 to {layout.text_length}, the text tokens that follow the "
                f"{layout.video_length} video tokens of grid {layout.grid}; got {text_length!r}"
            )
    if not single and (len(values) == 0 or (batch is not None and len(values) != batch)):
        raise ValueError(
            f"text_length must be one number or one per batch item ({batch}), got {len(values)}"
        )
    return tuple(map(as_int, values))  # type: ignore[arg-type]


def listed_text_blocks(valid: ValidText, layout: VideoLayout) -> int:
    """Text blocks that hold a valid token in some batch item: those worth listing in a mask."""
    if isinstance(valid, Tensor):
        return layout.num_text_blocks
    return -(-max(valid) // layout.tile_volume)


def block_lens(valid: ValidText, layout: VideoLayout, device: torch.device) -> Tensor | None:
    """Valid tokens of each block, int32 [B|1, num_blocks]; None when every block is full.

    Raises:
        ValueError: the valid text is a tensor on another device.
    """
    if isinstance(valid, Tensor):
        if valid.device != device:
            raise ValueError(f"text_length must be on the device {device}, got {valid.device}")
        return _lens_of_tensor(valid, layout)
    if not layout.may_be_ragged and min(valid) == layout.text_length:
        return None
    return _lens_of_numbers(layout.key, valid, device)


def _check_tensor(text_length: Tensor, batch: int | None) -> None:
    if text_length.is_floating_point() or text_length.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"text_length must be an integer tensor, got {text_length.dtype}")
    if text_length.dim() != 1 or (
        batch is not None and not broadcasts(text_length.shape[0], batch)
    ):
        allowed = "[B]" if batch is None else f"[1] or [{batch}]"
        raise ValueError(
            f"text_length must be a tensor {allowed}, got shape {tuple(text_length.shape)}"
        )


def _lens_of_tensor(valid: Tensor, layout: VideoLayout) -> Tensor:
    video, starts = _lens_of_parts(layout.key, valid.device)
    text = (valid.to(torch.int32)[:, None] - starts).clamp(0, layout.tile_volume)
    return torch.cat([video.expand(text.shape[0], -1), text], 1)


@static_cache(torch.int32, lambda key, valid, device: [(len(valid), VideoLayout(*key).num_blocks)])
def _lens_of_numbers(key: LayoutKey, valid: tuple[int, ...], device: torch.device) -> Tensor:
    return _lens_of_tensor(torch.tensor(valid, device=device), VideoLayout(*key))


@static_cache(torch.int32, lambda valid, device: [(len(valid),)])
def as_tensor(valid: tuple[int, ...], device: torch.device) -> Tensor:
    """Valid text tokens that are numbers, int32 [B|1]."""
    return torch.tensor(valid, dtype=torch.int32, device=device)


def _parts(key: LayoutKey, device: torch.device) -> list[tuple[int]]:
    layout = VideoLayout(*key)
    return [(layout.num_tiles,), (layout.num_text_blocks,)]


@static_cache(torch.int32, _parts)
def _lens_of_parts(key: LayoutKey, device: torch.device) -> tuple[Tensor, Tensor]:
    """(valid tokens of the video blocks, first text token of the text blocks), int32."""
    layout = VideoLayout(*key)
    starts = torch.arange(layout.num_text_blocks, dtype=torch.int32, device=device)
    return layout.block_lens(device)[: layout.num_tiles], starts * layout.tile_volume
