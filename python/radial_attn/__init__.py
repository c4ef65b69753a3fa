"""Radial attention under the import paths in use. The work is done in ``video_attn``."""
