"""Video sparse attention under the import path that is in use: ``from vsa import ...``."""

from video_attn.functional import (
    block_sparse_attn,
    block_sparse_attn_from_indices,
    block_sparse_attn_varlen,
    video_sparse_attn,
)

__all__ = [
    "block_sparse_attn",
    "block_sparse_attn_from_indices",
    "block_sparse_attn_varlen",
    "video_sparse_attn",
]
