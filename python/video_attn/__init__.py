"""video_attn: block-sparse attention for video diffusion models, any pattern on any device."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import once as _once  # noqa: F401  before all others
from .attention import attention
from .attention_types import resolve_attention_type
from .block_mask import BlockMask
from .functional import (
    Dense,
    HeadGroup,
    HeadGroups,
    Radial,
    SlidingTile,
    VideoSparse,
    VideoTokens,
    named_attention,
    radial,
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_varlen,
    sliding_tile,
    video_sparse,
)
from .layout import VideoLayout
from .patterns.radial import RadialRule, radial_mask
from .patterns.scene import Scenes
from .patterns.sliding_tile import sliding_tile_mask
from .registry import use_backend
from .static_cache import clear_caches

if _TYPE_CHECKING:
    from .tools.calibrate import calibrate

try:
    __version__ = _version("video-attn")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"


def __getattr__(name: str) -> _Any:
    """``calibrate`` is a tool, above the library: it is imported when somebody asks for it."""
    if name == "calibrate":
        from .tools.calibrate import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BlockMask",
    "Dense",
    "HeadGroup",
    "HeadGroups",
    "Radial",
    "RadialRule",
    "Scenes",
    "SlidingTile",
    "VideoLayout",
    "VideoSparse",
    "VideoTokens",
    "attention",
    "calibrate",
    "clear_caches",
    "named_attention",
    "radial",
    "radial_mask",
    "resolve_attention_type",
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_varlen",
    "sliding_tile",
    "sliding_tile_mask",
    "use_backend",
    "video_sparse",
]
