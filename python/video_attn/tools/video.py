"""Clips: read one from a video, make one from a photograph, write one. uint8 RGB [T, H, W, 3]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Clip = NDArray[np.uint8]


def read_clip(path: Path, frames: int, size: tuple[int, int], seconds: float) -> Clip:
    """``frames`` frames, evenly spread over the first ``seconds`` of a video or over all of it.

    They are cropped and scaled to ``size`` (height, width).

    Raises:
        UsageError: not a video, or fewer than ``frames`` frames in it.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UsageError(f"{path} has no video stream; give a video file")
            images = [_fill(f.to_image(), size) for f in _first_seconds(container, seconds)]
    except av.FFmpegError as error:
        raise UsageError(
            f"{path} cannot be read as a video ({error}); give another file"
        ) from error
    if len(images) < frames:
        raise UsageError(
            f"the first {seconds:g} s of {path} have {len(images)} frames, and --frames asks for "
            f"{frames}; ask for fewer frames or more --seconds"
        )
    picked = np.linspace(0, len(images) - 1, frames).round().astype(int)
    return np.stack([images[i] for i in picked])


def _first_seconds(container: Any, seconds: float) -> Iterator[Any]:
    """Decoded frames whose time lies in the first ``seconds``; time counts from the first frame."""
    start = None
    for index, frame in enumerate(container.decode(video=0)):
        now = frame.time if frame.time is not None else index / 24
        start = now if start is None else start
        if now - start >= seconds:
            return
        yield frame


def _fill(image: Image, size: tuple[int, int]) -> Clip:
    """The image scaled to cover ``size`` (height, width), its middle kept."""
    from PIL import ImageOps

    height, width = size
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height)))


def photograph(path: Path | None = None) -> Image:
    """The image at ``path``, or the public-domain portrait that comes with matplotlib.

    Raises:
        UsageError: ``path`` is not an image.
    """
    import PIL.Image

    if path is None:
        from matplotlib.cbook import get_sample_data

        path = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    try:
        return PIL.Image.open(path).convert("RGB")
    except OSError as error:  # absent, a folder, or no image
        raise UsageError(
            f"{path} cannot be read as an image ({error}); give a PNG or JPEG file"
        ) from error


def pan_and_zoom(image: Image, frames: int, size: tuple[int, int]) -> Clip:
    """A clip from a photograph: the camera starts close, drifts across, and draws back.

    ``size`` is (height, width).
    """
    from PIL.Image import Resampling

    height, width = size
    widest = min(image.width, image.height * width / height)
    clip = []
    for moment in np.linspace(0.0, 1.0, frames):
        crop_width = widest * (0.70 + 0.12 * moment)
        crop_height = crop_width * height / width
        left = (image.width - crop_width) * (0.35 + 0.30 * moment)
        top = (image.height - crop_height) * (0.10 + 0.12 * moment)
        box = (left, top, left + crop_width, top + crop_height)
        clip.append(np.asarray(image.resize((width, height), Resampling.BICUBIC, box=box)))
    return np.stack(clip)


def write_clip(path: Path, clip: Clip, fps: float) -> None:
    """:func:`write_frames` of a whole clip."""
    write_frames(path, iter(clip), fps)


def write_frames(
    path: Path, frames: Iterable[Clip], fps: float, *, metadata: Mapping[str, str] | None = None
) -> int:
    """Writes ``frames``, uint8 [H, W, 3] of one size, as H.264; returns how many there were.

    The sides of H.264 are even: an odd side loses one row of pixels. The file appears under its
    name when it is whole. ``metadata``: the container's tags, such as "comment".

    Raises:
        OSError: the file cannot be written, or this PyAV has no H.264 encoder.
        ValueError: there are no frames.
    """
    import av

    part = path.with_name(f".{path.stem}.part{path.suffix}")
    count = 0
    try:
        with av.open(str(part), "w") as container:
            container.metadata.update(metadata or {})
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "18", "preset": "veryfast"}
            for count, frame in enumerate(frames, 1):
                height, width = (n - n % 2 for n in frame.shape[:2])
                if count == 1:
                    stream.height, stream.width = height, width
                even = np.ascontiguousarray(frame[:height, :width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            if not count:
                raise ValueError(f"there are no frames to write to {path}")
            container.mux(stream.encode(None))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count
