"""VideoLayout: how the tokens of a video lie in a sequence, and how they move to tile order.

A video of T x H x W tokens (frames, rows, columns after patchifying) is usually stored in *raster
order*. Block-sparse patterns want *tile order*: the grid is cut into tiles of t x h x w tokens,
tiles follow each other in raster order, and so do the tokens inside a tile. Tiles at the border may
be partial. In *padded* tile order every tile owns a slot of t*h*w positions, valid tokens first, so
that one tile is one block of a :class:`~video_attn.block_mask.BlockMask`. Text tokens, if any,
follow the video in slots of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import cast

import torch
from torch import Tensor

from .checks import as_int, check_bool, check_int
from .open_sizes import is_open
from .static_cache import canonical_device, static_cache
from .token_moves import clear_holes, move_tokens

Triple = tuple[int, int, int]
LayoutKey = tuple[Triple, Triple, int, bool]


def as_triple(value: str | Sequence[int] | int, name: str, minimum: int = 1) -> Triple:
    """Reads three integers given as ``"30x48x80"``, a sequence of three, or one int for all axes.

    Sizes that ``torch.compile`` leaves open stay so.

    Raises:
        TypeError: ``value`` is none of these. ValueError: not three integers >= ``minimum``.
    """
    if isinstance(value, tuple):  # the common case: masks of many heads ask for many triples
        parts: Sequence[object] = value
    elif isinstance(value, str):
        parts = [int(p) if p.strip().isdigit() else p for p in value.split("x")]
    elif as_int(value) is not None:
        parts = (value,) * 3
    elif isinstance(value, Sequence) or type(value).__module__ == "numpy":
        parts = list(cast(Sequence[int], value))
    else:
        raise TypeError(f"{name} must be a string like '30x48x80' or three integers, got {value!r}")
    if len(parts) == 3:
        sizes = [n for n in map(as_int, parts) if n is not None and n >= minimum]
        if len(sizes) == 3:
            return sizes[0], sizes[1], sizes[2]
    raise ValueError(f"{name} must be three integers >= {minimum} (T, H, W), got {value!r}")


@dataclass(frozen=True)
class VideoLayout:
    """The token grid of a video, its tiles, and the text beside it.

    Args:
        grid: (T, H, W) tokens of the video after patchifying.
        tile: (t, h, w) tokens of one tile; larger than the grid on an axis means one tile on that
            axis.
        text_length: text tokens in the same sequence (all of them, padding included).
        text_first: the sequence is [text, video]; the tiled order is always [video, text].

    Raises:
        TypeError, ValueError: a size is not a positive integer, ``text_length`` is negative,
            or ``text_first`` is not a bool.
    """

    grid: Triple
    tile: Triple
    text_length: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", as_triple(self.grid, "grid"))
        # torch.compile may leave any int open; kernels are chosen by the sizes of tiles.
        t, h, w = as_triple(self.tile, "tile")
        object.__setattr__(self, "tile", (index(t), index(h), index(w)))
        object.__setattr__(self, "text_length", check_int("text_length", self.text_length, 0))
        check_bool("text_first", self.text_first)

    @property
    def key(self) -> LayoutKey:
        """The plain values that make this layout, ``VideoLayout(*key)``: a key for caches."""
        return self.grid, self.tile, self.text_length, self.text_first

    @property
    def video_length(self) -> int:
        """Video tokens: T*H*W."""
        t, h, w = self.grid  # torch.compile multiplies open sizes, but not by math.prod
        return t * h * w

    @property
    def sequence_length(self) -> int:
        """Tokens of the whole sequence in raster order: video and text."""
        return self.video_length + self.text_length

    @property
    def tile_grid(self) -> Triple:
        """Tiles per axis, partial ones included."""
        t, h, w = (-(-n // size) for n, size in zip(self.grid, self.tile, strict=True))
        return t, h, w

    @property
    def num_tiles(self) -> int:
        """Video tiles in all."""
        t, h, w = self.tile_grid
        return t * h * w

    @property
    def tile_volume(self) -> int:
        """Tokens of a full tile: the block size of masks over this layout."""
        return math.prod(self.tile)

    @property
    def is_ragged(self) -> bool:
        """True when some tile is partial, so that the padded order is longer than the sequence."""
        return any(n % size for n, size in zip(self.grid, self.tile, strict=True))

    @property
    def may_be_ragged(self) -> bool:
        """:attr:`is_ragged`; True as well where ``torch.compile`` leaves the grid open, so that one
        graph serves both.
        """
        return is_open(self.grid) or self.is_ragged

    @property
    def num_text_blocks(self) -> int:
        """Slots of ``tile_volume`` tokens that the text takes after the video."""
        return -(-self.text_length // self.tile_volume)

    @property
    def num_blocks(self) -> int:
        """All slots: video tiles, then text."""
        return self.num_tiles + self.num_text_blocks

    @property
    def padded_length(self) -> int:
        """Positions of the padded tile order; the text's last slot ends with the text."""
        return self.num_tiles * self.tile_volume + self.text_length

    def block_lens(self, device: torch.device | str = "cpu") -> Tensor:
        """Valid tokens of each slot, int32 [num_blocks]; text slots count all text tokens."""
        return _block_lens(self.key, canonical_device(device))

    def tile_order(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [sequence_length]: the raster position of the i-th token in packed tile order."""
        return _tile_order(self.key, canonical_device(device))

    def padded_slots(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [sequence_length]: the padded position of the i-th token in packed tile order."""
        return _padded_slots(self.key, canonical_device(device))

    def raster_slots(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [sequence_length]: the padded position of the i-th token in raster order."""
        return _permutations(self.key, canonical_device(device))[1]

    def tile_places(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 [padded_length]: the raster position of each padded position, -1 for padding."""
        return _tile_places(self.key, canonical_device(device))

    def to_tiles(self, x: Tensor, dim: int = -2) -> Tensor:
        """Raster order to padded tile order: [.., sequence_length, D] -> [.., padded_length, D].

        Padding is zero. Differentiable; one gather. Do it once per model, not once per layer, where
        the model allows it.

        Raises:
            ValueError: ``x`` does not have ``sequence_length`` tokens on ``dim``.
        """
        self._check_length(x, dim, self.sequence_length, "sequence_length")
        to_padded, to_raster = _permutations(self.key, x.device)
        return move_tokens(x, dim, to_padded, to_raster, self._holes(to_padded), None)

    def from_tiles(self, x: Tensor, dim: int = -2) -> Tensor:
        """Padded tile order back to raster order: the inverse of :meth:`to_tiles`."""
        self._check_length(x, dim, self.padded_length, "padded_length")
        to_padded, to_raster = _permutations(self.key, x.device)
        return move_tokens(x, dim, to_raster, to_padded, None, self._holes(to_padded))

    def pad_tiles(self, x: Tensor, dim: int = -2) -> Tensor:
        """Packed tile order (text last) to padded tile order; no copy when no tile is partial."""
        self._check_length(x, dim, self.sequence_length, "sequence_length")
        if not self.may_be_ragged:
            return x
        slots, inverse = _slot_permutations(self.key, x.device)
        return move_tokens(x, dim, inverse, slots, self._holes(inverse), None)

    def unpad_tiles(self, x: Tensor, dim: int = -2) -> Tensor:
        """Padded tile order to packed tile order: the inverse of :meth:`pad_tiles`."""
        self._check_length(x, dim, self.padded_length, "padded_length")
        if not self.may_be_ragged:
            return x
        slots, inverse = _slot_permutations(self.key, x.device)
        return move_tokens(x, dim, slots, inverse, None, self._holes(inverse))

    def clear_padding(self, x: Tensor, dim: int = -2) -> None:
        """Zeros, in place, into the padding of ``x`` [.., padded_length, D], in padded tile order.

        No result depends on what padding holds, but queries of any values at all cost time: their
        maxima may leap at every step (docs/hopper_notes.md).

        Raises:
            ValueError: ``x`` does not have ``padded_length`` tokens on ``dim``.
        """
        self._check_length(x, dim, self.padded_length, "padded_length")
        holes = self._holes(_permutations(self.key, x.device)[0])
        if holes is not None:
            clear_holes(x, dim, holes)

    def _holes(self, index: Tensor) -> Tensor | None:
        """Padded positions without a token, where ``index`` is negative; None: there are none.

        Compiled code, whose sizes may be open, has the whole table as a mask.
        """
        if not self.may_be_ragged:
            return None
        return index < 0 if torch.compiler.is_compiling() else _holes(self.key, index.device)

    def _check_length(self, x: Tensor, dim: int, expected: int, name: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must be a dimension of x {tuple(x.shape)}, got {dim}")
        if x.shape[dim] != expected:
            raise ValueError(
                f"x has {x.shape[dim]} tokens on dim {dim}, but {name} of grid {self.grid} with "
                f"tile {self.tile} and text_length {self.text_length} is {expected}"
            )


@static_cache(torch.int32, lambda key, device: [(VideoLayout(*key).num_blocks,)])
def _block_lens(key: LayoutKey, device: torch.device) -> Tensor:
    layout = VideoLayout(*key)
    sizes = [
        (torch.arange(n, dtype=torch.int32) * size).neg_().add_(length).clamp_(max=size)
        for n, size, length in zip(layout.tile_grid, layout.tile, layout.grid, strict=True)
    ]
    video = (sizes[0][:, None, None] * sizes[1][None, :, None] * sizes[2][None, None, :]).flatten()
    starts = torch.arange(layout.num_text_blocks, dtype=torch.int32) * layout.tile_volume
    text = (layout.text_length - starts).clamp_(max=layout.tile_volume)
    return torch.cat([video, text]).to(device)


@static_cache(torch.int64, lambda key, device: [(VideoLayout(*key).sequence_length,)])
def _tile_order(key: LayoutKey, device: torch.device) -> Tensor:
    layout = VideoLayout(*key)
    (grid_t, grid_h, grid_w), (tile_t, tile_h, tile_w) = layout.grid, layout.tile
    _, tiles_h, tiles_w = layout.tile_grid
    t, h, w = torch.meshgrid(
        torch.arange(grid_t), torch.arange(grid_h), torch.arange(grid_w), indexing="ij"
    )
    tile_index = ((t // tile_t) * tiles_h + h // tile_h) * tiles_w + w // tile_w
    in_tile = ((t % tile_t) * tile_h + h % tile_h) * tile_w + w % tile_w
    slot = (tile_index * layout.tile_volume + in_tile).flatten()
    video = torch.argsort(slot)
    text = torch.arange(layout.text_length)
    if layout.text_first:
        order = torch.cat([video + layout.text_length, text])
    else:
        order = torch.cat([video, text + layout.video_length])
    return order.to(device)


@static_cache(torch.int64, lambda key, device: [(VideoLayout(*key).sequence_length,)])
def _padded_slots(key: LayoutKey, device: torch.device) -> Tensor:
    layout = VideoLayout(*key)
    lens = _block_lens(key, torch.device("cpu")).long()
    starts = torch.arange(layout.num_blocks) * layout.tile_volume
    before = lens.cumsum(0) - lens
    slots = torch.repeat_interleave(starts - before, lens) + torch.arange(layout.sequence_length)
    return slots.to(device)


def _inverse(positions: Tensor, size: int) -> Tensor:
    """int64 [size]: where each of ``size`` positions stands in ``positions``, -1 if nowhere."""
    inverse = torch.full((size,), -1, dtype=torch.int64)
    inverse[positions] = torch.arange(positions.numel())
    return inverse


def _lengths(key: LayoutKey, device: torch.device) -> list[tuple[int]]:
    layout = VideoLayout(*key)
    return [(layout.padded_length,), (layout.sequence_length,)]


@static_cache(torch.int64, lambda *key: _lengths(*key)[::-1])
def _slot_permutations(key: LayoutKey, device: torch.device) -> tuple[Tensor, Tensor]:
    """(padded position of a packed token, packed token at a padded position or -1)."""
    slots = _padded_slots(key, torch.device("cpu"))
    return slots.to(device), _inverse(slots, VideoLayout(*key).padded_length).to(device)


@static_cache(torch.int64, _lengths)
def _permutations(key: LayoutKey, device: torch.device) -> tuple[Tensor, Tensor]:
    """(raster token at a padded position or -1, padded position of a raster token)."""
    layout, cpu = VideoLayout(*key), torch.device("cpu")
    to_raster = torch.empty(layout.sequence_length, dtype=torch.int64)
    to_raster[_tile_order(key, cpu)] = _padded_slots(key, cpu)
    return _inverse(to_raster, layout.padded_length).to(device), to_raster.to(device)


def _num_holes(key: LayoutKey, device: torch.device) -> list[tuple[int]]:
    layout = VideoLayout(*key)
    return [(layout.padded_length - layout.sequence_length,)]


@static_cache(torch.int64, _num_holes)
def _holes(key: LayoutKey, device: torch.device) -> Tensor:
    """The padded positions without a token."""
    return (_permutations(key, torch.device("cpu"))[0] < 0).nonzero()[:, 0].to(device)


@static_cache(torch.int32, lambda key, device: [(VideoLayout(*key).padded_length,)])
def _tile_places(key: LayoutKey, device: torch.device) -> Tensor:
    return _permutations(key, torch.device("cpu"))[0].to(device, torch.int32)
