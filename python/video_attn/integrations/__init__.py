"""Sparse attention in the pipelines of diffusers: ``apply(pipe, ...)`` and what it takes."""

from __future__ import annotations

from .cogvideox import CogVideoXSparseAttnProcessor2_0
from .pipeline import AppliedAttention, applied_to, apply
from .schedule import Schedule

__all__ = [
    "AppliedAttention",
    "CogVideoXSparseAttnProcessor2_0",
    "Schedule",
    "applied_to",
    "apply",
]
