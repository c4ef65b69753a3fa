"""Sliding tile attention under the import path that is in use: ``from st_attn import ...``."""

from video_attn.functional import sliding_tile_attention

__all__ = ["sliding_tile_attention"]
