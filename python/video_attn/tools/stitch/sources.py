"""Videos that are to stand side by side: found by a pattern, looked at, named, put in order."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import UsageError
from ..video import Clip

GRID_COMMENT = "made by video-attn stitch"  # a tag of grids, so that none becomes a part of another
_RENDERED = re.compile(r"[^_]+-[^_]+_(.+)")  # <family>-<model>_<attention type>


@dataclass(frozen=True)
class Source:
    """One video.

    Args:
        path: the file. label: what stands in its corner.
        width, height: pixels. fps: frames per second. frames: how many there are.
    """

    path: Path
    label: str
    width: int
    height: int
    fps: float
    frames: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    def images(self, fps: float) -> Generator[Clip, None, None]:
        """Its frames, uint8 [H, W, 3], as a screen of ``fps`` frames per second shows them; after
        the last frame the last one again, for ever.
        """
        import av

        with av.open(str(self.path)) as container:
            decoded = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
            current, shown = next(decoded), 0
            tick = 0
            while True:
                wanted = min(self.frames - 1, int(tick * self.fps / fps + 1e-6))
                while shown < wanted:
                    current, shown = next(decoded), shown + 1
                yield current
                tick += 1


def find(folder: Path, pattern: str, output: Path) -> list[Path]:
    """Videos in ``folder`` that match ``pattern``, by name, without ``output`` and other grids.

    Raises:
        UsageError: there is no such folder, fewer than two videos in it, or ``output`` is a video
            that is no grid.
    """
    if not folder.is_dir():
        raise UsageError(f"--input_dir {folder} is not a folder; render videos into it first")
    try:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:  # an empty or an absolute pattern
        raise UsageError(f"--pattern {pattern!r}: {error}; give one such as '*.mp4'") from error
    found = [path for path in found if not path.name.startswith(".")]
    for path in [path for path in found if _same(path, output)]:
        if not _is_grid(path):
            raise UsageError(
                f"--output {output} would replace one of the videos; give another name"
            )
        found.remove(path)
    if len(found) < 2:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(
            f"{folder} has {names} of the two or more videos that match --pattern {pattern!r}; "
            "render more, or give another --pattern"
        )
    return found


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _is_grid(path: Path) -> bool:
    """Whether this program made it, or it is no video at all."""
    import av

    try:
        with av.open(str(path)) as container:
            return bool(container.metadata.get("comment") == GRID_COMMENT)
    except (av.FFmpegError, OSError):
        return True


def open_sources(paths: Sequence[Path]) -> tuple[list[Source], list[Path]]:
    """(the videos, those that are grids of this program and stay out).

    Raises:
        UsageError: a file is no video, or has no frames; the message names it.
    """
    sources, grids = [], []
    for path in paths:
        source = _probe(path)
        if source is None:
            grids.append(path)
        else:
            sources.append(source)
    return sources, grids


def _probe(path: Path) -> Source | None:
    """Size, rate and number of frames, by decoding all; None for a grid."""
    import av

    try:
        with av.open(str(path)) as container:
            if container.metadata.get("comment") == GRID_COMMENT:
                return None
            if not container.streams.video:
                raise UsageError(f"{path} has no video stream; move it away or change --pattern")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            frames, last = 0, None
            for frame in container.decode(stream):
                frames, last = frames + 1, frame
    except (av.FFmpegError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read as a video ({error}); move it away or render it again"
        ) from error
    if last is None:
        raise UsageError(f"{path} has no frames; move it away or render it again")
    return Source(path, label_of(path), last.width, last.height, rate or 8.0, frames)


def label_of(path: Path) -> str:
    """The attention type in the name of a rendered video; of any other file the whole stem."""
    match = _RENDERED.fullmatch(path.stem)
    return match[1] if match else path.stem


def ordered(sources: Sequence[Source], order: Sequence[str]) -> list[Source]:
    """``sources`` with the labels of ``order`` first, the rest by name.

    Raises:
        UsageError: a label of ``order`` is none of theirs.
    """
    known = [source.label for source in sources]
    for label in order:
        if label not in known:
            raise UsageError(f"--order: {label!r} is none of {', '.join(known)}")
    return sorted(sources, key=lambda source: _place(source, order))


def _place(source: Source, order: Sequence[str]) -> tuple[int, str]:
    place = order.index(source.label) if source.label in order else len(order)
    return place, source.path.name


def with_labels(sources: Sequence[Source], labels: Sequence[str]) -> list[Source]:
    """``sources`` under other names, one for each.

    Raises:
        UsageError: there are more or fewer names than videos.
    """
    if len(labels) != len(sources):
        raise UsageError(
            f"--labels has {len(labels)} names for {len(sources)} videos: "
            f"{', '.join(source.path.name for source in sources)}"
        )
    return [replace(source, label=label) for source, label in zip(sources, labels, strict=True)]


@contextmanager
def screens(sources: Sequence[Source], fps: float) -> Iterator[list[Iterator[Clip]]]:
    """The frames of each video, :meth:`Source.images`; their files are closed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(source.images(fps))) for source in sources]


def quality(
    sources: Sequence[Source], fps: float, frames: int, fit: Callable[[Clip], Clip]
) -> list[float]:
    """PSNR in dB of each video against the first, over all frames; infinite where they are equal.

    ``fit`` brings a frame of any size to the size of a cell.
    """
    squares = np.zeros(len(sources))
    with screens(sources, fps) as streams:
        for _ in range(frames):
            images = [fit(next(stream)).astype(np.float32) for stream in streams]
            squares += [float(((image - images[0]) ** 2).mean()) for image in images]
    with np.errstate(divide="ignore"):
        return [float(x) for x in 10 * np.log10(255.0**2 / (squares / frames))]
