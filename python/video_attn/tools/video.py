"""Clips: read a video file, make a clip from a photograph, write one. Frames are uint8 RGB [T, H, W, 3]."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import UsageError

Clip = NDArray[np.uint8]
SUFFIXES = (".mp4", ".mov", ".mkv")


def read_clip(path: Path, frames: int, size: tuple[int, int], seconds: float) -> Clip:
    """``frames`` frames, evenly spread over the first ``seconds`` of a video, cropped and scaled to ``size``.

    A video shorter than ``seconds`` is used to its end.

    Raises:
        UsageError: not a video, or fewer than ``frames`` frames in it.
    """
    import av
    from PIL import Image

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UsageError(f"{path} has no video stream; give a video file")
            images = [frame.to_image() for frame in _first_seconds(container, seconds)]
    except av.FFmpegError as error:
        raise UsageError(f"{path} cannot be read as a video ({error}); give a video file") from error
    if len(images) < frames:
        raise UsageError(
            f"the first {seconds:g} s of {path} have {len(images)} frames, fewer than --frames {frames}; "
            "ask for fewer frames or more seconds"
        )
    picked = np.linspace(0, len(images) - 1, frames).round().astype(int)
    return np.stack([np.asarray(_fill(images[i], size, Image.Resampling.BICUBIC)) for i in picked])


def _first_seconds(container, seconds: float) -> Iterator:  # type: ignore[no-untyped-def, type-arg]
    """Decoded frames whose time lies in the first ``seconds``; time counts from the first frame."""
    start = None
    for index, frame in enumerate(container.decode(video=0)):
        now = frame.time if frame.time is not None else index / 24
        start = now if start is None else start
        if now - start >= seconds:
            return
        yield frame


def _fill(image, size: tuple[int, int], resample):  # type: ignore[no-untyped-def]
    """The image scaled to cover ``size`` (height, width), its middle kept."""
    from PIL import ImageOps

    height, width = size
    return ImageOps.fit(image.convert("RGB"), (width, height), method=resample)


def photograph(path: Path | None = None):  # type: ignore[no-untyped-def]
    """A PIL image: the file at ``path``, or the portrait that comes with matplotlib (a public-domain photograph).

    Raises:
        UsageError: ``path`` is not an image.
    """
    from PIL import Image, UnidentifiedImageError

    if path is None:
        from matplotlib.cbook import get_sample_data

        path = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, IsADirectoryError) as error:
        raise UsageError(f"{path} cannot be read as an image; give a PNG or JPEG file") from error


def pan_and_zoom(image, frames: int, size: tuple[int, int]) -> Clip:  # type: ignore[no-untyped-def]
    """A clip from a photograph: the camera starts close, drifts across, and draws back.

    ``size`` is (height, width). The picture moves about 1 % of its width from frame to frame at 16 frames.
    """
    from PIL import Image

    height, width = size
    widest = min(image.width, image.height * width / height)
    clip = []
    for moment in np.linspace(0.0, 1.0, frames):
        crop_width = widest * (0.70 + 0.12 * moment)
        crop_height = crop_width * height / width
        left = (image.width - crop_width) * (0.35 + 0.30 * moment)
        top = (image.height - crop_height) * (0.10 + 0.12 * moment)
        box = (left, top, left + crop_width, top + crop_height)
        clip.append(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box)))
    return np.stack(clip)


def write_clip(path: Path, clip: Clip, fps: float) -> None:
    """Writes ``clip`` as H.264; one row or column of pixels is dropped where a side is odd, as the format wants.

    Raises:
        OSError: the file cannot be written, or this PyAV has no H.264 encoder.
    """
    import av

    height, width = (n - n % 2 for n in clip.shape[1:3])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for frame in clip:
            picture = av.VideoFrame.from_ndarray(frame[:height, :width].copy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
