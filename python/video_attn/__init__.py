"""video_attn: block-sparse attention for video diffusion models, any pattern on any device."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from .attention import attention
from .block_mask import BlockMask
from .layout import VideoLayout
from .registry import use_backend

try:
    __version__ = _version("video-attn")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

__all__ = ["BlockMask", "VideoLayout", "attention", "use_backend"]
