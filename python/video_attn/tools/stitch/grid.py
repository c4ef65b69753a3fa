"""The picture of a grid: cells of one size, labels in their corners, maps of differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..video import Clip

if TYPE_CHECKING:
    from PIL.Image import Image

_CORNER, _PADDING, _SHADE = 15, 10, 153  # pixels, pixels, 60 % of 255
_COLUMNS = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}
DIFFERENCE_GAIN = 8  # differences are small: this many times brighter


def columns_for(count: int) -> int:
    """Columns of a grid of ``count`` videos: 2 x 2, 2 x 3, 3 x 3, then about square."""
    return _COLUMNS.get(count, max(3, math.ceil(math.sqrt(count))))


@dataclass(frozen=True)
class Cells:
    """The cells of a grid.

    Args:
        width, height: of a cell in pixels, even. columns: of the grid.
        tags: the label of each video, RGBA. difference_tags: those of the maps, or none.
    """

    width: int
    height: int
    columns: int
    tags: Sequence[Image]
    difference_tags: Sequence[Image] = ()

    def fit(self, image: Clip) -> Clip:
        """A frame scaled to fit into a cell, its shape kept, black around it."""
        from PIL import ImageOps
        from PIL.Image import fromarray

        if image.shape[:2] == (self.height, self.width):
            return image
        return np.asarray(ImageOps.pad(fromarray(image), (self.width, self.height)))

    def grids(self, streams: Sequence[Iterator[Clip]], frames: int) -> Iterator[Clip]:
        """``frames`` frames of the whole grid."""
        for _ in range(frames):
            yield self.compose([self.fit(next(stream)) for stream in streams])

    def compose(self, images: Sequence[Clip]) -> Clip:
        """One frame of the grid from one frame of each video."""
        lines = []
        for first in range(0, len(images), self.columns):
            row = slice(first, first + self.columns)
            lines.append(self._line(images[row], self.tags[row]))
            if self.difference_tags:
                maps = [difference(image, images[0]) for image in images[row]]
                lines.append(self._line(maps, self.difference_tags[row]))
        return np.concatenate(lines)

    def _line(self, images: Sequence[Clip], tags: Sequence[Image]) -> Clip:
        line = np.zeros((self.height, self.width * self.columns, 3), np.uint8)
        for n, (image, tag) in enumerate(zip(images, tags, strict=True)):
            line[:, n * self.width : (n + 1) * self.width] = labelled(image, tag)
        return line


def difference(image: Clip, reference: Clip) -> Clip:
    """Where two frames differ: the mean over the colours, brightened; grey."""
    gap = np.abs(image.astype(np.int16) - reference).mean(-1) * DIFFERENCE_GAIN
    return np.repeat(gap.clip(0, 255).astype(np.uint8)[..., None], 3, -1)


def labelled(image: Clip, tag: Image) -> Clip:
    """``image`` with ``tag`` in its upper left corner; what does not fit is cut."""
    from PIL.Image import fromarray

    picture = fromarray(image).convert("RGBA")
    left, top = (
        min(_CORNER, max(0, side - used)) for side, used in zip(picture.size, tag.size, strict=True)
    )
    picture.paste(tag, (left, top), tag)
    return np.asarray(picture.convert("RGB"))


def make_tags(labels: Sequence[str], font_size: int, width: int) -> tuple[list[Image], int]:
    """(white text on a dark box for each label, the font size used: what fits into ``width``)."""
    size = font_size
    while size > 6 and max(_box(label, size)[0] for label in labels) > width:
        size -= 1
    return [_tag(label, size) for label in labels], size


def _box(label: str, size: int) -> tuple[int, int, int, int]:
    """Width and height of the tag, and where its text begins."""
    from PIL import ImageFont

    left, top, right, bottom = ImageFont.load_default(size).getbbox(label, stroke_width=1)
    width, height = math.ceil(right - left), math.ceil(bottom - top)
    return (
        width + 2 * _PADDING, height + 2 * _PADDING,
        _PADDING - math.floor(left), _PADDING - math.floor(top),
    )  # fmt: skip


def _tag(label: str, size: int) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, top = _box(label, size)
    tag = Image.new("RGBA", (width, height), (0, 0, 0, _SHADE))
    ImageDraw.Draw(tag).text(
        (left, top), label, (255, 255, 255, 255), ImageFont.load_default(size),
        stroke_width=1, stroke_fill=(0, 0, 0, 255),
    )  # fmt: skip
    return tag
