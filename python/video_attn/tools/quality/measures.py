"""PSNR, SSIM and LPIPS of the frames of a video against those of another.

SSIM is Wang's of 2004 with a Gaussian window of 11 x 11 pixels, sigma 1.5, over all windows inside
the frame, the mean of the three colours; LPIPS is Zhang's of 2018 on AlexNet, whose weights are
never downloaded. Both are torchmetrics'.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import UsageError
from ..stitch.sources import Source, open_sources, screens
from ..video import Clip

_WINDOW = 11  # pixels of SSIM's window
_WEIGHTS = "alexnet-owt-7be5be79.pth"  # what torchvision calls them
_BATCH = 8  # frames at a time
Measure = Callable[[Tensor, Tensor], Tensor]  # [N, 3, H, W] twice, 0 to 1 -> [N]


@dataclass
class Quality:
    """Of one video, by frame.

    Attributes:
        psnr: dB, infinite where the frames are equal. ssim: at most 1. lpips: from 0, or empty.
    """

    source: Source
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)

    @property
    def psnr_of_all(self) -> float:
        """dB, of the mean squared error of all frames."""
        return _decibels(float(np.mean([10 ** (-x / 10) for x in self.psnr])))


def measure(
    reference: Path, others: list[Path], *, device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Quality], str | None]:  # fmt: skip
    """(each video's quality; why there is no LPIPS, or None).

    Args:
        progress: called after every frame of every video.

    Raises:
        UsageError: a file that is no video, or videos of different sizes or lengths.
    """
    sources = [_open(path) for path in (reference, *others)]
    first = sources[0]
    for source in sources[1:]:
        _check_alike(first, source)
    ssim = _ssim()
    lpips, reason = _lpips(device)
    found = []
    for source in sources[1:]:
        quality = Quality(source)
        with screens([first, source], first.fps) as (a, b):
            for start in range(0, first.frames, _BATCH):
                count = min(_BATCH, first.frames - start)
                pair = _frames(a, count, device), _frames(b, count, device)
                squares = (pair[0] - pair[1]).double().square().mean((1, 2, 3))
                quality.psnr += [_decibels(x) for x in squares.tolist()]
                quality.ssim += ssim(*pair).tolist()
                if lpips is not None:
                    quality.lpips += lpips(*pair).tolist()
                for _ in range(count):
                    progress()
        found.append(quality)
    return found, reason


def _open(path: Path) -> Source:
    sources, _ = open_sources([path])
    if not sources:
        raise UsageError(f"{path} is a grid of videos; give one of its videos")
    return sources[0]


def _check_alike(first: Source, other: Source) -> None:
    for name, a, b in (
        ("pixels", f"{first.width} x {first.height}", f"{other.width} x {other.height}"),
        ("frames", first.frames, other.frames),
    ):
        if a != b:
            raise UsageError(
                f"{other.path} has {b} {name}, but {first.path} {a}: frames are compared one by "
                "one, so give videos of the same size and length"
            )
    if min(first.width, first.height) < _WINDOW:
        raise UsageError(
            f"{first.path} is {first.width} x {first.height}: SSIM needs {_WINDOW} pixels a side"
        )


def _frames(stream: Any, count: int, device: torch.device) -> Tensor:
    """fp32 [count, 3, H, W], 0 to 1."""
    images: list[Clip] = [next(stream) for _ in range(count)]
    pixels = torch.from_numpy(np.stack(images)).to(device)
    return pixels.permute(0, 3, 1, 2).float() / 255


def _decibels(square: float) -> float:
    return math.inf if square == 0 else -10 * math.log10(square)


def _ssim() -> Measure:
    if importlib.util.find_spec("torchmetrics") is None:
        raise UsageError("SSIM needs torchmetrics: pip install 'video-attn[cli,quality]'")
    from torchmetrics.functional.image import structural_similarity_index_measure

    def ssim(a: Tensor, b: Tensor) -> Tensor:
        of_pixels = structural_similarity_index_measure(
            a, b, data_range=1.0, reduction="none", return_full_image=True
        )[1]
        border = _WINDOW // 2  # where windows would see a mirrored frame
        return of_pixels[..., border:-border, border:-border].mean((1, 2, 3))

    return ssim


def _lpips(device: torch.device) -> tuple[Measure | None, str | None]:
    """The measure, or why there is none."""
    if importlib.util.find_spec("torchvision") is None:
        return None, "torchvision, which holds its network, is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
    if not weights.is_file():
        return None, f"its weights are not there: {weights}"
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)

    def lpips(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            found = [metric(x[None], y[None]) for x, y in zip(a, b, strict=True)]
        metric.reset()
        return torch.stack(found)

    return lpips, None
