"""Any attention in the video pipelines of diffusers: ``apply(pipe, pattern)`` and what it takes."""

from __future__ import annotations

from . import presets
from .applied import AppliedAttention
from .cogvideox import CogVideoXSparseAttnProcessor2_0
from .dispatcher import register_with_diffusers, unregister
from .pipeline import applied_to, apply
from .schedule import Schedule

__all__ = [
    "AppliedAttention",
    "CogVideoXSparseAttnProcessor2_0",
    "Schedule",
    "applied_to",
    "apply",
    "presets",
    "register_with_diffusers",
    "unregister",
]
