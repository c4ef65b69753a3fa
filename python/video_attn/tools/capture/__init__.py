"""Captures: q, k and v of single attention calls of a model, kept in files for benchmarks.

:mod:`.files` says what a capture is, :mod:`.writer` makes them while a video is rendered, and
``video-attn capture-info`` shows what a folder of them holds.
"""

from .files import Capture, CaptureError, Facts, find_captures, load_capture
from .writer import CaptureWriter, Selection

__all__ = [
    "Capture",
    "CaptureError",
    "CaptureWriter",
    "Facts",
    "Selection",
    "find_captures",
    "load_capture",
]
